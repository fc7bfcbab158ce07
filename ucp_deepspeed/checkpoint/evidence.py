"""The evidence in a tag folder: which files belong to it, which sums there are of them, and whether they are of one save."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from ucp_deepspeed.checkpoint.bounds import check_inside
from ucp_deepspeed.checkpoint.checkpoint import GROUP_STEP, Checkpoint
from ucp_deepspeed.checkpoint.checksums import CHECKSUMS_NAME, FileSums, SavedSums
from ucp_deepspeed.checkpoint.dcp.metadata import METADATA_NAME, read_metadata
from ucp_deepspeed.checkpoint.deepspeed.catalog import DeepSpeedCheckpoint
from ucp_deepspeed.checkpoint.deepspeed.consolidated import ATOMS_FOLDER, is_consolidated
from ucp_deepspeed.checkpoint.deepspeed.manifest import (
    MANIFEST_NAME,
    MARK_NAME,
    Manifest,
    digest_of,
    read_manifest,
)
from ucp_deepspeed.checkpoint.deepspeed.written_names import is_deepspeeds
from ucp_deepspeed.checkpoint.encoding import has_its_sum, read_document
from ucp_deepspeed.checkpoint.huggingface import is_file_of, is_huggingface
from ucp_deepspeed.checkpoint.random_files import (
    FORMER_NAMES,
    RANDOM_STATES_NAME,
    parse_state,
    path_of,
    read_state,
)
from ucp_deepspeed.checkpoint.tags import is_dcp, is_marked
from ucp_deepspeed.checkpoint.torch_dist.catalog import COMMON_NAME, CONFIG_NAME, is_torch_dist
from ucp_deepspeed.checkpoint.torch_files.damage import REMEDY
from ucp_deepspeed.checkpoint.torch_files.safe_load import scalar_of
from ucp_deepspeed.checkpoint.universal.index import FORMAT_VERSION, INDEX_NAME, Index
from ucp_deepspeed.errors import DamagedCheckpointError, UniversalCheckpointError, UnsupportedError

What = Literal[
    "missing",
    "size",
    "archive",
    "bytes",
    "unreadable",
    "content",
    "manifest",
    "checksums",
    "random_states",
    "step",
    "checkpoint",
]


class Problem(NamedTuple):
    """Something that is wrong with a checkpoint.

    Attributes:
        file: name of the file; None if it isn't of one file.
        what: its kind, in one word.
        detail: the message.
    """

    file: str | None
    what: What
    detail: str


@dataclass
class Evidence:
    """Everything that a tag folder tells of its files, besides their contents.

    Attributes:
        path: the folder.
        names: files that are there and belong to the checkpoint.
        others: all other files there.
        summed: files whose own sum was compared when the evidence was read.
        random_states: number of ranks whose random state is there.
        problems, doubts: see `ucp_deepspeed.transfer.verification.Verification`.
    """

    path: Path
    names: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    summed: set[str] = field(default_factory=set)
    random_states: int = 0
    problems: list[Problem] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    manifest: Manifest | None = None
    save_id: str | None = None
    sums: SavedSums | None = None

    def sums_of(self, name: str) -> FileSums | None:
        """Return what the save told of a file's content; None if it told nothing."""
        try:
            return None if self.sums is None else self.sums.of(name)
        except DamagedCheckpointError as error:
            self.problems.append(Problem(CHECKSUMS_NAME, "checksums", str(error)))
            return None

    def add(self, file: str | None, what: What, detail: str) -> None:
        """Add a problem; ``detail`` begins behind the path of the file."""
        place = self.path if file is None else self.path / file
        self.problems.append(Problem(file, what, f"{place} {detail}"))

    def of_one_save(self, checkpoint: Checkpoint) -> tuple[list[Problem], list[str]]:
        """Compare the files' contents with one another; return problems, and doubts."""
        wrong = list({str(error): error for error in _errors(checkpoint)}.values())
        known = {problem.file for problem in self.problems}
        found = [
            Problem(None, "step" if " of step " in str(error) else "checkpoint", str(error))
            for error in wrong
            if isinstance(error, DamagedCheckpointError) and not any(name and name in str(error) for name in known)
        ]
        doubts = [str(error) for error in wrong if isinstance(error, UnsupportedError)]
        if not isinstance(checkpoint, DeepSpeedCheckpoint):
            return found, doubts
        vouched = self.manifest is not None and self.manifest.contents.keys() >= set(filter(is_deepspeeds, self.names))
        return found, doubts if wrong or self.problems or vouched else list(_steps(checkpoint))


