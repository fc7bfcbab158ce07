"""``ucp inspect``: what a checkpoint holds, for people and, with ``--json``, for programs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ucp_deepspeed.checkpoint import Checkpoint, open_checkpoint
from ucp_deepspeed.checkpoint.checkpoint import Differing
from ucp_deepspeed.checkpoint.differing import in_words as in_words_by_place
from ucp_deepspeed.checkpoint.encoding import encode
from ucp_deepspeed.checkpoint.opening import tags_in
from ucp_deepspeed.checkpoint.torch_files.reading import TORCH_DTYPES
from ucp_deepspeed.checkpoint.universal.catalog import UniversalCheckpoint
from ucp_deepspeed.cli.options import (
    CHECKPOINT,
    command,
    degrees,
    in_words,
    numel_of,
    spec_option,
    state_bytes,
    tag_option,
    vocabulary_option,
)
from ucp_deepspeed.cli.plots import draw_sizes, plot_option
from ucp_deepspeed.cli.tables import collapsed, new_console, print_by_name, print_lines, print_plain
from ucp_deepspeed.errors import ConfigError
from ucp_deepspeed.language.globs import check_glob, compiled
from ucp_deepspeed.reading import OpenCheckpoint, ParameterInfo
from ucp_deepspeed.transfer.stage_copies import recorded_differing


@command(
    "inspect",
    examples=[
        "ucp inspect runs/a",
        "ucp inspect runs/a --tag global_step500 --match 'layers.0.**'",
        "ucp inspect runs/a --all",
        "ucp inspect runs/a --json",
        "ucp inspect runs/a --plot sizes.svg",
    ],
)
@click.argument("checkpoint", metavar="CKPT", type=CHECKPOINT)
@tag_option
@spec_option
@vocabulary_option
@click.option(
    "--match",
    metavar="GLOB",
    help="List only parameters whose name fits: * stands for one part of it, or a piece of one, ** for any number of parts.",
)
@click.option("--all", "every", is_flag=True, help="List the parameters of each layer, not of like layers together.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead, with each parameter.")
@plot_option
def inspect_command(
    checkpoint: Path,
    tag: str | None,
    spec: str | None,
    vocabulary_size: int | None,
    match: str | None,
    every: bool,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Show what checkpoint CKPT holds. Reads no tensors.

    CKPT is a tag folder, or a folder with tag folders in it.
    """
    opened = open_checkpoint(checkpoint, tag)
    opened.check_sizes()
    report = inspect_checkpoint(opened, spec, vocabulary_size)
    if match is not None:
        report["parameters"] = _matching(report, match)
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        _print(report, every)
    if plot is not None:
        draw_sizes(report, plot)


def inspect_checkpoint(checkpoint: Checkpoint, spec: str | None, vocabulary_size: int | None) -> dict[str, Any]:
    """The object that ``--json`` prints.

    Keys:
        path, form: the tag folder and what wrote it.
        topology: ``tp``, ``pp``, ``dp``, ``zero_stage``, ``ep`` of the files; source_topology: the same of the run that a
            universal checkpoint came from, else null.
        global_steps, global_samples, skipped_steps, precision, ds_version: of the run.
        lr_scheduler: its state, or null; loss_scale: ``dynamic`` and ``values``, or null. Values that JSON lacks are written
            as ``docs/format.md``, *Values*, says.
        optimizer_steps: the distinct values of the optimizer's ``step``, ascending.
        layouts: ``known``, and when not, ``reason``; then whole shapes are null and sizes are sums over the ranks' local
            tensors.
        vocabulary_size: rows of the unpadded vocabulary, or null.
        numel: number of elements for each kind: ``trainable``, ``frozen``, ``buffer``.
        state_bytes: size of each state over all parameters.
        disk_bytes, files, written: of the tag folder; when its newest file was written, in UTC.
        other_tags: that lie beside it.
        client_state: keys that the script gave to ``save_checkpoint``.
        groups: for each parameter group ``names``, ``hyperparameters``, and ``differing``: of these the ones that aren't the same
            on all partitions, with the value on each.
        differing_copies: parameters of which pipeline stages held different values, as a manifest records; else null.
        lacking: why the optimizer's state can't be told, or null; unrecorded: parameters whose value is in no file → why.
        parameters: for each, by logical name: ``kind``, ``shape`` (or null), ``local_shapes`` by model-parallel rank (null
            for a pipeline stage without it), ``pattern`` in words (or null), ``states`` (name → dtype), ``scalars``, and
            ``differing`` as for groups.
    """
    held = OpenCheckpoint(checkpoint, "auto" if spec is None else spec, vocabulary_size)
    parameters = {name: _parameter(parameter) for name, parameter in held.parameters.items()}
    files = [entry.stat() for entry in checkpoint.path.rglob("*") if entry.is_file()]
    steps = {float(entry.scalars["step"]) for entry in held.parameters.values() if "step" in entry.scalars}
    return {
        "path": str(checkpoint.path),
        "form": checkpoint.form,
        "topology": degrees(checkpoint.topology),
        "source_topology": degrees(held.saved_by) if isinstance(checkpoint, UniversalCheckpoint) else None,
        **_run(checkpoint),
        "optimizer_steps": sorted(int(step) if step.is_integer() else step for step in steps),
        "layouts": {
            "known": held.layouts_unknown is None,
            "reason": held.layouts_unknown and str(held.layouts_unknown),
        },
        "vocabulary_size": vocabulary_size or checkpoint.vocabulary_size,
        "numel": {
            kind: sum(numel_of(entry) for entry in parameters.values() if entry["kind"] == kind)
            for kind in ("trainable", "frozen", "buffer")
        },
        "state_bytes": state_bytes(parameters.values()),
        "disk_bytes": sum(file.st_size for file in files),
        "files": len(files),
        "written": datetime.fromtimestamp(max(file.st_mtime for file in files), timezone.utc).isoformat("T", "seconds"),
        "other_tags": _other_tags(checkpoint.path),
        "client_state": [str(key) for key in (*held.client_state, *held.unreadable)],
        "groups": [
            {
                "names": list(group.names),
                "hyperparameters": _json(dict(group.hyperparameters)),
                "differing": _differing(group.differing),
            }
            for group in held.groups
        ],
        "differing_copies": None if (differing := recorded_differing(checkpoint)) is None else list(differing),
        "lacking": held.lacking,
        "unrecorded": dict(checkpoint.unrecorded),
        "parameters": parameters,
    }


