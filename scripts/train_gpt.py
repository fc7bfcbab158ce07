"""Train a small Megatron-Core GPT under DeepSpeed, stop, and go on with other numbers of ranks.

    deepspeed --num_accelerators 4 scripts/train_gpt.py --tp 2 --zero 1 --steps 20 --save runs/a
    deepspeed --num_accelerators 2 scripts/train_gpt.py --tp 1 --zero 3 --steps 40 --load runs/a --save runs/b
    deepspeed --num_accelerators 4 scripts/train_gpt.py --tp 2 --pp 2 --zero 1 --steps 60 --load runs/b

The batch of a step depends only on the step and the global batch size, and the initial weights only on the seed, so the
losses of a step can be compared across topologies. Runs on GPUs, and without any on CPU ranks (``DS_ACCELERATOR=cpu``).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.engine import PipelineEngine
from megatron.core import parallel_state

import ucp_deepspeed  # noqa: F401  (its import is what turns the config block into universal checkpointing)
from ucp_deepspeed.megatron import DeepSpeedMpu
from ucp_deepspeed.testing.megatron_cpu import run_megatron_on_cpu
from ucp_deepspeed.testing.megatron_models import (
    MegatronGptSize,
    build_megatron_gpt,
    gpt_flavour,
    llama_flavour,
    mean_loss,
)
from ucp_deepspeed.testing.megatron_pipeline import build_megatron_pipeline

TEXT = Path(__file__).parent / "data" / "lower_quay.txt"
VOCABULARY = 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_arguments() -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    run = parser.add_argument_group("run")
    run.add_argument("--steps", type=int, default=20, help="step to train to, counted from the first run")
    run.add_argument("--save", metavar="DIR", help="save a checkpoint here at the end")
    run.add_argument("--save-every", type=int, default=0, metavar="N", help="and every N steps")
    run.add_argument("--load", metavar="DIR", help="go on from the latest checkpoint here")
    run.add_argument("--tag", help="go on from this checkpoint of --load instead of the latest")
    run.add_argument("--log", metavar="FILE", help="append one JSON line per step")
    run.add_argument("--print-every", type=int, default=5, metavar="N", help="steps between printed lines")
    topology = parser.add_argument_group("topology")
    topology.add_argument("--tp", type=positive, default=1, help="tensor parallel degree")
    topology.add_argument(
        "--pp", type=positive, help="pipeline parallel degree, 1 too; without it the model is a plain one"
    )
    topology.add_argument("--zero", type=int, default=1, choices=range(4), help="ZeRO stage; up to 1 with --pp")
    topology.add_argument("--precision", default="bf16", choices=DTYPES)
    topology.add_argument("--spec", default="auto", help="parameter patterns: auto, a family's name or a spec file")
    topology.add_argument("--load-mode", default="auto", choices=("auto", "always", "never"), help="universal loading")
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="llama", choices=("llama", "gpt"))
    model.add_argument("--layers", type=positive, default=4)
    model.add_argument("--hidden", type=positive, default=192)
    model.add_argument("--heads", type=positive, default=8)
    model.add_argument(
        "--query-groups", type=positive, help="key/value heads (default: 4 for llama, one per head for gpt)"
    )
    model.add_argument("--ffn", type=positive, default=512)
    model.add_argument(
        "--tied", default="auto", choices=("auto", "yes", "no"), help="output layer is the embedding (auto: gpt)"
    )
    model.add_argument("--sequence", type=positive, default=64, help="tokens (bytes) per sequence")
    model.add_argument("--seed", type=int, default=1)
    training = parser.add_argument_group("training")
    training.add_argument("--global-batch", type=positive, default=8, help="sequences per step, over all ranks")
    training.add_argument(
        "--micro-batch", type=positive, help="sequences per rank at a time (default: all of its share)"
    )
    training.add_argument("--lr", type=float, default=2e-3)
    training.add_argument("--warmup", type=int, default=10, help="steps until the full learning rate")
    training.add_argument("--decay", type=int, default=400, help="steps until the learning rate is zero again")
    training.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher adds it
    return parser.parse_args()


def positive(text: str) -> int:
    """A number that is at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {text}")
    return value


