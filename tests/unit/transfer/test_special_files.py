"""A pipe, a device, a folder or a link to nothing in the place of a file: none is waited for, and none passes as sound."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ucp_deepspeed
from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.checksums import CHECKSUMS_NAME
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME, MARK_NAME
from ucp_deepspeed.checkpoint.random_files import RANDOM_STATES_NAME
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import UniversalCheckpointError
from ucp_deepspeed.transfer.conversion import convert

SAVED = [
    MANIFEST_NAME,
    CHECKSUMS_NAME,
    RANDOM_STATES_NAME,
    "mp_rank_00_model_states.pt",
    "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
]
CONVERTED = ["ucp_index.json", CHECKSUMS_NAME, RANDOM_STATES_NAME, "atoms-00001-of-00001.safetensors"]
KINDS = ["pipe", "link to a pipe", "device", "folder", "link to nothing"]

Copy = Callable[[str, str], Path]


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """Each test has seconds."""

    def late(*_: object) -> None:
        raise TimeoutError("it waits")

    former = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


def put(kind: str, path: Path) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        target = "/dev/zero" if kind == "device" else path.with_name("elsewhere")
        path.symlink_to(target)
        if kind == "link to a pipe":
            os.mkfifo(target)


def use(folder: Path, to: Path) -> None:
    convert(UniversalView.of(open_checkpoint(folder)), to)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SAVED)
def test_in_a_saved_folder(name: str, kind: str, engine_copy: Copy, tmp_path: Path) -> None:
    folder = engine_copy("zero1", "x")
    put(kind, folder / name)
    try:
        assert ucp_deepspeed.verify(folder).verdict == "damaged"
    except UniversalCheckpointError as error:
        assert name in str(error)
    with pytest.raises(UniversalCheckpointError, match=name):
        use(folder, tmp_path / "u")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONVERTED)
def test_in_a_converted_folder(name: str, kind: str, engine_copy: Copy, tmp_path: Path) -> None:
    folder = tmp_path / "u"
    use(engine_copy("zero1", "x"), folder)
    put(kind, folder / name)
    with pytest.raises((UniversalCheckpointError, AssertionError)):
        assert ucp_deepspeed.verify(folder).verdict == "whole"
    if name != CONVERTED[2]:  # else there is no random state
        with pytest.raises(UniversalCheckpointError):
            use(folder, tmp_path / "v")


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_place_of_a_mark(kind: str, engine_copy: Copy) -> None:
    folder = engine_copy("zero1", "x")
    (folder / MANIFEST_NAME).unlink()
    put(kind, folder / MARK_NAME)
    with pytest.raises(UniversalCheckpointError, match="was not finished"):
        open_checkpoint(folder)


def test_a_manifest_that_is_a_link_to_nothing(engine_copy: Copy) -> None:
    folder = engine_copy("zero1", "x")
    put("link to nothing", folder / MANIFEST_NAME)
    with pytest.raises(
        UniversalCheckpointError, match=f"{MANIFEST_NAME} is a link to .*elsewhere.* remove {MANIFEST_NAME}"
    ):
        open_checkpoint(folder)
    assert [problem.what for problem in ucp_deepspeed.verify(folder).problems][:1] == ["manifest"]


def test_sums_without_a_manifest(engine_copy: Copy, caplog: pytest.LogCaptureFixture) -> None:
    folder = engine_copy("zero1", "x")
    with caplog.at_level(logging.WARNING, "ucp_deepspeed"):
        ucp_deepspeed.open_checkpoint(folder)
        assert not caplog.records
        (folder / MANIFEST_NAME).unlink()
        ucp_deepspeed.open_checkpoint(folder)
    [told] = caplog.messages
    assert CHECKSUMS_NAME in told and MANIFEST_NAME in told and "remove the checksums" in told
    assert ucp_deepspeed.verify(folder).verdict == "unproven"
