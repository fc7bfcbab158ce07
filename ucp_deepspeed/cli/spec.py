"""``ucp spec``: writing spec files, and holding them against checkpoints."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from ucp_deepspeed.checkpoint import Checkpoint, open_checkpoint
from ucp_deepspeed.checkpoint.view import held_shapes, layouts_of, parameter_names
from ucp_deepspeed.cli import HELP, SuggestingGroup
from ucp_deepspeed.cli.options import CHECKPOINT, command, tag_option, vocabulary_option
from ucp_deepspeed.cli.plots import draw_parameter, plot_option
from ucp_deepspeed.cli.progress import shown_progress
from ucp_deepspeed.cli.tables import box_in_words, new_console, new_table, print_by_name, print_lines, print_plain
from ucp_deepspeed.errors import ConfigError, MismatchError, SpecError, UnsupportedError
from ucp_deepspeed.language import (
    Detection,
    Match,
    Spec,
    find_family,
    load_spec,
    logical_names,
    naming_specs,
    spec_names,
)
from ucp_deepspeed.language.inference import Guess, spec_text
from ucp_deepspeed.language.resolve import describe
from ucp_deepspeed.language.schema import spec_schema
from ucp_deepspeed.language.schemes import best_scheme
from ucp_deepspeed.layout import Box, Layout
from ucp_deepspeed.layout.layout import NOTHING
from ucp_deepspeed.transfer.evidence.checks import Checked, SpecCheck, check_spec
from ucp_deepspeed.transfer.evidence.inferring import infer_by_comparison, infer_from_record

WRONG = 1
"""Exit status of a check that found something."""


@click.group("spec", cls=SuggestingGroup, context_settings=HELP)
def spec_command() -> None:
    """Write spec files, which say how parameters are sharded, and hold them against checkpoints."""


@command("list", examples=["ucp spec list", "ucp spec list --against runs/a"])
@click.option("--against", type=CHECKPOINT, metavar="CKPT", help="A checkpoint: say how well each family fits it.")
@tag_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def list_command(against: Path | None, tag: str | None, as_json: bool) -> None:
    """List the families that come with the package. With --against, say how well each fits a checkpoint's names and shapes.

    Exit status with --against: 0 when one family fits, else 1.
    """
    if against is not None:
        _detect(open_checkpoint(against, tag), as_json)
        return
    specs = [load_spec(name) for name in spec_names()]
    if as_json:
        click.echo(json.dumps({spec.family: spec.description for spec in specs}, indent=1))
        return
    table = new_table("family", "rules", "description")
    for spec in specs:
        table.add_row(spec.family, str(len(spec.rules)), escape(spec.description))
    new_console().print(table)


def _detect(checkpoint: Checkpoint, as_json: bool) -> None:
    """Print how well families fit. ``--json`` prints ``path``; ``confidence``, ``disagreement`` and ``unconfirmed`` of
    `ucp_deepspeed.language.families.Detection`; ``families``, best first, each with ``coverage``, ``fits``, ``why``."""
    own = parameter_names(checkpoint)
    names = logical_names(list(checkpoint.parameters), naming_specs(None, own), checkpoint.logical_names)
    found = find_family([names[name] for name in own], held_shapes(checkpoint, {name: names[name] for name in own}))
    if as_json:
        report = {
            "path": str(checkpoint.path),
            "confidence": found.confidence,
            "disagreement": list(found.disagreement),
            "unconfirmed": list(found.unconfirmed),
            "families": {
                one.spec.family: {"coverage": one.coverage, "fits": one.fits, "why": str(one)}
                for one in found.candidates
            },
        }
        click.echo(json.dumps(report, indent=1))
    else:
        _print_detection(found)
    if found.confidence in ("ambiguous", "none"):
        raise click.exceptions.Exit(WRONG)


def _print_detection(found: Detection) -> None:
    console = new_console()
    verdict = {
        "shapes": "one family fits, and shapes confirm it",
        "names": "one family fits by names; no shape confirms it",
        "ambiguous": "several families fit and disagree: name one",
        "none": "no family fits",
    }
    console.print(verdict[found.confidence], soft_wrap=True)
    for candidate in found.candidates:
        print_plain(console, f"  {candidate}")
    for label, names in (("disagree on", found.disagreement), ("not confirmed by shapes", found.unconfirmed)):
        if names:
            print_plain(console, f"note: {label}: {', '.join(names)}")


@command(
    "check",
    examples=[
        "ucp spec check megatron_core_gpt --against runs/a",
        "ucp spec check mine.yaml --against runs/tp2 --single-rank runs/tp1",
    ],
)
@click.argument("spec", metavar="FILE|FAMILY")
@click.option("--against", type=CHECKPOINT, metavar="CKPT", required=True, help="The checkpoint to hold it against.")
@tag_option
@vocabulary_option
@click.option(
    "--single-rank",
    type=CHECKPOINT,
    metavar="CKPT",
    help="A checkpoint of the same model without tensor parallelism. Its shapes are compared; if it is of the same state, its "
    "values too.",
)
@click.option("--no-values", is_flag=True, help="Read no tensors.")
@click.option("--strict", is_flag=True, help="Remarks count as wrong.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def check_command(
    spec: str,
    against: Path,
    tag: str | None,
    vocabulary_size: int | None,
    single_rank: Path | None,
    no_values: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Hold a spec against a checkpoint. Compares names, shapes, values, and what was recorded when saving.

    Exit status: 0 when nothing contradicts the spec, 1 when something does, 2 when nobody can tell.
    """
    loaded, checkpoint = load_spec(spec), open_checkpoint(against, tag)
    whole = open_checkpoint(single_rank) if single_rank is not None else None
    with shown_progress("spec check") as progress:
        check = check_spec(
            loaded,
            checkpoint,
            vocabulary_size=vocabulary_size,
            values=not no_values,
            whole=whole,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps(_check_report(loaded, checkpoint, check), indent=1))
    else:
        _print_check(loaded, checkpoint, check)
    if not check.sound or (strict and check.findings):
        raise click.exceptions.Exit(WRONG)