def _other_tags(folder: Path) -> list[str]:
    with suppress(OSError):  # what lies beside the tag is none of the checkpoint
        return [tag for tag in tags_in(folder.absolute().parent) if tag != folder.absolute().name]
    return []


def _matching(report: Mapping[str, Any], match: str) -> dict[str, Any]:
    """The parameters whose name a glob fits.

    Raises:
        ConfigError: it fits none, or isn't a glob.
    """
    try:
        check_glob(match)
    except ValueError as error:
        raise ConfigError(f"--match: {error}") from error
    glob = compiled(match)
    found = {name: entry for name, entry in report["parameters"].items() if glob.fullmatch(name)}
    if not found:
        wider = "" if "**" in match else f"; * stays between two dots: try --match '**{match.strip('*')}**'"
        if "{" in match:
            wider = f"; write * for numbers in braces: try --match '{re.sub(r'{[^}]*}', '*', match)}'"
        raise ConfigError(f"no parameter of {report['path']} fits {match!r}{wider}")
    return found


def _run(checkpoint: Checkpoint) -> dict[str, Any]:
    run = checkpoint.run
    scale = run.loss_scale
    return {
        "global_steps": run.global_steps,
        "global_samples": run.global_samples,
        "skipped_steps": run.skipped_steps,
        "precision": run.precision,
        "ds_version": run.ds_version,
        "lr_scheduler": _json(run.lr_scheduler),
        "loss_scale": {"dynamic": scale.dynamic, "values": _json(dict(scale.values))} if scale else None,
    }


def _parameter(parameter: ParameterInfo) -> dict[str, Any]:
    return {
        "kind": parameter.kind,
        "shape": None if parameter.shape is None else list(parameter.shape),
        "local_shapes": [None if shape is None else list(shape) for shape in parameter.local_shapes],
        "pattern": parameter.pattern,
        "states": {state: TORCH_DTYPES[dtype] for state, dtype in parameter.states.items()},
        "scalars": _json(dict(parameter.scalars)),
        "refused": dict(parameter.refused),
        "differing": _differing(parameter.differing),
    }


def _differing(differing: Differing) -> Any:
    return _json({key: dict(held) for key, held in differing.items()})


def _json(value: Any) -> Any:
    return encode(value, "value", {})


def _print(report: Mapping[str, Any], every: bool) -> None:
    console = new_console()
    print_lines(console, _lines(report), 17)
    _print_parameters(console, report, every)
    lines = [
        f"group {number}: {len(group['names'])} parameters, {_settings(group['hyperparameters'])}"
        for number, group in enumerate(report["groups"])
    ]
    lines += [f"{name} isn't in the files: {why}" for name, why in report["unrecorded"].items()]
    lines += [f"Weights only: {report['lacking']}"] if report["lacking"] else []
    lines += [f"differs over pipeline stages: {name}" for name in report["differing_copies"] or ()]
    lines += _differing_lines(report)
    lines += [] if report["layouts"]["known"] else [f"Local shapes only: {report['layouts']['reason']}"]
    for line in lines:
        print_plain(console, line)


