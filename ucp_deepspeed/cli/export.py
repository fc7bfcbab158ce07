"""``ucp export``: the weights of any checkpoint → what Hugging Face's libraries, torch or PEFT load."""

from __future__ import annotations

import time
from pathlib import Path

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.differing import OnDiffering
from ucp_deepspeed.checkpoint.export import HuggingFaceOutput, WeightsSource, left_out
from ucp_deepspeed.checkpoint.export.companions import CONFIG_NAME
from ucp_deepspeed.checkpoint.opening import warn_of_sums_alone
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.cli.printing import echo, in_words
from ucp_deepspeed.cli.progress import shown_progress
from ucp_deepspeed.errors import ConfigError
from ucp_deepspeed.language import load_spec
from ucp_deepspeed.transfer.conversion import convert
from ucp_deepspeed.transfer.exporting import Export, Form, check_apart


def write(
    source: Path,
    destination: Path,
    to: Form,
    adapter: bool,
    dtype: str | None,
    numbers: WeightsSource | None,
    max_shard_size: str,
    config_from: Path | None,
    tag: str | None,
    spec: str | None,
    vocabulary_size: int | None,
    on_differing: OnDiffering,
    workers: int,
    quiet: bool,
) -> None:
    """Do what ``ucp export`` says."""
    started = time.monotonic()
    if adapter and to == "torch":
        raise ConfigError("--adapter writes what PEFT loads, which --to torch isn't; leave one of them out")
    form: Form = "adapter" if adapter else to
    named = None if spec is None else load_spec(spec)
    output = Export(form, dtype, numbers, max_shard_size, config_from, named, on_differing).output()
    checkpoint = open_checkpoint(source, tag)
    warn_of_sums_alone(checkpoint)
    check_apart(checkpoint, destination)
    view = UniversalView.of(checkpoint, named, vocabulary_size)
    if not quiet:
        echo(f"left out: {', '.join(left_out(view))}", err=True)
        for note in output.notes(view):
            echo(note, err=True)
    with shown_progress("export", quiet) as progress:
        count = convert(view, destination, output, workers=workers, progress=progress)
    if isinstance(output, HuggingFaceOutput) and not (destination / CONFIG_NAME).is_file():
        echo(
            f"no {CONFIG_NAME} was found beside {checkpoint.path}: from_pretrained needs one in {destination}; --config-from "
            f"names a folder that has it",
            err=True,
        )
    if not quiet:
        sizes = [entry.stat().st_size for entry in destination.rglob("*") if entry.is_file()]
        echo(
            f"{destination}: read {in_words(count.bytes_read)} from {len(count.files)} files, wrote {in_words(sum(sizes))} "
            f"to {len(sizes)} files in {time.monotonic() - started:.1f} s"
        )