def _check_report(spec: Spec, checkpoint: Checkpoint, check: SpecCheck) -> dict[str, Any]:
    """The object that ``--json`` prints.

    Keys:
        spec, path: the family, and the checkpoint's tag folder.
        sound: whether nothing contradicts the spec.
        parameters: by logical name: ``own_name`` in the checkpoint, ``rules`` (for each rule that it matches its number from 0,
            the glob that fits, its line and the pattern in words), ``local_shapes``, ``shape`` (or null).
        findings: ``parameter``, ``what`` (see `ucp_deepspeed.transfer.evidence.checks.What`), ``wrong``, ``detail``.
        unused: globs that fit nothing: ``rule``, ``glob``, ``line``.
        values_compared: number of parameters of which several ranks' values were compared.
        single_rank: ``no``, ``shapes`` or ``values``: what was compared with the checkpoint of a single rank.
    """
    return {
        "spec": spec.family,
        "path": str(checkpoint.path),
        "sound": check.sound,
        "parameters": {
            checked.name: {
                "own_name": checked.own_name,
                "rules": [_match(match) | {"pattern": describe(match.pattern)} for match in checked.matches],
                "local_shapes": [None if shape is None else list(shape) for shape in checked.local_shapes],
                "shape": list(checked.layout.logical_shape) if checked.layout else None,
            }
            for checked in check.parameters
        },
        "findings": [
            {"parameter": one.name, "what": one.what, "wrong": one.wrong, "detail": one.detail}
            for one in check.findings
        ],
        "unused": [_match(match) for match in check.unused],
        "values_compared": check.values_compared,
        "single_rank": check.whole_compared,
    }


def _match(match: Match) -> dict[str, Any]:
    return {"rule": match.rule, "glob": match.glob, "line": match.line}


def _print_check(spec: Spec, checkpoint: Checkpoint, check: SpecCheck) -> None:
    console = new_console()
    wrong = [finding for finding in check.findings if finding.wrong]
    remarks = [finding for finding in check.findings if not finding.wrong]
    verdict = "nothing contradicts it" if check.sound else f"{len(wrong)} contradiction{'s' if len(wrong) > 1 else ''}"
    single = {"no": "", "shapes": ", shapes of a single rank", "values": ", shapes and values of a single rank"}
    lines = [
        ("spec", spec.family),
        ("against", f"{checkpoint.path}: {checkpoint.form}, {checkpoint.topology}"),
        ("verdict", verdict),
        (
            "compared",
            f"names and shapes of {len(check.parameters)} parameters, values of {check.values_compared}"
            f"{single[check.whole_compared]}",
        ),
    ]
    print_lines(console, lines)
    for finding in wrong:
        print_plain(console, f"  {finding}")
    if check.parameters:
        print_by_name(console, [_check_row(checked) for checked in check.parameters], ("rule",))
    for finding in remarks:
        print_plain(console, f"note: {finding}")
    if check.unused:
        print_plain(console, f"note: globs that fit nothing: {', '.join(map(str, check.unused))}")