def _lines(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and value of each line above the table."""
    topology = _topology_in_words(report["topology"])
    if report["source_topology"]:
        topology += f" (saved by {_topology_in_words(report['source_topology'])})"
    scale = report["loss_scale"]
    sizes = [f"{state} {in_words(size)}" for state, size in report["state_bytes"].items()]
    numels = [f"{numel:,} {kind}" for kind, numel in report["numel"].items() if numel]
    local = "" if report["layouts"]["known"] else " (sum over the ranks' local tensors)"
    return [
        ("path", report["path"]),
        ("form", f"{report['form']}, DeepSpeed {report['ds_version']}"),
        ("topology", topology),
        ("steps", f"{report['global_steps']}, {report['skipped_steps']} skipped, {report['global_samples']} samples"),
        ("optimizer step", ", ".join(map(str, report["optimizer_steps"])) or "none"),
        ("precision", report["precision"]),
        (
            "loss scale",
            f"{'dynamic' if scale['dynamic'] else 'static'} {_settings(scale['values'])}" if scale else "none",
        ),
        ("lr scheduler", _settings(report["lr_scheduler"]) if report["lr_scheduler"] else "none"),
        ("elements", (", ".join(numels) or "0") + local),
        ("states", (", ".join(sizes) or "none") + local),
        ("client state", ", ".join(report["client_state"]) or "none"),
        (
            "on disk",
            f"{in_words(report['disk_bytes'])} in {report['files']} files, written {_local(report['written'])}",
        ),
        ("other tags", _first(report["other_tags"], 8) or "none"),
    ]


def _local(written: str) -> str:
    """A time, as the clock here has it."""
    return datetime.fromisoformat(written).astimezone().isoformat(" ", "minutes")


def _differing_lines(report: Mapping[str, Any]) -> list[str]:
    """Lines on values that partitions disagree on, each once with the parameters that have it."""
    places: dict[str, list[str]] = {}
    for number, group in enumerate(report["groups"]):
        for key, held in group["differing"].items():
            places.setdefault(f"{key!r} is {in_words_by_place(held)}", []).append(f"group {number}")
    for name, entry in report["parameters"].items():
        for key, held in entry["differing"].items():
            places.setdefault(f"{key!r} is {in_words_by_place(held)}", []).append(name)
    return [f"differs over partitions: {_first(names, 3)}: {told}" for told, names in places.items()]


def _first(names: Sequence[str], count: int) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _topology_in_words(topology: Mapping[str, int]) -> str:
    return "TP{tp}·PP{pp}·DP{dp} ZeRO-{zero_stage}".format(**topology)


def _settings(values: Any) -> str:
    """Encoded values by name; what is no mapping, or one with keys of other kinds, as it is."""
    if not isinstance(values, dict) or any(key.startswith("$") for key in values):
        return _plain(values)
    return ", ".join(f"{key}={_plain(value)}" for key, value in values.items())


def _plain(value: Any) -> str:
    """An encoded value without the tag."""
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)).startswith("$"):
        value = next(iter(value.values()))
    return str(value)


def _print_parameters(console: Console, report: Mapping[str, Any], every: bool) -> None:
    sharded = report["topology"]["tp"] * report["topology"]["pp"] > 1
    rows = {name: _row(entry, sharded) for name, entry in report["parameters"].items()}
    if not rows:
        return
    shown = (
        {name: name for name in rows} if every else collapsed({name: (*row.values(),) for name, row in rows.items()})
    )
    note = "{0..3} stands for the numbers 0 to 3; --all lists each parameter" if len(shown) < len(rows) else ""
    optional = ("scalars", "local shapes", "states", "pattern", "kind")
    print_by_name(console, [{"parameter": title} | rows[name] for title, name in shown.items()], optional, note)


def _row(entry: Mapping[str, Any], sharded: bool) -> dict[str, str]:
    """Cells of a parameter in the table, by heading."""
    return {
        "kind": entry["kind"],
        "shape": str(entry["shape"]) if entry["shape"] is not None else "unknown",
        **({"local shapes": _local_shapes(entry["local_shapes"])} if sharded else {}),
        "pattern": entry["pattern"] or "unknown",
        "states": ", ".join(f"{state} {dtype}" for state, dtype in entry["states"].items()),
        "scalars": _settings(entry["scalars"]),
    }


def _local_shapes(shapes: list[list[int] | None]) -> str:
    """``4 × [8, 16]`` when all ranks that hold it have the same."""
    held = [shape for shape in shapes if shape is not None]
    if all(shape == held[0] for shape in held):
        return f"{len(held)} × {held[0]}"
    return ", ".join(map(str, held))
