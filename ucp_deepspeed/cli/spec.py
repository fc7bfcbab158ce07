"""``ucp spec``: write spec files, and hold them against checkpoints."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ucp_deepspeed.checkpoint import Checkpoint, open_checkpoint
from ucp_deepspeed.checkpoint.view import held_shapes, layouts_of, parameter_names
from ucp_deepspeed.cli.options import NO
from ucp_deepspeed.cli.printing import box_in_words, echo, print_json, print_labelled, print_lines, print_rows
from ucp_deepspeed.cli.progress import shown_progress
from ucp_deepspeed.errors import ConfigError, MismatchError, SpecError, UnsupportedError
from ucp_deepspeed.language import Match, Spec, find_family, load_spec, logical_names, naming_specs, spec_names
from ucp_deepspeed.language.inference import Guess, spec_text
from ucp_deepspeed.language.resolve import describe
from ucp_deepspeed.language.schema import spec_schema
from ucp_deepspeed.language.schemes import best_scheme
from ucp_deepspeed.layout import Box, Layout
from ucp_deepspeed.layout.layout import NOTHING
from ucp_deepspeed.transfer.evidence.checks import SpecCheck, check_spec
from ucp_deepspeed.transfer.evidence.inferring import infer_by_comparison, infer_from_record


def list_families(against: Path | None, tag: str | None, as_json: bool) -> int:
    """Do what ``ucp spec list`` says."""
    if against is not None:
        return _detect(open_checkpoint(against, tag), as_json)
    specs = [load_spec(name) for name in spec_names()]
    if as_json:
        print_json({spec.family: spec.description for spec in specs})
    else:
        print_rows([{"family": s.family, "rules": str(len(s.rules)), "description": s.description} for s in specs])
    return 0


VERDICTS = {
    "shapes": "one family fits, and shapes confirm it",
    "names": "one family fits by names; no shape confirms it",
    "ambiguous": "several families fit and disagree: name one",
    "none": "no family fits",
}


def _detect(checkpoint: Checkpoint, as_json: bool) -> int:
    """Print how well families fit."""
    own = parameter_names(checkpoint)
    names = logical_names(list(checkpoint.parameters), naming_specs(None, own), checkpoint.logical_names)
    found = find_family([names[name] for name in own], held_shapes(checkpoint, {name: names[name] for name in own}))
    if as_json:
        families = {
            one.spec.family: {"coverage": one.coverage, "fits": one.fits, "why": str(one)} for one in found.candidates
        }
        listed = {key: list(getattr(found, key)) for key in ("disagreement", "unconfirmed")}
        print_json({"path": str(checkpoint.path), "confidence": found.confidence, **listed, "families": families})
    else:
        print_lines(VERDICTS[found.confidence], *(f"  {candidate}" for candidate in found.candidates))
        for label, kept in (("disagree on", found.disagreement), ("not confirmed by shapes", found.unconfirmed)):
            print_lines(*([f"note: {label}: {', '.join(kept)}"] if kept else []))
    return NO if found.confidence in ("ambiguous", "none") else 0


def check(
    spec: str,
    against: Path,
    tag: str | None,
    vocabulary_size: int | None,
    single_rank: Path | None,
    no_values: bool,
    strict: bool,
    as_json: bool,
) -> int:
    """Do what ``ucp spec check`` says."""
    loaded, checkpoint = load_spec(spec), open_checkpoint(against, tag)
    whole = open_checkpoint(single_rank) if single_rank is not None else None
    with shown_progress("spec check") as progress:
        found = check_spec(
            loaded, checkpoint, vocabulary_size=vocabulary_size, values=not no_values, whole=whole, progress=progress
        )
    if as_json:
        print_json(_check_report(loaded, checkpoint, found))
    else:
        _print_check(loaded, checkpoint, found)
    return NO if not found.sound or (strict and found.findings) else 0


def _check_report(spec: Spec, checkpoint: Checkpoint, check: SpecCheck) -> dict[str, Any]:
    """Return the object that ``--json`` prints; ``docs/json.md`` lists its keys."""
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
    wrong = [finding for finding in check.findings if finding.wrong]
    single = {"no": "", "shapes": ", shapes of a single rank", "values": ", shapes and values of a single rank"}
    compared = f"names and shapes of {len(check.parameters)} parameters, values of {check.values_compared}"
    contradictions = f"{len(wrong)} contradiction{'s' if len(wrong) > 1 else ''}"
    print_labelled(
        [
            ("spec", spec.family),
            ("against", f"{checkpoint.path}: {checkpoint.form}, {checkpoint.topology}"),
            ("verdict", "nothing contradicts it" if check.sound else contradictions),
            ("compared", compared + single[check.whole_compared]),
        ]
    )
    print_lines(*(f"  {finding}" for finding in wrong))
    rows = [
        {
            "parameter": checked.name,
            "rule": ", ".join(map(str, checked.matches)) or "none",
            "pattern": ", ".join(describe(match.pattern) for match in checked.matches),
            "shape": str(list(checked.layout.logical_shape)) if checked.layout else "unknown",
        }
        for checked in check.parameters
    ]
    print_rows(rows, ("rule",))
    print_lines(*(f"note: {finding}" for finding in check.findings if not finding.wrong))
    if check.unused:
        print_lines(f"note: globs that fit nothing: {', '.join(map(str, check.unused))}")


def explain(
    name: str,
    spec: str,
    against: Path | None,
    tag: str | None,
    vocabulary_size: int | None,
    as_json: bool,
    plot: Path | None,
) -> int:
    """Do what ``ucp spec explain`` says."""
    if plot is not None and against is None:
        raise ConfigError("--plot draws what ranks hold: name a checkpoint that the spec fits with --against")
    loaded = load_spec(spec)
    checkpoint = open_checkpoint(against, tag) if against is not None else None
    report = _explanation(name, loaded, checkpoint, vocabulary_size)
    if as_json:
        print_json(report)
    else:
        _print_explanation(report)
    if plot is not None and report["ranks"] is None:
        echo(f"{plot} isn't written: nobody can tell what the ranks hold", err=True)
    elif plot is not None:
        from ucp_deepspeed.cli.plots import draw_parameter

        draw_parameter(report, plot)
    return 0 if report["problem"] is None else NO


def _explanation(name: str, spec: Spec, checkpoint: Checkpoint | None, vocabulary_size: int | None) -> dict[str, Any]:
    """Return the object that ``--json`` prints; ``docs/json.md`` lists its keys."""
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
    problem = spec.misfit(title, matches) if len(matches) != 1 else None
    if problem is None and checkpoint is not None:
        size = vocabulary_size if vocabulary_size is not None else checkpoint.vocabulary_size
        shapes, degree = {str(title): checkpoint.parameters[name].local_shapes}, checkpoint.topology.tp
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


def _print_explanation(report: Mapping[str, Any]) -> None:
    by = f" (by naming scheme {report['scheme']!r})" if report["scheme"] else ""
    lines = [("parameter", report["name"]), ("logical", report["logical_name"] + by)]
    for rule in report["rules"]:
        line = f" (line {rule['line']})" if rule["line"] is not None else ""
        lines.append(("rule", f"{rule['glob']}{line}: {rule['pattern']}"))
    lines += [(key, str(report[key])) for key in ("problem", "shape") if report[key] is not None]
    print_labelled(lines)
    print_rows(
        [
            {
                "rank": str(number),
                "local shape": "none" if rank["shape"] is None else str(rank["shape"]),
                **{f"{side} box": box_in_words(piece.get(side)) for side in ("logical", "local")},
            }
            for number, rank in enumerate(report["ranks"] or ())
            for piece in rank["pieces"] or [{}]
        ]
    )


def infer(checkpoint: Path | None, tag: str | None, model: str | None, single_rank: Path | None, family: str) -> None:
    """Do what ``ucp spec infer`` says."""
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
    echo(text, nl=False)  # YAML reads these escapes
    undecided = [name for name, guess in guesses.items() if guess.pattern is None]
    if undecided:
        echo(f"no rule is certain for {len(undecided)} parameters: {', '.join(undecided)}", err=True)


def _infer_from_model(place: str) -> dict[str, Guess]:
    """Return what is known from the model that the user's function makes."""
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


def schema() -> None:
    """Do what ``ucp spec schema`` says."""
    click.echo(json.dumps(spec_schema(), indent=2, ensure_ascii=False))
