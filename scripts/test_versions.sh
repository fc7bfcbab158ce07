#!/usr/bin/env bash
# Runs a small set of engine tests on other versions of DeepSpeed or transformers:
#     bash scripts/test_versions.sh [VERSION | transformers==VERSION …]
# Without arguments: the oldest DeepSpeed that is accepted. Each is installed beside the environment, which
# stays as it is; everything else, torch too, is that of constraints.txt (see ucp_deepspeed/testing/older_deepspeed.py).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_environment.sh

oldest=$(sed -n 's/^OLDEST_DEEPSPEED = "\(.*\)"/\1/p' ucp_deepspeed/engine/__init__.py)
[ $# -gt 0 ] || set -- "$oldest"

stages=tests/engines/test_every_stage_change.py
pipelines=tests/engines/test_pipelines.py
tests=(
    tests/unit/test_package.py
    tests/engines/test_deepspeed_versions.py
    # Another data-parallel size and stage, in fp32, bf16 and fp16.
    "$stages::test_state_is_bit_exact_and_training_goes_on[plain-fp32-zero1]"
    "$stages::test_state_is_bit_exact_and_training_goes_on[zero1-bf16-zero3]"
    "$stages::test_state_is_bit_exact_and_training_goes_on[zero2-fp32-plain]"
    "$stages::test_state_is_bit_exact_and_training_goes_on[zero3-bf16-zero2]"
    "$stages::test_state_is_bit_exact_and_training_goes_on[zero1-fp16-unfused]"
    "$stages::test_same_topology_continues_bit_for_bit[plain-fp32]"
    "$stages::test_same_topology_continues_bit_for_bit[zero1-bf16]"
    "$stages::test_same_topology_continues_bit_for_bit[zero3-bf16]"
    "$stages::test_same_topology_continues_bit_for_bit[zero1-fp16]"
    "$stages::test_same_topology_is_left_to_deepspeed[zero3-bf16]"
    tests/engines/test_training_state.py::test_fp16_loss_scale
    # Through a universal checkpoint; frozen weights; what DeepSpeed alone saves and loads.
    "tests/engines/test_round_trip.py::test_native_universal_engine_native[tp1dp2-zero3]"
    "tests/engines/test_round_trip.py::test_native_universal_engine_native[tp2dp2-zero1]"
    "tests/engines/test_changed_models.py::test_unfreezing[1]"
    "tests/engines/test_changed_models.py::test_freezing[3]"
    "tests/engines/test_stock_deepspeed.py::test_deepspeed_alone_loads_what_was_saved[1]"
    "tests/engines/test_stock_deepspeed.py::test_deepspeed_alone_loads_what_was_saved[3]"
    "tests/engines/test_stock_deepspeed.py::test_saved_without_the_plugin[2]"
    # Pipelines, saving in the background.
    "$pipelines::test_state_is_bit_exact_and_training_goes_on[tied-zero1-bf16-one-stage]"
    "$pipelines::test_state_is_bit_exact_and_training_goes_on[untied-uneven-fp32-plain-zero3]"
    "$pipelines::test_same_topology_continues_bit_for_bit[tied-zero1-bf16]"
    "tests/engines/test_async_save.py::test_files_are_those_of_a_synchronous_save[zero-0]"
    "tests/engines/test_async_save.py::test_files_are_those_of_a_synchronous_save[zero-3]"
    "tests/engines/test_async_save.py::test_files_are_those_of_a_synchronous_save[pipeline]"
    "tests/engines/test_async_save.py::test_deepspeed_alone_loads_it[1]"
)
# Pipelines without ZeRO, which don't train with 0.18.3 and 0.18.4.
pipelines_without_zero=("$pipelines::test_state_is_bit_exact_and_training_goes_on[tied-zero0-fp32-tp2-pp2]")
# In bf16 at stage 0, and at stage 1 with gradients accumulated in fp32, DeepSpeed saves the optimizer's state since 0.18.5. A run
# that this version resumes at stage 0 isn't the uninterrupted one.
bf16_wrappers=(
    "tests/engines/test_round_trip.py::test_native_universal_engine_native[tp1dp1-zero0]"
    tests/engines/test_module_states.py::test_frozen_parameters_and_buffers
    "$stages::test_state_is_bit_exact_and_training_goes_on[unfused-bf16-zero2]"
    "$stages::test_state_is_bit_exact_and_training_goes_on[bf16-optimizer-zero3]"
    "$stages::test_state_is_bit_exact_and_training_goes_on[zero1-bf16-bf16-optimizer]"
    "$stages::test_same_topology_continues_bit_for_bit[unfused-bf16]"
    "$pipelines::test_same_topology_continues_bit_for_bit[tied-zero0-bf16]"
)

# DeepSpeed's own experts, of which its files tell enough since 0.19.3.
experts=("tests/engines/test_experts.py::test_every_expert_parallel_size[1-one-fp32]")

# Models of transformers: all families that AutoTP cuts, all whose experts AutoEP deals out.
models=(tests/engines/test_autotp.py)
# DeepSpeed 0.19.8 can't change the record of outputs that transformers has from 5.23 on.
models_with_experts=(
    tests/engines/test_autoep.py::test_from_and_to_the_model_of_transformers
    tests/engines/test_autoep.py::test_experts_that_are_modules_of_their_own
    "tests/engines/test_autoep.py::test_every_expert_parallel_size[2-stages2-settings2]"
)

since() { # the version in which it came; whether the tested one has it
    [ "$(printf '%s\n' "$1" "$version" | sort -V | head -1)" = "$1" ]
}

test_transformers() { # the version
    version=$1 folder="${DEEPSPEED_VERSIONS:-$PWD/.venv/versions}/transformers-$1"
    if [ ! -e "$folder/transformers/__init__.py" ]; then
        rm -rf "$folder"
        pip install -q --no-deps --target "$folder" "transformers==$version"
    fi
    # Its parts that the environment has only in another version.
    PYTHONPATH="$folder" python -c 'from importlib.metadata import requires, version
from packaging.requirements import Requirement
parts = ("tokenizers", "safetensors", "huggingface-hub")
needed = [need for need in map(Requirement, requires("transformers")) if need.name in parts and need.marker is None]
print(*(need for need in needed if not need.specifier.contains(version(need.name))), sep="\n")' |
        xargs -r pip install -q --no-deps --target "$folder"
    PYTHONPATH="$folder:$PWD" python -c 'import sys, transformers
assert transformers.__version__ == sys.argv[1], f"{transformers.__version__} was imported from {transformers.__file__}"
print(f"transformers {sys.argv[1]}")' "$version" 2>/dev/null
    chosen=("${models[@]}")
    if ! since 5.23; then chosen+=("${models_with_experts[@]}"); fi
    PYTHONPATH="$folder:$PWD" python -m pytest -q --device cpu -p no:cacheprovider --durations=0 --durations-min=4 "${chosen[@]}"
}

for version in "$@"; do
    case $version in transformers==*)
        test_transformers "${version#transformers==}"
        continue ;;
    esac
    folder="${DEEPSPEED_VERSIONS:-$PWD/.venv/versions}/$version"
    if [ ! -e "$folder/deepspeed/__init__.py" ]; then
        rm -rf "$folder"
        pip install -q --no-deps --no-build-isolation --target "$folder" "deepspeed==$version"
    fi
    chosen=("${tests[@]}")
    case $version in 0.18.3 | 0.18.4) ;; *) chosen+=("${pipelines_without_zero[@]}") ;; esac
    if since 0.18.6; then chosen+=("${bf16_wrappers[@]}"); fi
    if since 0.19.3; then chosen+=("${experts[@]}"); fi
    export PYTHONPATH="$folder:$PWD" TORCH_EXTENSIONS_DIR="$folder/torch_extensions"
    python -c 'import sys, deepspeed, torch
assert deepspeed.__version__ == sys.argv[1], f"{deepspeed.__version__} was imported from {deepspeed.__file__}"
print(f"DeepSpeed {sys.argv[1]}, torch {torch.__version__}, Python {sys.version.split()[0]}")' "$version" 2>/dev/null
    python -m pytest -q --device cpu -p no:cacheprovider --durations=0 --durations-min=4 "${chosen[@]}"
done
