"""``ucp inspect``: content of a checkpoint, for people and, with ``--json``, for programs."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ucp_deepspeed.checkpoint import Checkpoint, open_checkpoint
from ucp_deepspeed.checkpoint.bounds import misshapen
from ucp_deepspeed.checkpoint.differing import in_words as in_words_by_place
from ucp_deepspeed.checkpoint.encoding import encode
from ucp_deepspeed.checkpoint.opening import warn_of_sums_alone
from ucp_deepspeed.checkpoint.tags import tags_in
from ucp_deepspeed.checkpoint.torch_files.safe_load import TORCH_DTYPES
from ucp_deepspeed.checkpoint.universal.index import UniversalCheckpoint, home_of
from ucp_deepspeed.cli.printing import (
    Row,
    collapsed,
    in_words,
    numel_of,
    print_json,
    print_labelled,
    print_lines,
    print_rows,
    state_bytes,
)
from ucp_deepspeed.errors import ConfigError, UnsupportedError
from ucp_deepspeed.language.globs import check_glob, compiled
from ucp_deepspeed.reading import OpenCheckpoint, ParameterInfo
from ucp_deepspeed.remote import located
from ucp_deepspeed.transfer.planning.policies import some_names
from ucp_deepspeed.transfer.stage_copies import recorded_differing


def show(
    checkpoint: Path,
    tag: str | None,
    spec: str | None,
    vocabulary_size: int | None,
    match: str | None,
    every: bool,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Do what ``ucp inspect`` says."""
    opened = open_checkpoint(checkpoint, tag)
    warn_of_sums_alone(opened)
    opened.check_sizes()
    report = inspect_checkpoint(opened, spec, vocabulary_size)
    if match is not None:
        report["parameters"] = _matching(report, match)
    if as_json:
        print_json(report)
    else:
        _print(report, every)
    if plot is not None:
        from ucp_deepspeed.cli.plots import draw_sizes

        draw_sizes(report, plot)


def inspect_checkpoint(checkpoint: Checkpoint, spec: str | None, vocabulary_size: int | None) -> dict[str, Any]:
    """Return the object that ``--json`` prints; ``docs/json.md`` lists its keys."""
    held = OpenCheckpoint(checkpoint, "auto" if spec is None else spec, vocabulary_size)
    run, scale, unknown = checkpoint.run, checkpoint.run.loss_scale, held.layouts_unknown
    parameters = {name: _parameter(parameter) for name, parameter in held.parameters.items()}
    files = [entry.stat() for entry in checkpoint.path.rglob("*") if entry.is_file()]
    differing_copies = recorded_differing(checkpoint)
    return {
        "path": str(checkpoint.path),
        "form": checkpoint.form,
        "topology": asdict(checkpoint.topology),
        "source_topology": asdict(held.saved_by) if isinstance(checkpoint, UniversalCheckpoint) else None,
        **{key: getattr(run, key) for key in ("global_steps", "global_samples", "skipped_steps")},
        "precision": run.precision,
        "ds_version": run.ds_version,
        "lr_scheduler": _json(run.lr_scheduler),
        "loss_scale": {"dynamic": scale.dynamic, "values": _json(scale.values)} if scale else None,
        "optimizer_steps": _steps(held),
        "layouts": {"known": unknown is None, "reason": unknown and str(unknown)},
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
        "client_state": [_name(key) for key in (*held.client_state, *held.unreadable)],
        "groups": [
            {
                "names": list(group.names),
                "hyperparameters": _json(group.hyperparameters),
                "differing": _json(group.differing),
            }
            for group in held.groups
        ],
        "differing_copies": None if differing_copies is None else list(differing_copies),
        "lacking": held.lacking,
        "unrecorded": dict(checkpoint.unrecorded),
        "parameters": parameters,
    }


