"""Checkpoints in stores, by their URLs: the same values as of the same files on a disk, by ranges; and what goes wrong there."""

from __future__ import annotations

import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from click.testing import Result
from native_files import NativeModel, NativeParameter, NativeRun, write_native
from stores import Server, upload, use

import ucp_deepspeed
from ucp_deepspeed import tunables
from ucp_deepspeed.errors import CheckpointNotFoundError, ConfigError, DamagedCheckpointError, UniversalCheckpointError
from ucp_deepspeed.remote import RemotePath, located

TESTS = Path(__file__).parents[1]
GOLDEN = sorted(path.parent for path in (TESTS / "golden").rglob("latest"))

Ucp = Callable[..., Result]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four megabytes in each state of each of two parameters; DeepSpeed's files of two ranks."""
    values = torch.randn(2, 3, 1024, 1024, generator=torch.Generator().manual_seed(5))
    parameters = tuple(
        NativeParameter(name, held[0], {"exp_avg": held[1], "exp_avg_sq": held[2]})
        for name, held in zip(("one", "two"), values, strict=True)
    )
    return write_native(tmp_path_factory.mktemp("large") / "step3", NativeModel(parameters), NativeRun(dp=2, stage=1))


def every_value(path: str | Path) -> dict[tuple[str, str], torch.Tensor]:
    with ucp_deepspeed.open_checkpoint(path) as held:
        named = ((name, state) for name, each in held.parameters.items() for state in each.states)
        return {(name, state): held.read(name, state) for name, state in named}


def same(a: dict[Any, torch.Tensor], b: dict[Any, torch.Tensor]) -> bool:
    bits = lambda held: held.contiguous().view(-1).view(torch.uint8)  # noqa: E731
    return bool(a) and a.keys() == b.keys() and all(torch.equal(bits(a[key]), bits(b[key])) for key in a)


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_what_every_release_of_deepspeed_wrote(folder: Path) -> None:
    try:
        expected = every_value(folder)
    except UniversalCheckpointError as error:  # it needs a spec, on a disk and in a store
        with pytest.raises(type(error)):
            every_value(upload(folder, f"memory://golden/{folder.name}"))
        return
    assert same(every_value(upload(folder, f"memory://golden/{folder.name}")), expected)


def test_client_states(one: Path) -> None:
    """Tensors in it are read, those of the model aren't; they go on sharing storages."""
    path = one / "mp_rank_00_model_states.pt"
    held = torch.arange(6.0)
    values = OrderedDict(a=held, b=[held[2:], (torch.nn.Parameter(torch.ones(3)), torch.empty(0))], c={"n": 1})
    torch.save(torch.load(path, weights_only=False) | {"mine": values, "large": torch.zeros(1 << 16)}, path)
    state = ucp_deepspeed.open_checkpoint(upload(one, "memory://client")).client_state
    assert state.keys() == ucp_deepspeed.open_checkpoint(one).client_state.keys() == {"mine", "large"}
    mine = state["mine"]
    assert type(mine) is OrderedDict and torch.equal(mine["a"], held) and torch.equal(mine["b"][0], held[2:])
    assert mine["a"].untyped_storage().data_ptr() == mine["b"][0].untyped_storage().data_ptr()
    assert type(mine["b"][1][0]) is torch.nn.Parameter and mine["b"][1][1].numel() == 0 and mine["c"] == {"n": 1}


def test_every_form(one: Path, ucp: Ucp, tmp_path: Path, server: Server) -> None:
    """Universal, and weights for Hugging Face's libraries, from a store and in it; others are read below."""
    url = upload(one, "s3://bucket/forms/native")
    assert ucp("convert", url, tmp_path / "universal", "--quiet").exit_code == 0
    there = upload(tmp_path / "universal", "s3://bucket/forms/universal")
    assert ucp("diff", there, one).stdout.startswith("equal: ") and ucp("verify", there).exit_code == 0
    assert ucp("export", url, tmp_path / "hf", "--quiet").exit_code == 0
    assert same(every_value(upload(tmp_path / "hf", "s3://bucket/forms/hf")), every_value(tmp_path / "hf"))