def check(arguments: argparse.Namespace) -> None:
    """Say in one line what DeepSpeed or Megatron-Core would refuse with a traceback on every rank."""
    ranks, model_parallel = int(os.environ["WORLD_SIZE"]), arguments.tp * (arguments.pp or 1)
    size = model_size(arguments)
    cut = {"--heads": size.heads, "--query-groups": size.query_groups, "--ffn": size.ffn}
    problems = [
        f"--tp {arguments.tp} doesn't divide {what} {number}" for what, number in cut.items() if number % arguments.tp
    ]
    if ranks % model_parallel:
        problems.append(f"{ranks} ranks are not divisible by --tp x --pp, {model_parallel}")
    elif arguments.global_batch % (ranks // model_parallel):
        problems.append(
            f"--global-batch {arguments.global_batch} is not divisible by the data parallel degree {ranks // model_parallel}"
        )
    if arguments.pp is not None and arguments.zero > 1:
        problems.append(f"DeepSpeed has no --zero {arguments.zero} with --pp {arguments.pp}; 0 and 1 it has")
    if DTYPES[arguments.precision] not in get_accelerator().supported_dtypes():
        problems.append(f"--precision {arguments.precision} is not supported on {get_accelerator().device_name()}")
    if problems:
        raise SystemExit("\n".join(problems))


def start_ranks(tensor_parallel: int, pipeline_parallel: int) -> torch.device:
    """Start communication and Megatron-Core's process groups; ranks beyond both degrees are data parallel. Returns the device."""
    run_megatron_on_cpu()
    accelerator = get_accelerator()
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
    accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    parallel_state.initialize_model_parallel(tensor_parallel, pipeline_model_parallel_size=pipeline_parallel)
    return torch.device(accelerator.current_device_name())


def model_size(arguments: argparse.Namespace) -> MegatronGptSize:
    """Shape and flavour that the command line asks for."""
    flavour = {"llama": llama_flavour, "gpt": gpt_flavour}[arguments.model]
    return flavour(
        layers=arguments.layers,
        hidden=arguments.hidden,
        heads=arguments.heads,
        query_groups=arguments.query_groups or (4 if arguments.model == "llama" else arguments.heads),
        ffn=arguments.ffn,
        vocabulary=VOCABULARY,
        sequence=arguments.sequence,
        tied={"auto": arguments.model == "gpt", "yes": True, "no": False}[arguments.tied],
    )


def deepspeed_config(arguments: argparse.Namespace) -> dict[str, Any]:
    """The DeepSpeed config of the run."""
    share = arguments.global_batch // parallel_state.get_data_parallel_world_size()
    config: dict[str, Any] = {
        "train_batch_size": arguments.global_batch,
        "train_micro_batch_size_per_gpu": arguments.micro_batch or share,
        "gradient_clipping": arguments.clip,
        "steps_per_print": 2**31,
        "zero_optimization": {"stage": arguments.zero},
        "optimizer": {
            "type": "AdamW",
            "params": {"torch_adam": True, "lr": arguments.lr, "betas": [0.9, 0.95], "weight_decay": 0.1},
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "total_num_steps": arguments.decay,
                "warmup_max_lr": arguments.lr,
                "warmup_num_steps": arguments.warmup,
                "warmup_type": "linear",
            },
        },
        "universal_checkpoint": {
            "enabled": True,
            "spec": arguments.spec,
            "load": arguments.load_mode,
            "vocabulary_size": VOCABULARY,
        },
    }
    if arguments.zero == 3:
        # The memory-efficient linear layer rounds differently in bf16: losses would not compare with other stages.
        config["zero_optimization"]["memory_efficient_linear"] = False
        # By default parameters this small stay whole on every rank, and nothing would be partitioned.
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 1000
    if arguments.precision != "fp32":
        config[arguments.precision] = {"enabled": True}
    if arguments.precision == "fp16":
        config["fp16"]["initial_scale_power"] = 8
    return config


def read_tokens() -> torch.Tensor:
    """The training text as int64 byte values, shape ``[bytes]``."""
    return torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()