def _parameter(parameter: ParameterInfo) -> dict[str, Any]:
    return {
        "kind": parameter.kind,
        "shape": None if parameter.shape is None else list(parameter.shape),
        "local_shapes": [None if shape is None else list(shape) for shape in parameter.local_shapes],
        "pattern": parameter.pattern,
        "states": {_name(state): TORCH_DTYPES[dtype] for state, dtype in parameter.states.items()},
        "scalars": _json(parameter.scalars),
        "refused": {_name(state): why for state, why in parameter.refused.items()},
        "differing": _json(parameter.differing),
    }


def _steps(held: OpenCheckpoint) -> list[Any]:
    """Return the numbers of steps that the optimizer has taken, in order; a strange one as a text, behind the others."""
    found = {entry.scalars["step"] for entry in held.parameters.values() if "step" in entry.scalars}
    sound = {step for step in found if isinstance(step, int | float) and abs(step) < 2**63}
    return [*sorted(int(step) if step == int(step) else step for step in sound), *sorted(map(_told, found - sound))]


def _json(value: Any) -> Any:
    """Return a value as `encode` does; in the place of one without a form what it looks like, shortened."""
    try:
        encoded = encode(value, "value", {})
        json.dumps(encoded)  # a number may have too many digits
        return encoded
    except (UnsupportedError, ValueError, RecursionError):
        if isinstance(value, Mapping) and misshapen(value) is None:
            return {_name(key): _json(item) for key, item in value.items()}
        return {"$shown": _told(value)}


def _name(key: Any) -> str:
    """Return a key as a text."""
    return key if isinstance(key, str) else _told(key)


def _told(value: Any) -> str:
    """Return what a value looks like, shortened."""
    try:
        return reprlib.repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"


def _other_tags(folder: Path) -> list[str]:
    with suppress(OSError):  # what lies beside the tag is none of the checkpoint
        own = home_of(folder.absolute())
        return [tag for tag in tags_in(own.parent) if tag != own.name]
    return []


def _matching(report: Mapping[str, Any], match: str) -> dict[str, Any]:
    """Return the parameters whose name a glob fits; there must be some."""
    try:
        check_glob(match)
    except ValueError as error:
        raise ConfigError(f"--match: {error}") from error
    glob = compiled(match)
    found = {name: entry for name, entry in report["parameters"].items() if glob.fullmatch(name)}
    if not found:
        tried = {
            re.sub(r"{[^}]*}", "*", match): "write * for numbers in braces",
            re.sub(r"\*{3,}", "**", f"**{match.strip('*')}**"): "* stays between two dots",
        }
        fitting = (glob for glob in tried if any(map(compiled(glob).fullmatch, report["parameters"])))
        wider = next((f"{tried[glob]}: try --match '{glob}'" for glob in fitting), "without --match all are listed")
        raise ConfigError(f"no parameter of {report['path']} fits {match!r}; {wider}")
    return found


def _print(report: Mapping[str, Any], every: bool) -> None:
    print_labelled(_labelled(report).items(), 17)
    _print_parameters(report, every)
    print_lines(
        *(
            f"group {number}: {len(group['names'])} parameters, {_settings(group['hyperparameters'])}"
            for number, group in enumerate(report["groups"])
        ),
        *(f"{name} isn't in the files: {why}" for name, why in report["unrecorded"].items()),
        *([f"Weights only: {report['lacking']}"] if report["lacking"] else []),
        *(f"differs over pipeline stages: {name}" for name in report["differing_copies"] or ()),
        *_differing_lines(report),
        *([] if report["layouts"]["known"] else [f"Local shapes only: {report['layouts']['reason']}"]),
    )