FORMS: dict[str, tuple[str, ...]] = {
    "universal": ("convert", "--to", "universal"),
    "dcp": ("convert", "--to", "dcp"),
    "deepspeed-universal": ("convert", "--to", "deepspeed-universal"),
    "deepspeed": ("convert", "--to", "deepspeed", "--dp", "2", "--zero", "1"),
    "hf": ("export", "--max-shard-size", "1KB"),
    "torch": ("export", "--to", "torch"),
}
"""Forms to write, with the command."""

LAST = {
    "universal": "ucp_index.json",
    "dcp": ".metadata",
    "deepspeed": "ucp_manifest.json",
    "hf": "model.safetensors.index.json",
}
"""Objects that come last, before the file that names the folder."""


def objects_in(folder: str) -> dict[str, bytes]:
    fs, path = fsspec.core.url_to_fs(folder)
    fs.invalidate_cache()
    return {name.removeprefix(f"{path}/"): fs.cat_file(name) for name in fs.find(path)}


@pytest.mark.parametrize("form", FORMS)
def test_a_store_as_destination(form: str, one: Path, ucp: Ucp, server: Server, tmp_path: Path) -> None:
    """A store gets the same bytes as a disk. The object that makes the folder a checkpoint comes last, and nothing else stays."""
    command, *options = FORMS[form]
    expected = ucp(command, one, tmp_path / "written", *options)
    assert expected.exit_code == 0, expected.output
    server.count_anew()
    url = f"s3://bucket/written/{form}"
    told = ucp(command, one, url, *options)
    assert told.exit_code == 0 and re.search(rf"{url}\S*: read .* from \d+ files, wrote", told.output), told.output
    files = (path for path in (tmp_path / "written").rglob("*") if path.is_file())
    held = {path.relative_to(tmp_path / "written").as_posix(): path.read_bytes() for path in files}
    found = objects_in(url)
    assert held.keys() == found.keys() and [name for name in held if held[name] != found[name]] == []
    put = [path for path in server.put if not path.endswith(("latest", "latest_universal"))]
    assert put[0].endswith("ucp_unfinished.json") and put[-1].endswith(LAST.get(form, ""))
    if command == "convert":
        assert ucp("diff", url, one).stdout == ucp("diff", tmp_path / "written", one).stdout != ""
    again = ucp(command, one, url, *options)
    assert again.exit_code == 2 and "exists already; nothing was written" in again.output


def test_a_store_that_stops_taking_objects(one: Path, ucp: Ucp, server: Server) -> None:
    """Nothing is left there; what a killed writer left is told."""
    url = "s3://bucket/stopped"
    with server.failing(403, "PUT", "index"):
        told = ucp("convert", one, url)
    assert told.exit_code == 2 and "Forbidden" in told.output and url in told.output and objects_in(url) == {}
    with server.failing(403, "PUT"):
        assert ucp("convert", one, url).exit_code == 2
    fsspec.filesystem("s3").pipe_file(f"bucket/stopped/{one.name}/ucp_unfinished.json", b"")
    told = ucp("convert", one, url)
    assert told.exit_code == 2 and "exists already" in told.output
    with pytest.raises(DamagedCheckpointError, match="not finished"):
        ucp_deepspeed.open_checkpoint(f"{url}/{one.name}")


def test_commands(one: Path, ucp: Ucp, server: Server) -> None:
    run = upload(one.parent, "s3://bucket/run")
    told = ucp("inspect", f"{run}/{one.name}")
    assert told.exit_code == 0 and re.search(r"^path +s3://bucket/run/global_step5$", told.stdout, re.MULTILINE)
    assert ucp("diff", f"{run}/{one.name}", one).stdout.startswith("equal: ")
    assert ucp("verify", f"{run}/{one.name}").exit_code in (0, 1)
    assert ucp("plan", f"{run}/{one.name}", "--dp", 4, "--zero", 3).exit_code == 0
    assert ucp_deepspeed.tags(run) == [one.name]
    refused = ucp("prune", run, "--keep-last", 1)
    assert refused.exit_code == 2 and "aws s3 rm" in refused.output