def _check_row(checked: Checked) -> dict[str, str]:
    return {
        "parameter": checked.name,
        "rule": ", ".join(map(str, checked.matches)) or "none",
        "pattern": ", ".join(describe(match.pattern) for match in checked.matches),
        "shape": str(list(checked.layout.logical_shape)) if checked.layout else "unknown",
    }


@command(
    "explain",
    examples=[
        "ucp spec explain layers.0.mlp.weight --spec mine.yaml --against runs/a",
        "ucp spec explain head.weight --spec mine.yaml --against runs/a --plot head.svg",
    ],
)
@click.argument("name")
@click.option("--spec", "spec", metavar="FILE|FAMILY", required=True, help="The spec.")
@click.option("--against", type=CHECKPOINT, metavar="CKPT", help="A checkpoint that holds the parameter.")
@tag_option
@vocabulary_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
@plot_option
def explain_command(
    name: str,
    spec: str,
    against: Path | None,
    tag: str | None,
    vocabulary_size: int | None,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Show how a spec shards one parameter. Says which rule NAME matches, and which part of it each rank of a checkpoint holds.

    NAME is the parameter's own name or its logical one. Exit status: 0 when it matches exactly one rule and the shapes agree,
    else 1.
    """
    loaded = load_spec(spec)
    checkpoint = open_checkpoint(against, tag) if against is not None else None
    report = _explanation(name, loaded, checkpoint, vocabulary_size)
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        _print_explanation(report)
    if report["problem"] is not None:
        raise click.exceptions.Exit(WRONG)
    if plot is not None:
        draw_parameter(report, plot)


def _explanation(name: str, spec: Spec, checkpoint: Checkpoint | None, vocabulary_size: int | None) -> dict[str, Any]:
    """The object that ``--json`` prints.

    Keys:
        name, logical_name, scheme: the parameter, and by which naming scheme it gets its logical name (null: it is its own).
        rules: that it matches: number from 0, glob, line, pattern in words.
        problem: null, or what is wrong.
        shape: whole, or null.
        ranks: for each model-parallel rank ``shape`` of its local tensor and ``pieces``: pairs of a ``logical`` and a ``local``
            box, each as ``[start, stop]`` by dimension. Null without a checkpoint, or where the shapes contradict the rule.
    """
    own = list(checkpoint.parameters) if checkpoint is not None else [name]
    recorded = checkpoint.logical_names if checkpoint is not None else {}
    logical = logical_names(own, [spec], recorded)
    if name not in logical:
        name = next((mine for mine, theirs in logical.items() if theirs == name), name)
    if name not in logical and checkpoint is not None:
        raise ConfigError(f"{checkpoint.path} holds no parameter {name!r}")
    title = logical[name]
    matches = spec.matches(title)
    layout: Layout | None = None
    problem: str | None = None
    if len(matches) != 1:
        near = f"; nearest: {', '.join(spec.nearest(title))}" if not matches else ""
        problem = f"matches {len(matches) or 'no'} rule{'s' if matches else ''}{near}"
    elif checkpoint is not None:
        size = vocabulary_size if vocabulary_size is not None else checkpoint.vocabulary_size
        shapes, degree = {title: checkpoint.parameters[name].local_shapes}, checkpoint.topology.tp
        try:
            layout = layouts_of({title: matches[0].pattern}, shapes, degree, size, "the checkpoint")[title]
        except MismatchError as error:
            problem = error.problems[0].removeprefix(f"{title}: ")
    return {
        "name": name,
        "logical_name": title,
        "scheme": "recorded" if name in recorded else best_scheme(own, spec)[0] if title != name else None,
        "rules": [_match(match) | {"pattern": describe(match.pattern)} for match in matches],
        "problem": problem,
        "shape": list(layout.logical_shape) if layout else None,
        "ranks": _ranks(layout) if layout else None,
    }


def _ranks(layout: Layout) -> list[dict[str, Any]]:
    return [
        {
            "shape": None if local == NOTHING and layout.logical_shape else list(local.shape),
            "pieces": [
                {"logical": _bounds(piece.logical_box), "local": _bounds(piece.local_box)} for piece in local.pieces
            ],
        }
        for local in layout.locals
    ]


def _bounds(box: Box) -> list[list[int]]:
    return [[low, high] for low, high in zip(box.start, box.stop, strict=True)]


def _print_explanation(report: dict[str, Any]) -> None:
    console = new_console()
    by = f" (by naming scheme {report['scheme']!r})" if report["scheme"] else ""
    lines = [("parameter", report["name"]), ("logical", report["logical_name"] + by)]
    lines += [("rule", f"{rule['glob']}{_line(rule)}: {rule['pattern']}") for rule in report["rules"]]
    lines += [("problem", report["problem"])] if report["problem"] else []
    lines += [("shape", str(report["shape"]))] if report["shape"] is not None else []
    print_lines(console, lines)
    if report["ranks"] is None:
        return
    table = new_table("rank", "local shape", "logical box", "local box")
    for number, rank in enumerate(report["ranks"]):
        shape = "none" if rank["shape"] is None else str(rank["shape"])
        for piece in rank["pieces"] or [{"logical": None, "local": None}]:
            table.add_row(
                str(number), escape(shape), *(escape(box_in_words(piece[side])) for side in ("logical", "local"))
            )
    console.print(table)


def _line(rule: dict[str, Any]) -> str:
    return f" (line {rule['line']})" if rule["line"] is not None else ""


@command(
    "infer",
    examples=[
        "ucp spec infer runs/tp2 --single-rank runs/tp1 > mine.yaml",
        "ucp spec infer --model train:build_model > mine.yaml",
    ],
)
@click.argument("checkpoint", metavar="[CKPT]", type=CHECKPOINT, required=False)
@tag_option
@click.option(
    "--model", metavar="MODULE:FUNCTION", help="A function without arguments that returns the Megatron-Core model."
)
@click.option(
    "--single-rank", type=CHECKPOINT, metavar="CKPT", help="A checkpoint of the same model without tensor parallelism."
)
@click.option("--family", default="inferred", show_default=True, help="Name to give to the family.")
def infer_command(
    checkpoint: Path | None, tag: str | None, model: str | None, single_rank: Path | None, family: str
) -> None:
    """Write a first spec to standard output. Comments in it say what is left open.

    From what CKPT records; or, with --single-rank, by comparing its shapes, and its values if both are of the same state; or,
    with --model, from the attributes that Megatron-Core sets on the parameters of a model.
    """
    if (checkpoint is None) == (model is None):
        raise ConfigError("name a checkpoint, or a function with --model")
    if model is not None:
        guesses, origin = _infer_from_model(model), f"the attributes of {model}"
    else:
        assert checkpoint is not None
        opened = open_checkpoint(checkpoint, tag)
        if single_rank is not None:
            whole = open_checkpoint(single_rank)
            with shown_progress("spec infer") as progress:
                guesses = infer_by_comparison(opened, whole, progress)
            origin = f"{opened.path}, compared with {whole.path}"
        else:
            guesses, origin = infer_from_record(opened), f"what {opened.path} records"
    heading = [f"Inferred from {origin}.", "Read it, decide what the comments leave open, and run: ucp spec check"]
    text = spec_text(family, f"inferred from {origin}", guesses, heading)
    click.echo(text, nl=False)
    undecided = [name for name, guess in guesses.items() if guess.pattern is None]
    if undecided:
        click.echo(f"no rule is certain for {len(undecided)} parameters: {', '.join(undecided)}", err=True)


def _infer_from_model(place: str) -> dict[str, Guess]:
    """Calls the user's function.

    Raises:
        ConfigError: there is no such function, or it returns no module.
        SpecError: no parameter carries Megatron-Core's attributes.
    """
    module_name, _, function_name = place.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--model {place}: {error}") from error
    finally:
        sys.path.pop(0)
    import torch

    model = function()
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"--model {place} returned a {type(model).__name__}, no torch module")
    try:
        from ucp_deepspeed.megatron.layouts import inferred_patterns
    except ImportError as error:
        raise UnsupportedError(f"Megatron-Core isn't installed: {error}") from error
    patterns = inferred_patterns(model)
    if not patterns:
        raise SpecError(f"no parameter of {place} carries attributes of tensor parallelism")
    unmarked = Guess(None, ("Megatron-Core cuts this weight and has set no attribute on it",))
    return {name: Guess(patterns[name]) if name in patterns else unmarked for name, _ in model.named_parameters()}


@command("schema", examples=["ucp spec schema > ucp_spec.schema.json"])
def schema_command() -> None:
    """Print the JSON Schema of spec files, for completion in editors."""
    click.echo(json.dumps(spec_schema(), indent=2, ensure_ascii=False))


for _command in (list_command, schema_command, check_command, explain_command, infer_command):
    spec_command.add_command(_command)
