"""Nodes that are lost and that join, with torch's real agents: ``ucp run`` on one machine, an agent for each node."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from elastic_train import features, samples

SCRIPT = Path(__file__).parent / "elastic_train.py"
BATCH, EVERY = 16, 5
PATIENCE_SECONDS = 240.0


@dataclass
class Nodes:
    """Agents of one run, each with one rank.

    Attributes:
        folder: where the ranks log and save.
        agents: the process of each node.
    """

    folder: Path
    agents: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    store: str = ""

    def start(self, name: str) -> None:
        """Start a node. The first holds the store beside it."""
        command = [sys.executable, "-m", "ucp_deepspeed.cli", "run", "--nodes", "1:4", "--local-addr", "127.0.0.1"]
        command += ["--name", name, "--batch", str(BATCH), *(["--store", self.store] if self.store else [])]
        command += [str(SCRIPT), str(self.folder / "ds.json"), str(self.folder), str(EVERY), "0.2"]
        with (self.folder / f"{name}.log").open("wb") as log:
            self.agents[name] = subprocess.Popen(command, stderr=log, stdout=log, start_new_session=True)
        if not self.store:
            (port,) = self.wait(lambda: re.findall(r"--store \S+:(\d+);", self.log(name)))
            self.store = f"127.0.0.1:{port}"

    def kill(self, name: str) -> None:
        """Lose a node: its agent and its rank are gone at once."""
        agent = self.agents.pop(name)
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(agent.pid, signal.SIGSTOP)  # it tells nobody of its rank's end
        for pid in [pid for pid in map(int, children) if "elastic.worker" in Path(f"/proc/{pid}/cmdline").read_text()]:
            os.kill(pid, signal.SIGKILL)
        agent.kill()
        agent.wait()

    def log(self, *names: str) -> str:
        """Return what nodes have told."""
        return "\n".join((self.folder / f"{name}.log").read_text(errors="replace") for name in names)

    def lines(self) -> list[dict[str, Any]]:
        """Return what the ranks have logged, in the order of the steps."""
        found = [
            json.loads(line) for path in self.folder.glob("rank-*.jsonl") for line in path.read_text().splitlines()
        ]
        return sorted(found, key=lambda line: line.get("step", line.get("done")))

    def wait(self, seen: Callable[[], Any]) -> Any:
        """Wait until something is seen."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (found := seen()):
            assert time.monotonic() < deadline, self.log(*(path.stem for path in self.folder.glob("*.log")))[-5000:]
            time.sleep(0.1)
        return found

    def wait_for_round(self, number: int) -> str:
        """Wait for the line that tells of a round; return it."""
        names = [path.stem for path in self.folder.glob("*.log")]
        return str(self.wait(lambda: re.findall(f"^ucp run: (round {number}: .*)$", self.log(*names), re.MULTILINE))[0])

    def steps(self) -> int:
        """Return the number of steps that have been done."""
        return max((line.get("done", 0) for line in self.lines()), default=0)

    def end(self) -> None:
        """Let the run end by itself, three steps later and more."""
        (self.folder / "writing").write_text(str(self.steps() + 10))
        (self.folder / "writing").replace(self.folder / "until")
        for agent in self.agents.values():
            assert agent.wait(PATIENCE_SECONDS) == 0


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    config = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "universal_checkpoint": {"batch": "keep", "save": {"on_signal": str(tmp_path / "checkpoints")}},
    }
    (tmp_path / "ds.json").write_text(json.dumps(config))
    nodes = Nodes(tmp_path)
    yield nodes
    for agent in nodes.agents.values():
        agent.kill()


def uninterrupted(steps: int) -> list[list[float]]:
    """Train without DeepSpeed and without ranks; return the weights after each step."""
    torch.manual_seed(1)
    model = torch.nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    weights = []
    for step in range(steps):
        optimizer.zero_grad()
        model(features(samples(step, BATCH))).mean().backward()
        optimizer.step()
        weights.append(torch.cat([value.detach().flatten() for value in model.parameters()]).double().tolist())
    return weights


def check_stream(nodes: Nodes) -> None:
    """All steps were done, each on the whole batch and on nothing else; the weights are those of an uninterrupted run."""
    lines, expected = nodes.lines(), uninterrupted(nodes.steps())
    assert [line["weights"] for line in lines if "done" in line] == [
        expected[line["done"] - 1] for line in lines if "done" in line
    ]
    for step in range(nodes.steps()):
        last: dict[tuple[int, int], list[int]] = {}
        for line in (line for line in lines if line.get("step") == step):
            last[line["pid"], line["ranks"]] = line["samples"]
        worlds = {ranks for _, ranks in last}
        assert any(
            sorted(sample for (_, ranks), own in last.items() if ranks == world for sample in own)
            == samples(step, BATCH) * (sum(ranks == world for _, ranks in last) // world)
            for world in worlds
        )


def test_a_node_joins_and_the_first_one_is_lost(nodes: Nodes) -> None:
    """The node that is lost has rank 0, and has started the store. Of three nodes one stands by: the batch is 16."""
    nodes.start("a")
    nodes.wait(nodes.steps)
    nodes.start("b")
    joined = nodes.wait_for_round(2)
    assert "b joined; TP1·PP1·DP1 → TP1·PP1·DP2" in joined and " 0 steps repeated" in joined
    nodes.start("c")
    nodes.wait_for_round(3)
    assert "3 ranks are there; a batch of 16: rank 2 stands by" in nodes.log("a", "b", "c")
    nodes.kill("a")
    lost = nodes.wait_for_round(4)
    assert re.search("a left.*→ TP1·PP1·DP2", lost)
    assert int(re.findall(r"(\d+) steps? repeated", lost)[0]) <= EVERY
    nodes.end()
    check_stream(nodes)