def evidence_of(folder: Path) -> Evidence:
    """Read the evidence in a tag folder."""
    evidence = Evidence(folder)
    there = sorted(str(entry.relative_to(folder)) for entry in folder.rglob("*") if entry.is_file())
    atoms = f"{ATOMS_FOLDER}/" if is_consolidated(folder) else MANIFEST_NAME
    of = _of_index if INDEX_NAME in there else _of_metadata if is_dcp(folder) else partial(_of_manifest, there=there)
    listed = of(evidence)
    weights = is_huggingface(folder) and not any(map(is_deepspeeds, there))
    ours = {INDEX_NAME, MANIFEST_NAME, CHECKSUMS_NAME, RANDOM_STATES_NAME}
    earlier = evidence.manifest.earlier if evidence.manifest is not None else ()
    known = [
        name
        for name in there
        if name in listed
        or name in ours
        or (is_deepspeeds(name) and name not in earlier)
        or Path(name).match(FORMER_NAMES)
        or name.startswith(atoms)
        or (weights and is_file_of(name))
    ]
    if is_marked(folder):
        evidence.doubts.append(f"a save into {folder} was not finished, as {MARK_NAME} tells")
    evidence.names, evidence.others = tuple(known), tuple(name for name in there if name not in known)
    _check_random_states(evidence)
    return evidence


def _of_index(evidence: Evidence) -> Collection[str]:
    """Read the index of a universal checkpoint; return the files that it lists."""
    try:
        index = read_document(evidence.path / INDEX_NAME, Index, "an index", FORMAT_VERSION)
    except (UniversalCheckpointError, OSError) as error:
        evidence.problems.append(Problem(INDEX_NAME, "checkpoint", str(error)))
        return ()
    evidence.save_id = index.save_id
    _check_sizes(evidence, index.files, "the index")
    if index.checksums is not None:
        _read_sums(evidence, index.checksums, index.save_id)
    if has_its_sum((evidence.path / INDEX_NAME).read_bytes()):
        evidence.summed.add(INDEX_NAME)
    elif index.format_version > 1:
        evidence.add(INDEX_NAME, "checkpoint", f"isn't as it was written; {REMEDY}")
    return index.files.keys()


def _of_metadata(evidence: Evidence) -> Collection[str]:
    """Read the metadata of a folder of ``torch.distributed.checkpoint``; return its files."""
    try:
        sizes = read_metadata(evidence.path / METADATA_NAME).sizes
    except (UniversalCheckpointError, OSError) as error:
        evidence.problems.append(Problem(METADATA_NAME, "checkpoint", str(error)))
        return [METADATA_NAME]
    beside = (COMMON_NAME, CONFIG_NAME) if is_torch_dist(evidence.path) else ()
    for name in (*sizes, *beside):
        if not (evidence.path / name).is_file():
            evidence.add(name, "missing", f"is missing, and {METADATA_NAME} tells of it; {REMEDY}")
    return {METADATA_NAME, *sizes, *beside}


def _read_sums(evidence: Evidence, checksums: str, save_id: str | None) -> None:
    """Read the sums of the files; see `SavedSums`."""
    try:
        evidence.sums = SavedSums(evidence.path, checksums, save_id)
        evidence.summed.add(CHECKSUMS_NAME)
    except UniversalCheckpointError as error:
        evidence.problems.append(Problem(CHECKSUMS_NAME, "checksums", str(error)))


def _of_manifest(evidence: Evidence, there: Collection[str]) -> Collection[str]:
    """Read manifest and sums of a folder that DeepSpeed wrote; return the files that they list."""
    try:
        evidence.manifest = manifest = read_manifest(evidence.path)
    except (UniversalCheckpointError, OSError) as error:
        evidence.problems.append(Problem(MANIFEST_NAME, "manifest", str(error)))
        return ()
    if manifest is None:
        if CHECKSUMS_NAME in there:
            evidence.doubts.append(f"{CHECKSUMS_NAME} is there, and no {MANIFEST_NAME} tells which save it is of")
        return ()
    if has_its_sum((evidence.path / MANIFEST_NAME).read_bytes()):
        evidence.summed.add(MANIFEST_NAME)
    elif manifest.save_id is not None:  # releases that wrote no sum wrote no id either
        evidence.add(MANIFEST_NAME, "manifest", f"isn't as it was saved; {REMEDY}")
    evidence.save_id = manifest.save_id
    _check_sizes(evidence, manifest.files, MANIFEST_NAME)
    for name, digest in manifest.contents.items():
        try:
            if name in there and digest_of(evidence.path / name) != digest:
                evidence.add(name, "content", f"isn't the file that {MANIFEST_NAME} describes; {REMEDY}")
        except OSError as error:
            evidence.add(name, "unreadable", f"can't be read: {error.strerror or error}; {REMEDY}")
    if manifest.checksums is None:
        return manifest.files.keys()
    _read_sums(evidence, manifest.checksums, manifest.save_id)
    if evidence.sums is None:
        return manifest.files.keys()
    for name in evidence.sums.names:
        if name not in there and name not in manifest.files:
            evidence.add(name, "missing", f"is missing, and {CHECKSUMS_NAME} tells of it; {REMEDY}")
    return {*manifest.files, *evidence.sums.names}


