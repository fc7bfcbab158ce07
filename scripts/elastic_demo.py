"""Train on four nodes, lose two, get one back; draw the loss over time, with the number of ranks beneath.

    python scripts/elastic_demo.py

Each node is an agent of ``ucp run`` on this machine, with one CPU rank. A node is lost by SIGKILL, together with its rank; the
second one has rank 0. Beside it, what stock DeepSpeed needs for the same: ``ds_to_universal``, and a start on the ranks that are
left. The picture and the figures go to ``build/elastic``, or to the folder that ``--output`` names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "elastic_train.py"
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{EXAMPLE.parent}"}
PAUSE, STEPS, BATCH = 0.3, 200, 24
PATIENCE_SECONDS = 600.0

STOCK = """
import sys, elastic_train
made = elastic_train.config_of
def config_of(folder):
    config = made(folder)
    del config["universal_checkpoint"]
    config["checkpoint"] = {"load_universal": True}
    return config | {"train_micro_batch_size_per_gpu": 6, "gradient_accumulation_steps": 2}
elastic_train.config_of = config_of
elastic_train.main()
"""
"""The example by DeepSpeed alone, from what ``ds_to_universal`` has made, on two ranks."""


@dataclass
class Event:
    """Something that happens to the run.

    Attributes:
        text: what happens.
        when: seconds since the epoch.
        seconds: seconds from there to the next step.
    """

    text: str
    when: float
    seconds: float = 0.0


@dataclass
class Demo:
    """The nodes and their events.

    Attributes:
        folder: where all is logged and saved.
        store: ``host:port`` of the store.
    """

    folder: Path
    store: str = ""
    agents: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    @property
    def log(self) -> Path:
        """The file with a line for each step."""
        return self.folder / "steps.jsonl"

    def start_store(self) -> subprocess.Popen[str]:
        """Start the store in which the nodes meet."""
        command = [sys.executable, "-m", "ucp_deepspeed.cli", "store", "--port", "0"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT)
        assert process.stdout is not None
        self.store = f"127.0.0.1:{re.findall('port ([0-9]+)', process.stdout.readline())[0]}"
        return process

    def start(self, name: str) -> None:
        """Start a node."""
        agent = [sys.executable, "-m", "ucp_deepspeed.cli", "run", "--nodes", "1:4", "--store", self.store]
        agent += ["--local-addr", "127.0.0.1", "--name", name, "--batch", str(BATCH)]
        script = [str(EXAMPLE), "--save", str(self.folder / "checkpoints"), "--steps", str(STEPS)]
        script += ["--log", str(self.log), "--pause", str(PAUSE)]
        with (self.folder / f"{name}.log").open("wb") as output:
            self.agents[name] = subprocess.Popen(
                [*agent, *script], stdout=output, stderr=output, env=os.environ | ENVIRONMENT, start_new_session=True
            )

    def lose(self, name: str) -> None:
        """Lose a node, as if its machine had lost its power."""
        agent = self.agents.pop(name)
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(agent.pid, signal.SIGSTOP)  # it tells nobody of its rank's end
        for pid in map(int, children):
            os.kill(pid, signal.SIGKILL)
        agent.kill()
        agent.wait()

    def steps(self) -> list[dict[str, Any]]:
        """Return the whole lines of the log: a node that is lost may leave half of one."""
        found = []
        for line in self.log.read_text().splitlines() if self.log.exists() else []:
            with suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found

    def node_of_rank_0(self) -> str:
        """Return the name of the node whose agent has written the last step."""
        return max(self.agents, key=self._wrote)

    def _wrote(self, name: str) -> int:
        steps = re.findall(r"^step (\d+):", (self.folder / f"{name}.log").read_text(), re.MULTILINE)
        return int(steps[-1]) if steps else -1

    def wait(self, seen: Callable[[], Any]) -> None:
        """Wait until something is seen."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not seen():
            if time.monotonic() > deadline:
                raise SystemExit(f"the run stands still; see {self.folder}/*.log")
            time.sleep(0.1)

    def happens(self, text: str, action: Callable[[], None], after: int = 30) -> None:
        """Let something happen after a number of steps in this round, and wait for the first step of the next."""
        self.wait(lambda: sum(step["start"] == self.steps()[-1]["start"] for step in self.steps()) > after)
        start, event = self.steps()[-1]["start"], Event(text, time.time())
        action()
        self.wait(lambda: self.steps()[-1]["start"] != start)
        first = next(step for step in self.steps() if step["time"] > event.when and step["start"] != start)
        event.seconds = first["time"] - event.when
        self.events.append(event)
        click.echo(f"{text}: {event.seconds:.1f} s to the next step, on {first['ranks']} ranks")