def micro_batches(tokens: torch.Tensor, step: int, arguments: argparse.Namespace, micro: int) -> Iterator[torch.Tensor]:
    """This rank's share of a step's batch, as int64 tensors of shape ``[micro, sequence + 1]``.

    The global batch is drawn from the step's number alone and then cut over the data parallel ranks.
    """
    generator = torch.Generator().manual_seed(1_000_003 * arguments.seed + step)
    last_start = len(tokens) - arguments.sequence - 1
    starts = torch.randint(0, last_start + 1, (arguments.global_batch, 1), generator=generator)
    batch = tokens[starts + torch.arange(arguments.sequence + 1)]
    share = batch.chunk(parallel_state.get_data_parallel_world_size())[parallel_state.get_data_parallel_rank()]
    yield from share.split(micro)


def train_step(engine: deepspeed.DeepSpeedEngine, batches: Iterator[torch.Tensor]) -> float:
    """One optimizer step; returns the loss of the global batch before it, the mean over all data parallel ranks."""
    if isinstance(engine, PipelineEngine):
        return float(engine.train_batch((batch[:, :-1], batch[:, 1:]) for batch in batches))
    losses = []
    for batch in batches:
        loss = mean_loss(engine, batch.to(engine.device))
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    total = torch.stack(losses).mean()
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return float(total) / parallel_state.get_data_parallel_world_size()


def train(engine: deepspeed.DeepSpeedEngine, arguments: argparse.Namespace) -> None:
    """Train from the engine's step to the last one, logging and saving on the way."""
    tokens = read_tokens()
    while engine.global_steps < arguments.steps:
        started = time.perf_counter()
        step = engine.global_steps + 1
        rate = engine.get_lr()[0]
        loss = train_step(engine, micro_batches(tokens, step, arguments, engine.train_micro_batch_size_per_gpu()))
        report(arguments, {"step": step, "loss": loss, "lr": rate, "seconds": time.perf_counter() - started})
        if arguments.save and arguments.save_every and step % arguments.save_every == 0 and step < arguments.steps:
            engine.save_checkpoint(arguments.save)
    if arguments.save:
        engine.save_checkpoint(arguments.save)


def report(arguments: argparse.Namespace, entry: dict[str, Any]) -> None:
    """On the first rank: append a step's numbers to the log file, and print them every few steps."""
    if dist.get_rank() != 0:
        return
    if arguments.log:
        with Path(arguments.log).open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
    if entry["step"] == 1 or entry["step"] % arguments.print_every == 0 or entry["step"] == arguments.steps:
        print("step {step:4d}  loss {loss:.5f}  lr {lr:.2e}  {seconds:.2f} s".format(**entry), flush=True)


def report_resume(engine: deepspeed.DeepSpeedEngine, arguments: argparse.Namespace, path: str, seconds: float) -> None:
    """On the first rank: log what was loaded and, after a universal load, the bytes that all ranks read together."""
    loaded = getattr(engine, "universal_checkpoint_report", None)
    numbytes = torch.tensor(loaded.bytes_read if loaded else 0)
    dist.all_reduce(numbytes)
    if dist.get_rank() != 0:
        return
    print(f"loaded {path} at step {engine.global_steps}", flush=True)
    if arguments.log:
        entry = {"event": "resumed", "step": engine.global_steps, "bytes_read": int(numbytes), "seconds": seconds}
        with Path(arguments.log).open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")


def main() -> None:
    """Build the model and the engine, load if asked to, train, save if asked to."""
    arguments = parse_arguments()
    check(arguments)
    start_ranks(arguments.tp, arguments.pp or 1)
    size, dtype = model_size(arguments), DTYPES[arguments.precision]
    if arguments.pp is None:
        model, mpu = build_megatron_gpt(size, dtype, arguments.seed), DeepSpeedMpu()
    else:
        model, mpu = build_megatron_pipeline(size, arguments.pp, dtype, arguments.seed), None  # it brings its own
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=parameters, config=deepspeed_config(arguments), mpu=mpu
    )
    if arguments.load:
        started = time.perf_counter()
        path, _ = engine.load_checkpoint(arguments.load, tag=arguments.tag)
        if path is None:
            raise SystemExit(f"no checkpoint to load in {arguments.load}")
        report_resume(engine, arguments, path, time.perf_counter() - started)
    train(engine, arguments)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