def _check_sizes(evidence: Evidence, files: Mapping[str, int], by: str) -> None:
    for name, size in files.items():
        path = evidence.path / name
        if Path(name).is_absolute() or ".." in Path(name).parts:  # no size of a file elsewhere is anybody's business
            evidence.problems.append(
                Problem(None, "checkpoint", f"{by} of {evidence.path} tells of a file outside: {name}")
            )
        elif not path.is_file():
            evidence.add(name, "missing", f"is missing, and {by} tells of it; {REMEDY}")
        elif (found := path.stat().st_size) != size:
            evidence.add(name, "size", f"has {found} bytes, and {by} says {size}; {REMEDY}")


def _check_random_states(evidence: Evidence) -> None:
    """Read the random state of each rank."""
    steps = set()
    rank, ranks = 0, 1
    while rank < ranks and (path := path_of(evidence.path, rank)) is not None:
        try:
            if (evidence.path / INDEX_NAME).is_file():
                check_inside(path)
            content = read_state(path, rank, evidence.save_id)
            if content is None:
                break
            state = parse_state(content, path, rank)
        except (UniversalCheckpointError, OSError) as error:
            evidence.problems.append(Problem(path.name, "random_states", f"{error}; {REMEDY}"))
            return
        ranks = state.place.world_size if path.name == RANDOM_STATES_NAME else ranks
        steps.add(state.global_steps)
        rank += 1
    evidence.random_states = rank
    if len(steps) > 1:
        evidence.add(RANDOM_STATES_NAME, "random_states", f"holds states of steps {sorted(steps)}; {REMEDY}")
    if 0 < rank < ranks:
        evidence.add(RANDOM_STATES_NAME, "random_states", f"holds states of {rank} ranks, of {ranks}; {REMEDY}")


def _places(checkpoint: DeepSpeedCheckpoint) -> Iterator[tuple[int, int]]:
    """Yield model-parallel rank and partition of each rank that has a file of the optimizer's."""
    for rank in range(checkpoint.topology.model_parallel):
        for part in range(checkpoint.topology.dp):
            yield rank, part


def _errors(checkpoint: Checkpoint) -> Iterator[UniversalCheckpointError]:
    """Open all files that a load on another topology could; yield the errors."""
    opening: list[Callable[[], Any]] = [lambda: checkpoint.parameters, lambda: checkpoint.groups]
    if isinstance(checkpoint, DeepSpeedCheckpoint):
        opening += _openings(checkpoint)
    for each in opening:
        try:
            each()
        except UniversalCheckpointError as error:
            yield error


def _openings(checkpoint: DeepSpeedCheckpoint) -> list[Callable[[], Any]]:
    """Return what opens each file."""
    files, topology = checkpoint.files, checkpoint.topology
    sliced = files.sliced
    opening: list[Any] = []
    for rank, part in _places(checkpoint):
        if sliced or part == 0:
            opening.append(lambda rank=rank, part=part: files.model_states(rank, part))
        if sliced or files.partitioned:
            opening.append(lambda rank=rank, part=part: files.optimizer_state(rank, part))
    opening += [lambda rank=rank: checkpoint.local_shapes(rank) for rank in range(topology.model_parallel)]
    opening += [lambda name=name: files.open(files.path / name) for name in sorted(files.names) if is_deepspeeds(name)]
    return opening


def _steps(checkpoint: DeepSpeedCheckpoint) -> Iterator[str]:
    """Yield doubts about the steps that the optimizer's files tell of: nothing else tells of which save they are."""
    files, run = checkpoint.files, checkpoint.run
    taken: dict[str, float] = {}
    for rank, part in _places(checkpoint):
        if files.sliced or files.partitioned:
            path = files.optimizer_path(rank, part)
        elif part == 0:
            path = files.model_states_path(rank, part)
        else:
            continue
        saved = files.open(path)
        held = saved.get("optimizer_state_dict", saved.get("optimizer"))
        if steps := [step for step in _steps_in(held, path) if step > 0]:
            taken[path.name] = max(steps)
    told = sorted(set(taken.values()))
    expected = run.global_steps - run.skipped_steps
    if len(told) > 1:
        last = next(name for name, step in taken.items() if step == told[-1])
        first = next(name for name, step in taken.items() if step == told[0])
        yield (
            f"the optimizer took {told[0]:g} steps in {first}, and {told[-1]:g} in {last}: files of two saves, or parameters "
            f"that were trained from a later step on"
        )
    elif told and told[0] not in (expected, expected + 1):  # 16-bit wrappers of stage 0 count one more
        yield (
            f"the optimizer took {told[0]:g} steps, and the run {expected}: files of two saves, or an optimizer that began anew"
        )


def _steps_in(value: Any, path: Path) -> Iterator[float]:
    """Yield the numbers under the key ``step``, at any depth."""
    if isinstance(value, Mapping):
        for key, held in value.items():
            number = isinstance(held, int | float) or (isinstance(held, torch.Tensor) and held.numel() == 1)
            if key in (GROUP_STEP, "base_optimizer_state_step") and number:
                yield float(scalar_of(held, path))
            else:
                yield from _steps_in(held, path)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for held in value:
            yield from _steps_in(held, path)
