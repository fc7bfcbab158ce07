"""Train TP2·DP2 ZeRO-1 to step 20, resume on other topologies, convert, resume the converted, and compare all at step 40.

Everything runs through the real ``deepspeed`` launcher on CPU ranks. Prints one table and draws ``quickstart.png``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from ucp_deepspeed.testing.ranks import free_port

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "quickstart"
SWITCH, LAST = 20, 40
BOUND = 0.04
"""Largest accepted difference of a loss near 2.5: 20 steps in bf16 whose sums run in another order (measured: 0.02)."""


@dataclass(frozen=True)
class Training:
    """One run: its name, topology, and where it starts."""

    name: str
    world_size: int
    tp: int
    zero: int
    load: Path | None = None
    save: Path | None = None

    @property
    def log(self) -> Path:
        """Where the training script writes its numbers."""
        return WORK / f"{self.name.replace(' ', '_').replace('·', '_')}.jsonl"


@dataclass
class Result:
    """What a run wrote: losses by step, and what its resume cost."""

    losses: dict[int, float] = field(default_factory=dict)
    bytes_read: int = 0
    resume_seconds: float = 0.0
    seconds: float = 0.0


def launch(run: Training, precision: str) -> Result:
    """Run the training script under the launcher; its output goes to a file that is shown if it fails."""
    command = [
        Path(sys.executable).parent / "deepspeed",
        "--master_port",
        free_port(),
        "--num_accelerators",
        run.world_size,
    ]
    command += [ROOT / "scripts" / "train_gpt.py", "--tp", run.tp, "--zero", run.zero, "--precision", precision]
    command += ["--steps", LAST, "--log", run.log]
    command += ["--load", run.load] if run.load else []
    command += ["--save", run.save, "--save-every", SWITCH] if run.save else []
    started = time.monotonic()
    execute(command, run.log.with_suffix(".log"))
    result = Result(seconds=time.monotonic() - started)
    for line in run.log.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry.get("event") == "resumed":
            result.bytes_read, result.resume_seconds = entry["bytes_read"], entry["seconds"]
        else:
            result.losses[entry["step"]] = entry["loss"]
    return result


def execute(command: Sequence[object], output: Path) -> None:
    """Run a command, quietly; on failure show what it printed and end."""
    with output.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            [str(part) for part in command], stdout=file, stderr=subprocess.STDOUT, timeout=600, cwd=ROOT
        )
    if done.returncode:
        raise SystemExit(f"{output.read_text(encoding='utf-8')[-6000:]}\nfailed: {' '.join(map(str, command))}")


def point_at(folder: Path, step: int) -> Path:
    """Make ``latest`` of a checkpoint folder name the checkpoint of a step."""
    (folder / "latest").write_text(f"global_step{step}", encoding="utf-8")
    return folder


def run_all(precision: str, console: Console) -> dict[str, Result]:
    """All runs, in order; the first is the uninterrupted one."""
    saved, universal = WORK / "saved", WORK / "universal"
    reference = Training("TP2·DP2 ZeRO-1", 4, 2, 1, save=saved)
    results: dict[str, Result] = {}
    with console.status(f"training {reference.name} to step {LAST}, saving at step {SWITCH}"):
        results[reference.name] = launch(reference, precision)
    point_at(saved, SWITCH)
    with console.status("converting to the universal format"):
        convert = [Path(sys.executable).parent / "ucp", "convert", saved, universal, "--tag", f"global_step{SWITCH}"]
        execute(convert, WORK / "convert.log")
    resumed = [
        Training("TP1·DP2 ZeRO-3", 2, 1, 3, load=saved),
        Training("TP4·DP1 ZeRO-2", 4, 4, 2, load=saved),
        Training("TP1·DP1 ZeRO-0", 1, 1, 0, load=saved),
        Training("converted, TP2·DP1 ZeRO-3", 2, 2, 3, load=universal),
    ]
    for run in resumed:
        with console.status(f"resuming step {SWITCH} as {run.name}"):
            results[run.name] = launch(run, precision)
    return results


def show(results: dict[str, Result], console: Console) -> float:
    """Print the table; returns the largest difference from the uninterrupted run."""
    reference = next(iter(results.values()))
    steps = (SWITCH, SWITCH + 10, LAST)
    table = Table(title=f"Loss after resuming step {SWITCH} on other topologies")
    for heading in ("run", *(f"loss at {step}" for step in steps), "largest difference", "read", "resume", "whole run"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    worst = 0.0
    for name, result in results.items():
        gaps = [abs(loss - reference.losses[step]) for step, loss in result.losses.items()]
        worst = max(worst, *gaps)
        losses = [f"{result.losses[step]:.4f}" if step in result.losses else "(resumed)" for step in steps]
        resumed = result.bytes_read > 0
        table.add_row(
            name,
            *losses,
            f"{max(gaps):.4f} at any step" if resumed else "uninterrupted",
            f"{result.bytes_read / 1e6:.1f} MB" if resumed else "",
            f"{result.resume_seconds:.2f} s" if resumed else "",
            f"{result.seconds:.0f} s",
        )
    console.print(table)
    return worst


def draw(results: dict[str, Result], path: Path) -> None:
    """Loss curves on top of each other, the resumed ones from the switch on, and below how far they are apart."""
    colours = ("#1b1b1b", "#0072b2", "#d55e00", "#009e73", "#cc79a7")
    figure, (curves, gaps) = plt.subplots(
        2, 1, figsize=(10, 6.4), dpi=160, sharex=True, gridspec_kw={"height_ratios": [3, 1.2], "hspace": 0.08}
    )
    reference = next(iter(results.values()))
    for index, ((name, result), colour) in enumerate(zip(results.items(), colours, strict=True)):
        steps = sorted(result.losses)
        losses = [result.losses[step] for step in steps]
        first = index == 0
        label = f"{name}, uninterrupted" if first else f"resumed as {name}".replace("resumed as converted", "converted")
        marks = {"linewidth": 5, "alpha": 0.25} if first else {"linewidth": 1.4, "marker": "o", "markersize": 3}
        curves.plot(steps, losses, color=colour, label=label, **marks)  # type: ignore[arg-type]
        if not first:
            gaps.plot(steps, [result.losses[s] - reference.losses[s] for s in steps], color=colour, linewidth=1.4)
    for axes in (curves, gaps):
        axes.axvline(SWITCH, color="#888888", linewidth=1, linestyle=":")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    curves.annotate(
        f"checkpoint of step {SWITCH}",
        (SWITCH, max(reference.losses.values())),
        xytext=(6, -4),
        textcoords="offset points",
    )
    curves.set_ylabel("training loss")
    curves.legend(frameon=False)
    gaps.axhline(0, color="#888888", linewidth=1)
    gaps.set_ylim(-BOUND, BOUND)
    gaps.set_ylabel("difference")
    gaps.set_xlabel("step")
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    """Run, compare, and fail if a resumed run leaves the uninterrupted one's curve."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--update-docs", action="store_true", help="also draw docs/quickstart.png")
    arguments = parser.parse_args()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    console = Console(width=130)
    results = run_all(arguments.precision, console)
    worst = show(results, console)
    draw(results, ROOT / "quickstart.png")
    if arguments.update_docs:
        draw(results, ROOT / "docs" / "quickstart.png")
    console.print(f"wrote quickstart.png; largest difference {worst:.4f}, accepted {BOUND}")
    if worst > BOUND:
        raise SystemExit("a resumed run left the uninterrupted run's curve")


if __name__ == "__main__":
    main()
