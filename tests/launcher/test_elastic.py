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
from elastic_run import samples, train

from ucp_deepspeed.testing.ranks import get_pool

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "elastic_run.py"
BATCH, EVERY = 16, 5
PATIENCE_SECONDS = 240.0

BALLAST = 30_000_000
"""Numbers beside the weights: their file takes long enough to write that a save can't be over before its node is lost."""

CONFIG = {
    "train_batch_size": BATCH,
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
}


@dataclass
class Nodes:
    """Agents of one run.

    Attributes:
        folder: where the ranks log and save.
        agents: the process of each node.
        options: further options of ``ucp run``.
        arguments: further arguments of the script.
    """

    folder: Path
    agents: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    store: str = ""
    options: tuple[str, ...] = ("--nodes", "1:4")
    arguments: tuple[str, ...] = ()

    def configure(self, **save: Any) -> None:
        """Write the config, with settings of the save, and the spec of a tensor-parallel model."""
        rules = [{"match": "weight", "pattern": "shard", "dim": 0}]
        (self.folder / "spec.yaml").write_text(json.dumps({"family": "columns", "rules": rules}))
        block = {"batch": "keep", "save": {"on_signal": str(self.folder / "checkpoints"), **save}}
        if self.arguments:
            block["spec"] = str(self.folder / "spec.yaml")
        (self.folder / "ds.json").write_text(json.dumps(CONFIG | {"universal_checkpoint": block}))

    def start(self, name: str) -> None:
        """Start a node. The first holds the store beside it."""
        command = [sys.executable, "-m", "ucp_deepspeed.cli", "run", *self.options, "--local-addr", "127.0.0.1"]
        command += ["--name", name, "--batch", str(BATCH), *(["--store", self.store] if self.store else [])]
        command += [str(SCRIPT), str(self.folder / "ds.json"), str(self.folder), str(EVERY), "0.2", *self.arguments]
        with (self.folder / f"{name}.log").open("wb") as log:
            self.agents[name] = subprocess.Popen(command, stderr=log, stdout=log, start_new_session=True)
        if not self.store:
            (port,) = self.wait(lambda: re.findall(r"--store \S+:(\d+);", self.log(name)))
            self.store = f"127.0.0.1:{port}"

    def hold_store(self) -> subprocess.Popen[str]:
        """Start the store outside the nodes, for those that start from now on."""
        process = subprocess.Popen(
            [sys.executable, "-m", "ucp_deepspeed.cli", "store", "--port", "0"], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        self.store = f"127.0.0.1:{re.findall('port ([0-9]+)', process.stdout.readline())[0]}"
        return process

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
        """Return what the ranks have logged of each step, in order."""
        found = [
            json.loads(line) for path in self.folder.glob("rank-*.jsonl") for line in path.read_text().splitlines()
        ]
        return sorted(found, key=lambda line: int(line["done"]))

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
        return max((line["done"] for line in self.lines()), default=0)

    def end(self) -> None:
        """Let the run end by itself, three steps later and more."""
        (self.folder / "writing").write_text(str(self.steps() + 10))
        (self.folder / "writing").replace(self.folder / "until")
        for agent in self.agents.values():
            assert agent.wait(PATIENCE_SECONDS) == 0


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path)
    nodes.configure()
    yield nodes
    for name in [name for name, agent in nodes.agents.items() if agent.poll() is None]:
        nodes.kill(name)


def uninterrupted(folder: Path, steps: int) -> list[list[float]]:
    """Train by DeepSpeed alone on one rank; return the weights after each step."""
    folder.mkdir()
    (folder / "until").write_text(str(steps))
    get_pool(1).run(train, CONFIG | {"gradient_accumulation_steps": 4}, folder, 0, 0.0)
    lines = map(json.loads, (folder / "rank-0.jsonl").read_text().splitlines())
    return [line["weights"] for line in lines if "done" in line]


def check_stream(nodes: Nodes) -> None:
    """All steps were done, each on the whole batch and on nothing else; the weights are those of an uninterrupted run."""
    lines, steps = nodes.lines(), nodes.steps()
    expected = uninterrupted(nodes.folder / "uninterrupted", steps)
    for line in lines:
        shares = torch.tensor(expected[line["done"] - 1]).chunk(line["tp"])
        assert line["weights"] == shares[line["tp_rank"]].tolist(), line["done"]
    turns: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for line in lines:
        turns.setdefault((line["done"], line["round"]), []).append(line)
    whole = [(step, turn) for (step, _), turn in turns.items() if len(turn) == turn[0]["ranks"]]
    assert {step for step, _ in whole} == set(range(1, steps + 1))
    for step, turn in whole:
        for rank in range(turn[0]["tp"]):
            seen = [sample for line in turn if line["tp_rank"] == rank for sample in line["samples"]]
            assert sorted(seen) == samples(step - 1, BATCH)


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
    assert repeated(lost) <= EVERY
    nodes.end()
    check_stream(nodes)


def repeated(told: str) -> int:
    """Number of steps that a round has done again."""
    return int(re.findall(r"(\d+) steps? repeated", told)[0])