def test_folders_of_a_disk_by_url(one: Path, ucp: Ucp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ucp("inspect", f"file://{one}").exit_code == 0
    assert ucp("convert", f"local://{one}/", f"file://{tmp_path}/made").exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"one", "made"}
    assert ucp("diff", "file://made", one).stdout.startswith("equal: ")


def test_archives(one: Path, ucp: Ucp, server: Server, tmp_path: Path) -> None:
    """A URL of what lies in an archive has the archive behind it."""
    (tmp_path / "around").mkdir()
    shutil.copytree(one, tmp_path / "around" / one.name)
    archive = shutil.make_archive(str(tmp_path / "runs"), "zip", tmp_path, "around")
    fsspec.filesystem("s3").put_file(archive, "bucket/runs.zip")
    for url in (f"zip://around/::file://{archive}", "zip://around::s3://bucket/runs.zip"):
        assert ucp("diff", url, one, "--tag-a", one.name).stdout.startswith("equal: ")
        assert ucp("verify", url, "--tag", one.name).exit_code == ucp("verify", one).exit_code


def test_only_the_bytes_that_are_wanted(large: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look into the metadata of 24 MB takes little, and a slice takes its own bytes."""
    url = upload(large, "s3://bucket/large")
    whole = sum(path.stat().st_size for path in large.iterdir())
    server.count_anew()
    with ucp_deepspeed.open_checkpoint(url) as held, ucp_deepspeed.open_checkpoint(large) as local:
        assert held.parameters.keys() == local.parameters.keys()
        metadata = server.sent
        assert metadata < 8 * tunables.BLOCK_REQUEST_NUMBYTES < whole / 8
        rows = held.read("two", "exp_avg", slice(100, 612))  # and a little for the comparison of files with one another
        server.count_anew()
        rows = held.read("two", "exp_avg", slice(100, 612))
        assert torch.equal(rows, local.read("two", "exp_avg", slice(100, 612)))
        assert server.sent == rows.nbytes
        held.read("one", "exp_avg", (0, 0))
        server.count_anew()
        columns = held.read("one", "exp_avg", (slice(0, 64), slice(0, 512)))  # short runs: their gaps are fetched too
        assert torch.equal(columns, local.read("one", "exp_avg", (slice(0, 64), slice(0, 512))))
        assert columns.nbytes < server.sent <= 2 * columns.nbytes and len(server.requested) == 1


def test_short_requests(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little a request may fetch."""
    url = upload(large, "memory://large")
    longest = 0
    read_range = RemotePath.read_range

    def noted(path: RemotePath, start: int, stop: int) -> bytes:
        nonlocal longest
        longest = max(longest, stop - start)
        return read_range(path, start, stop)

    monkeypatch.setattr(RemotePath, "read_range", noted)
    monkeypatch.setattr(tunables, "BLOCK_REQUEST_NUMBYTES", 1 << 12)
    view = ucp_deepspeed.open_checkpoint(url)
    view._checking_reader._request_numbytes = 1 << 16
    assert torch.equal(view.read("two", "fp32"), ucp_deepspeed.open_checkpoint(large).read("two", "fp32"))
    assert longest == 1 << 16


def test_an_object_that_is_replaced(large: Path, server: Server) -> None:
    url = upload(large, "s3://bucket/replaced")
    held = ucp_deepspeed.open_checkpoint(url)
    name = min(path.name for path in large.iterdir() if "optim" in path.name)
    content = bytearray((large / name).read_bytes())
    content[len(content) // 2] ^= 1
    fsspec.filesystem("s3").pipe_file(f"bucket/replaced/{name}", bytes(content))
    with pytest.raises(DamagedCheckpointError, match=f"s3://bucket/replaced/{name} was changed while it was read"):
        held.read("one", "exp_avg", slice(0, 2))


@pytest.mark.parametrize("what", ["missing", "shorter", "lost"])
def test_an_object_that_is_not_whole(what: str, large: Path, server: Server, tmp_path: Path) -> None:
    """Objects that are missing or cut, or that the store can't send."""
    copy = Path(shutil.copytree(large, tmp_path / "copy"))
    path = max((path for path in copy.iterdir() if "optim" in path.name), key=lambda path: path.name)
    url = upload(copy, f"s3://bucket/{what}")
    fs = fsspec.filesystem("s3")
    if what == "missing":
        fs.rm(f"bucket/{what}/{path.name}")
    elif what == "shorter":
        fs.pipe_file(f"bucket/{what}/{path.name}", path.read_bytes()[:-5000])
    fs.invalidate_cache()
    with pytest.raises(DamagedCheckpointError, match=re.escape(path.name)) as error:
        if what == "lost":
            held = ucp_deepspeed.open_checkpoint(url)
            with server.failing(416, "GET", path.name):
                held.read("two", "exp_avg")
        else:
            ucp_deepspeed.open_checkpoint(url).read("two", "exp_avg")
    assert f"s3://bucket/{what}" in str(error.value)


def test_a_store_that_refuses(one: Path, server: Server, ucp: Ucp) -> None:
    url = upload(one, "s3://bucket/refused")
    with server.failing(403):
        told = ucp("inspect", url)
    assert told.exit_code == 2 and "s3://bucket/refused" in told.output and "Forbidden" in told.output
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint folder at s3://nobody/has/this"):
        ucp_deepspeed.open_checkpoint("s3://nobody/has/this")


def test_no_credentials(one: Path, server: Server, ucp: Ucp, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3 = fsspec.get_filesystem_class("s3")
    s3.clear_instance_cache()
    told = [ucp("inspect", "s3://bucket/any"), ucp("convert", one, "s3://bucket/any")]
    s3.clear_instance_cache()
    for each in told:
        assert each.exit_code == 2 and "NoCredentialsError" in each.stderr and "give credentials" in each.stderr


def test_a_server_that_is_gone(one: Path, server: Server) -> None:
    gone = Server()
    url = upload(one, "s3://bucket/gone")
    gone.stop()
    try:
        with pytest.raises(DamagedCheckpointError, match="s3://bucket/gone can't be read: EndpointConnectionError"):
            ucp_deepspeed.open_checkpoint(url)
    finally:
        use(server.endpoint)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("zzz://a/b", "zzz://a/b is no URL that fsspec can open: Protocol not known: zzz"),
        ("gs://a/b", "gs://a/b can't be read .*: pip install gcsfs"),
        (Path("s3://a/b"), "s3:/a/b was a URL before it became a Path"),
    ],
)
def test_urls_that_are_none(url: str | Path, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ucp_deepspeed.open_checkpoint(url)


def test_an_object_that_ends_early() -> None:
    fsspec.filesystem("memory").pipe_file("/short/x", b"abc")
    path = RemotePath.of("memory://short/x")
    assert path.read_range(1, 3) == b"bc"
    with pytest.raises(OSError, match="2 bytes came of 8 from byte 1 on") as caught:
        path.read_range(1, 9)
    assert caught.value.filename == "memory://short/x"


def test_paths() -> None:
    """As of `pathlib.Path`, as far as they are used."""
    path = located("memory://run/step3")
    assert str(path / "a" / "../b.pt") == "memory://run/step3/b.pt" and (path / "b.pt").suffix == ".pt"
    assert path.parent == located("memory://run/") and path.parent.parent == path.parent and path.name == "step3"
    assert str((path / "b").relative_to(path.parent)) == "step3/b" and not path.is_relative_to(located("memory://ru"))
    assert located("file:///tmp/x") == Path("/tmp/x")
    assert str(located("simplecache::memory://run/x").parent) == "simplecache::memory://run"


def test_paths_in_archives(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").write_bytes(b"abc")
    outer = f"::file://{shutil.make_archive(str(tmp_path / 'x'), 'zip', tmp_path, 'run')}"
    top, run = located(f"zip://{outer}"), located(f"zip://run/{outer}")
    assert str(run / "a") == f"zip://run/a{outer}" and (run / "a").parent == run == top / "run" and run.parent == run
    assert [path.name for path in (top / "run").iterdir()] == ["a"]
    assert (run / "a").is_relative_to(run) and str((run / "a").relative_to(top)) == "run/a"
    assert located(str(run / "a")).read_bytes() == b"abc" and [path.name for path in run.iterdir()] == ["a"]