def run_demo(folder: Path) -> Demo:
    """Train on four nodes; two are lost, and one joins."""
    demo = Demo(folder)
    store = demo.start_store()
    try:
        for name in "abcd":
            demo.start(name)
        demo.wait(lambda: [step for step in demo.steps() if step["ranks"] == 4])
        demo.happens("a node is lost", lambda: demo.lose("d"))
        demo.happens("rank 0's node is lost", lambda: demo.lose(demo.node_of_rank_0()))
        demo.happens("a node joins", lambda: demo.start("e"))
        demo.wait(lambda: all(agent.poll() is not None for agent in demo.agents.values()))
    finally:
        for agent in demo.agents.values():
            agent.kill()
        store.kill()
    return demo


def run_stock(folder: Path) -> dict[str, float]:
    """Convert the last checkpoint by DeepSpeed's own tool, and go on from it on two ranks; return the seconds of each."""
    saved = folder / "checkpoints"
    tag = (saved / "latest").read_text().strip()
    begun = time.time()
    convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    convert += ["--input_folder", str(saved / tag), "--output_folder", str(saved / f"{tag}_universal")]
    environment = os.environ | ENVIRONMENT
    subprocess.run(convert, env=environment, check=True, capture_output=True)
    converted, log = time.time(), folder / "stock.jsonl"
    (saved / "latest_universal").write_text(f"{tag}_universal")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (folder / "stock.py").write_text(STOCK)
    script = [str(folder / "stock.py"), "--save", str(saved), "--steps", str(STEPS + 1), "--log", str(log)]
    done = subprocess.run([*start, "--", *script], env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not log.exists():
        raise SystemExit(f"DeepSpeed alone doesn't go on:\n{done.stderr[-3000:]}")
    first = json.loads(log.read_text().splitlines()[0])
    return {"ds_to_universal": converted - begun, "start and load": first["time"] - converted}


def draw(demo: Demo, path: Path) -> None:
    """Draw the loss and the number of ranks over seconds."""
    steps, begun = demo.steps(), demo.steps()[0]["time"]
    seconds = [step["time"] - begun for step in steps]
    figure, (upper, lower) = plt.subplots(
        2, 1, sharex=True, figsize=(8, 4.5), height_ratios=[3, 1], layout="constrained"
    )
    for start in dict.fromkeys(step["start"] for step in steps):
        own = [place for place, step in enumerate(steps) if step["start"] == start]
        upper.plot([seconds[place] for place in own], [steps[place]["loss"] for place in own], color="tab:blue")
        ends = [seconds[place] for place in (own[0], own[-1])]
        lower.fill_between(ends, [steps[own[0]]["ranks"]] * 2, color="tab:orange", alpha=0.6)
    for event in demo.events:
        for axes in (upper, lower):
            axes.axvline(event.when - begun, color="gray", linestyle=":")
        upper.annotate(
            f"{event.text}\n{event.seconds:.0f} s", (event.when - begun + 1, upper.get_ylim()[1]), va="top", fontsize=8
        )
    upper.set_ylabel("loss")
    lower.set(ylabel="ranks", xlabel="seconds", yticks=range(5))
    figure.savefig(path, dpi=130)


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "build" / "elastic", show_default=True)
def main(output: Path) -> None:
    """Run the demo."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    demo = run_demo(output)
    draw(demo, output / "elastic.png")
    stock = run_stock(output)
    for name, taken in stock.items():
        click.echo(f"DeepSpeed alone, {name}: {taken:.1f} s")
    found = {"events": [asdict(event) for event in demo.events], "stock": stock}
    (output / "elastic.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