def test_a_tensor_parallel_run_goes_on_with_whole_copies_of_the_model(nodes: Nodes) -> None:
    """One of the three nodes that are left has nobody to share a copy with."""
    nodes.options, nodes.arguments = ("--nodes", "3:4", "--tp", "2"), ("{tp}",)
    nodes.configure()
    for name in "abcd":
        nodes.start(name)
    nodes.wait(lambda: any(line["done"] > EVERY and line["ranks"] == 4 for line in nodes.lines()))
    nodes.kill("a")
    line = "round .*a left and [bcd] stands by; TP2·PP1·DP2 → TP2·PP1·DP1; .*"
    lost = str(nodes.wait(lambda: re.findall(line, nodes.log(*"bcd")))[0])
    assert "3 ranks are there; TP2·PP1, a batch of 16: rank 2 stands by" in nodes.log("b", "c", "d")
    assert repeated(lost) <= EVERY
    nodes.end()
    check_stream(nodes)


def test_a_topology_that_fits_is_chosen_for_the_ranks_that_are_left(nodes: Nodes) -> None:
    """There are 128 weights: in fp32, with half the masters and states, they take 1280 bytes. A start takes the given sizes."""
    nodes.options = ("--nodes", "1:2", "--nproc-per-node", "2", "--tp", "2", "--topology", "auto")
    nodes.options += ("--checkpoint", str(nodes.folder / "checkpoints"), "--memory-per-rank", "2KB")
    nodes.arguments, store = ("{tp}",), nodes.hold_store()
    nodes.configure()
    for name in "ab":
        nodes.start(name)
    nodes.wait(lambda: any(line["done"] > EVERY and line["ranks"] == 4 for line in nodes.lines()))
    assert {line["tp"] for line in nodes.lines()} == {2}
    nodes.kill("a")
    lost = str(nodes.wait(lambda: re.findall("round .*a left; TP2·PP1·DP2 → TP1·PP1·DP2; .*", nodes.log("b")))[0])
    assert "2 ranks are there; TP1·PP1·DP2, from " in nodes.log("b")
    assert "TP1·PP1·DP2 holds 1.2 KiB of 2.0 KiB per rank" in nodes.log("b")
    assert repeated(lost) <= EVERY
    nodes.end()
    store.kill()
    check_stream(nodes)


def test_a_node_is_lost_while_it_saves_in_the_background(nodes: Nodes) -> None:
    """It has rank 0, which writes the model's file: the checkpoint is never finished, and the one before it is taken."""
    nodes.configure(**{"async": True})
    (nodes.folder / "ballast").write_text(str(BALLAST))
    nodes.start("a")
    nodes.wait(nodes.steps)
    nodes.start("b")
    nodes.wait_for_round(2)
    last = nodes.steps() // EVERY * EVERY + 2 * EVERY
    (nodes.folder / "lose").write_text(str(last))
    told = nodes.wait_for_round(3)
    assert f"goes on from step {last - EVERY}, {EVERY} steps repeated" in told
    nodes.agents = {name: agent for name, agent in nodes.agents.items() if agent.poll() is None}
    assert len(nodes.agents) == 1
    (nodes.folder / "lose").unlink()
    nodes.end()
    check_stream(nodes)


def test_the_store_is_lost(nodes: Nodes) -> None:
    """All nodes save and end. With another store and one node the run goes on, until a scheduler's early signal."""
    store = nodes.hold_store()
    for name in "ab":
        nodes.start(name)
    nodes.wait(lambda: nodes.steps() > 2)
    store.kill()
    for agent in nodes.agents.values():
        assert agent.wait(PATIENCE_SECONDS) == 2
    assert "error: the store at 127.0.0.1" in nodes.log("a") and "error: the store at 127.0.0.1" in nodes.log("b")
    nodes.agents.clear()
    done, store = nodes.steps(), nodes.hold_store()
    nodes.start("c")
    nodes.wait(lambda: nodes.steps() > done)
    nodes.agents["c"].send_signal(signal.SIGUSR1)
    assert nodes.agents["c"].wait(PATIENCE_SECONDS) == 128 + signal.SIGUSR1
    store.kill()
    assert (nodes.folder / "checkpoints" / "latest").read_text() == f"global_step{nodes.steps()}"
    check_stream(nodes)
    assert [line["done"] for line in nodes.lines()] == sorted([*range(1, nodes.steps() + 1), *range(1, done + 1)])


def test_the_example_goes_on_with_the_ranks_that_its_batch_has_use_for(tmp_path: Path) -> None:
    """One agent, without a store of one's own. On two ranks a batch of 9 can't be shared."""
    command = [sys.executable, "-m", "ucp_deepspeed.elastic", "--nproc-per-node", "2"]
    script = [str(ROOT / "examples" / "elastic_train.py"), "--save", str(tmp_path), "--steps"]
    told = []
    for batch, steps in (("9", "2"), ("24", "4")):
        done = subprocess.run(
            [*command, "--batch", batch, *script, steps], capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        told.append(done.stdout + done.stderr)
    assert "2 ranks are there; a batch of 9: rank 1 stands by" in told[0]
    assert re.findall(r"^step (\d): .* on (\d) ranks", "\n".join(told), re.MULTILINE) == [
        *(("1", "1"), ("2", "1"), ("3", "2"), ("4", "2"))
    ]
