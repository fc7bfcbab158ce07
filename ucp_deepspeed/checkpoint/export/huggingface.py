"""A folder that ``from_pretrained`` of Hugging Face's libraries loads: shards of safetensors, their index, the configuration."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

from safetensors import safe_open

from ucp_deepspeed.checkpoint.checksums import FileSums
from ucp_deepspeed.checkpoint.differing import OnDiffering
from ucp_deepspeed.checkpoint.export.adapter import adapters_in
from ucp_deepspeed.checkpoint.export.companions import (
    BESIDE_MODEL,
    CONFIG_NAME,
    Companions,
    companions_of,
    model_type_of,
    with_dtype,
)
from ucp_deepspeed.checkpoint.export.experts import with_single_experts
from ucp_deepspeed.checkpoint.export.model_names import huggingface_weights
from ucp_deepspeed.checkpoint.export.weights import DTYPES, Choice, check_complete, check_range, model_names
from ucp_deepspeed.checkpoint.output import Output, OutputFile, OutputPlan, StoredTensor
from ucp_deepspeed.checkpoint.safetensors_files import WEIGHTS_INDEX_NAME, WEIGHTS_NAME, safetensors_file
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import ConfigError, UnsupportedError
from ucp_deepspeed.language.spec import Spec

METADATA = {"format": "pt"}
"""Text in the header of each file, which transformers and PEFT ask for."""

SHARD_SIZE = "5GB"

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

_OF_PIPELINE = re.compile(r"\d+\.|tied_modules\.")


@dataclass(frozen=True)
class HuggingFaceOutput(Output):
    """See `Output`.

    Attributes:
        choice: the numbers to write.
        config_from: folder with ``config.json``, and perhaps a tokenizer; by default where these lie beside the checkpoint.
        shard_numbytes: most bytes of a shard with several tensors.
        spec: the spec that the user has named.
    """

    choice: Choice
    config_from: Path | None = None
    shard_numbytes: int = 5 * 10**9
    spec: Spec | None = None
    on_differing: OnDiffering = "error"

    def plan(self, view: UniversalView) -> OutputPlan:
        """See `Output.plan`."""
        _check_names(view)
        check_complete(view)
        companions = companions_of(view.checkpoint.path, self.config_from, CONFIG_NAME, BESIDE_MODEL)
        config = companions.document(CONFIG_NAME)
        weights = huggingface_weights(view, self.choice, config, self.spec)
        tensors = dict(weights.tensors)
        if config is None or config.get("tie_word_embeddings") is False:  # nobody would tie them again
            tensors |= {alias: tensors[owner] for alias, owner in weights.tied.items()}
        tensors = with_single_experts(tensors, None if config is None else model_type_of(config))
        if config is not None:
            companions = companions.with_document(CONFIG_NAME, with_dtype(config, _dtype_of(tensors)))
        files = shards_of(tensors, self.shard_numbytes)
        return OutputPlan(files, partial(_finish, view, tensors, files, companions), companions.numbytes)


def shards_of(tensors: Mapping[str, StoredTensor], numbytes: int) -> tuple[OutputFile, ...]:
    """Lay out the shards, in the order of the tensors; one file has no number."""
    bins: list[dict[str, StoredTensor]] = [{}]
    held = 0
    for name, tensor in tensors.items():
        if bins[-1] and held + tensor.numbytes > numbytes:
            bins.append({})
            held = 0
        bins[-1][name] = tensor
        held += tensor.numbytes
    stem, ending = WEIGHTS_NAME.split(".")
    names = [f"{stem}-{number:05d}-of-{len(bins):05d}.{ending}" for number in range(1, len(bins) + 1)]
    return tuple(
        safetensors_file(name, held, METADATA)
        for name, held in zip([WEIGHTS_NAME] if len(bins) == 1 else names, bins, strict=True)
    )


def numbytes_of(text: str | int) -> int:
    """Return a number of bytes: ``5GB``, ``500MB``, ``1GiB``, or a whole number.

    Raises:
        ConfigError: it is none, or not above 0.
    """
    found = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", str(text))
    unit = None if found is None else _UNITS.get(found[2].upper())
    if found is None or unit is None or not int(found[1]):
        raise ConfigError(f"expected a size, such as 5GB, 500MB or 1GiB (found {text!r})")
    return int(found[1]) * unit


def _dtype_of(tensors: Mapping[str, StoredTensor]) -> str:
    """Return the type of most floating-point numbers, as configurations name it."""
    titles = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
    count = Counter({DTYPES["fp32"]: 0})
    for each in tensors.values():
        if each.dtype in titles:
            count[each.dtype] += prod(each.shape)
    return titles[max(count, key=lambda dtype: count[dtype])]


def _check_names(view: UniversalView) -> None:
    """Refuse names that no Hugging Face model has: ``from_pretrained`` would begin with random weights."""
    path, names = view.checkpoint.path, model_names(view).values()
    if adapters := adapters_in(view):
        raise UnsupportedError(
            f"{path} holds adapters of PEFT, which a plain model has no place for",
            adapters,
            "--adapter exports them; PEFT merges them: PeftModel.from_pretrained(base, folder).merge_and_unload()",
        )
    if odd := [name for name in names if _OF_PIPELINE.match(name)]:
        raise UnsupportedError(
            f"{path} has names of a pipeline's layers, not of a Hugging Face model",
            odd,
            "name a spec whose naming scheme gives the model's names: --spec FILE (docs/language.md, Naming schemes)",
        )


def _finish(
    view: UniversalView,
    tensors: Mapping[str, StoredTensor],
    files: Sequence[OutputFile],
    companions: Companions,
    folder: Path,
    sums: Sequence[FileSums],
) -> None:
    """Write what stands beside the weights, the index last. Open the files: what can't be opened must not be committed."""
    companions.write(folder)
    home: dict[str, str] = {}
    for file in files:
        with safe_open(folder / file.file_name, "pt") as opened:
            here = list(opened.keys())
            check_range(view, {name: tensors[name] for name in here}, opened.get_tensor)
            home |= dict.fromkeys(here, file.file_name)
    assert home.keys() == tensors.keys()
    if len(files) > 1:
        total = sum(tensor.numbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(home.items()))}
        (folder / WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