def _labelled(report: Mapping[str, Any]) -> dict[str, str]:
    """Return label and value of each line above the table."""
    form = "TP{tp}·PP{pp}·DP{dp} ZeRO-{zero_stage}"
    topology = form.format_map(report["topology"])
    if report["source_topology"]:
        topology += f" (saved by {form.format_map(report['source_topology'])})"
    scale = report["loss_scale"]
    sizes = [f"{state} {in_words(size)}" for state, size in report["state_bytes"].items()]
    numels = [f"{numel:,} {kind}" for kind, numel in report["numel"].items() if numel]
    local = "" if report["layouts"]["known"] else " (sum over the ranks' local tensors)"
    path = located(report["path"])
    aside = "" if home_of(path) == path else f": the tag {home_of(path).name}, since a save of it was interrupted"
    written = datetime.fromisoformat(report["written"]).astimezone().isoformat(" ", "minutes")
    return {
        "path": f"{path}{aside}",
        "form": report["form"] + (f", DeepSpeed {report['ds_version']}" if report["ds_version"] else ""),
        "topology": topology,
        "steps": f"{report['global_steps']}, {report['skipped_steps']} skipped, {report['global_samples']} samples",
        "optimizer step": ", ".join(map(str, report["optimizer_steps"])) or "none",
        "precision": report["precision"],
        "loss scale": f"{'dynamic' if scale['dynamic'] else 'static'} {_settings(scale['values'])}"
        if scale
        else "none",
        "lr scheduler": _settings(report["lr_scheduler"]) if report["lr_scheduler"] else "none",
        "elements": (", ".join(numels) or "0") + local,
        "states": (", ".join(sizes) or "none") + local,
        "client state": ", ".join(report["client_state"]) or "none",
        "on disk": f"{in_words(report['disk_bytes'])} in {report['files']} files, written {written}",
        "other tags": some_names(report["other_tags"], 8) if report["other_tags"] else "none",
    }


def _differing_lines(report: Mapping[str, Any]) -> list[str]:
    """Return lines on values that partitions disagree on, each once with the parameters that have it."""
    places: dict[str, list[str]] = {}
    entries = [(f"group {number}", group) for number, group in enumerate(report["groups"])]
    for name, entry in (*entries, *report["parameters"].items()):
        for key, held in entry["differing"].items():
            places.setdefault(f"{key!r} is {in_words_by_place(held)}", []).append(name)
    return [f"differs over partitions: {some_names(names)}: {told}" for told, names in places.items()]


def _settings(values: Any) -> str:
    """Write encoded values by name. A value that is no mapping, or has keys of other kinds, stays as it is."""
    if not isinstance(values, dict) or any(key.startswith("$") for key in values):
        return _plain(values)
    return ", ".join(f"{key}={_plain(value)}" for key, value in values.items())


def _plain(value: Any) -> str:
    """Write an encoded value without its tag."""
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)).startswith("$"):
        value = next(iter(value.values()))
    return str(value)


def _print_parameters(report: Mapping[str, Any], every: bool) -> None:
    sharded = report["topology"]["tp"] * report["topology"]["pp"] > 1
    rows = {name: _row(entry, sharded) for name, entry in report["parameters"].items()}
    shown = (
        {name: name for name in rows} if every else collapsed({name: (*row.values(),) for name, row in rows.items()})
    )
    joined = next((re.findall(r"{.+?}", title)[0] for title, name in shown.items() if title != name), "")
    numbers = joined.strip("{}").replace("..", " to ").replace(",", ", ")
    print_rows(
        [{"parameter": title, **rows[name]} for title, name in shown.items()],
        ("scalars", "local shapes", "states", "pattern", "kind"),
        f"{joined} stands for the numbers {numbers}; --all lists each parameter" if joined else "",
    )


def _row(entry: Mapping[str, Any], sharded: bool) -> Row:
    """Return the cells of a parameter in the table, by heading."""
    held = [shape for shape in entry["local_shapes"] if shape is not None]
    local = f"{len(held)} × {held[0]}" if held == held[:1] * len(held) else ", ".join(map(str, held))
    return {
        "kind": entry["kind"],
        "shape": str(entry["shape"]) if entry["shape"] is not None else "unknown",
        **({"local shapes": local} if sharded else {}),
        "pattern": entry["pattern"] or "unknown",
        "states": ", ".join(f"{state} {dtype}" for state, dtype in entry["states"].items()),
        "scalars": _settings(entry["scalars"]),
    }
