"""``ucp arm`` in virtual environments of the tests' own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from ucp_deepspeed.environment import FILE_NAME, LINE, VARIABLE

ROOT = Path(__file__).parents[3]
PRESENT = sysconfig.get_path("purelib")


class Environment:
    """A virtual environment that finds the packages of this one, but by a line and not by its own folder."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=120)
        self.python = folder / "bin" / "python"
        self.packages = next(folder.glob("lib/python*/site-packages"))
        self.line = self.packages / FILE_NAME
        self.others = self.packages / "a_present.pth"
        self.others.write_text(f"{PRESENT}\n{ROOT}\n")

    def run(self, *arguments: str, path: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """Start its Python away from the repository, without the variable unless it is given."""
        own = {name: value for name, value in os.environ.items() if name not in (VARIABLE, "VIRTUAL_ENV")}
        command, own = [str(self.python), *arguments], own | {"PYTHONPATH": path, **environment}
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=own, cwd="/", check=False)

    def arm(self, *options: str, path: str = "") -> tuple[int, list[str], str]:
        """Return status, lines and errors of ``ucp arm``."""
        done = self.run("-m", "ucp_deepspeed.cli", "arm", *options, path=path)
        return done.returncode, done.stdout.splitlines(), done.stderr

    def imported(self, **environment: str) -> tuple[str, str]:
        """Return which modules of the package, and of what it wraps with, a start imports; and what it says."""
        code = (
            "import sys; print(sorted({m.split('.')[0] for m in sys.modules} & {'ucp_deepspeed', 'wrapt', 'typing'}))"
        )
        done = self.run("-c", code, **environment)
        assert done.returncode == 0
        return done.stdout.strip(), done.stderr


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment that is left as it was found."""
    return Environment(tmp_path_factory.mktemp("arm") / "venv")


def test_arming_and_back(venv: Environment) -> None:
    """Each twice: the second time there's nothing to do."""
    for told in ("written", "is there already"):
        status, lines, errors = venv.arm()
        assert (status, errors) == (0, "")
        assert lines[0] == f"{venv.line} {told}: it does nothing unless UCP_DEEPSPEED is set"
        assert lines[1].startswith("next: UCP_DEEPSPEED=1 in the environment of a run") and len(lines) == 2
        assert venv.line.read_text() == LINE and len(LINE.splitlines()) == 1
    assert venv.line.stat().st_mode & 0o777 == 0o644
    assert sorted(path.name for path in venv.packages.iterdir()) == [venv.others.name, FILE_NAME]
    for nothing in ({}, {VARIABLE: ""}, {VARIABLE: "0"}):
        assert venv.imported(**nothing) == ("[]", "")
    assert venv.imported(UCP_DEEPSPEED="1") == ("['typing', 'ucp_deepspeed', 'wrapt']", "")
    for told in (f"{venv.line} removed: ", f"nothing to remove: there is no {venv.line}"):
        status, lines, errors = venv.arm("--off")
        assert (status, errors, venv.line.exists()) == (0, "", False)
        assert lines[0].startswith(told) and lines[1].startswith("next: import ucp_deepspeed") and len(lines) == 2
    assert venv.imported(UCP_DEEPSPEED="1") == ("[]", "")


def test_a_line_of_another_release_is_replaced(venv: Environment) -> None:
    venv.line.write_text("import nosuch\n")
    assert venv.arm()[1][0].endswith("written: it does nothing unless UCP_DEEPSPEED is set")
    assert venv.line.read_text() == LINE
    venv.arm("--off")


def test_a_package_that_is_gone_disturbs_nobody(venv: Environment) -> None:
    """It was uninstalled, and the line stayed."""
    venv.arm()
    kept = venv.others.read_text()
    venv.others.unlink()
    try:
        assert venv.imported(UCP_DEEPSPEED="1")[1] == ""
        status, _, errors = venv.arm(path=f"{ROOT}:{PRESENT}")
        assert (status, errors) == (0, "")  # a path that every start has is as good
    finally:
        venv.others.write_text(kept)
        venv.arm("--off")


def test_a_package_that_no_start_finds(venv: Environment, tmp_path: Path) -> None:
    """It was found in the working folder."""
    kept = venv.others.read_text()
    venv.others.write_text(f"{PRESENT}\n")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from ucp_deepspeed.cli import main; main(['arm'])"
    try:
        done = venv.run("-c", code)
        assert (done.returncode, done.stdout) == (2, "")
        assert "it doesn't find the package at its start; install the package into this environment" in done.stderr
    finally:
        venv.others.write_text(kept)
        venv.arm("--off")


def test_a_python_without_site_packages(tmp_path: Path) -> None:
    found = Environment(tmp_path / "venv")
    moved = found.packages.rename(tmp_path / "elsewhere")
    status, lines, errors = found.arm(path=f"{ROOT}:{PRESENT}")
    assert (status, lines) == (2, [])
    assert f"error: {found.python} has no site-packages in which it reads lines at its start" in errors
    assert str(found.packages) in errors and "start scripts with -m ucp_deepspeed.run" in errors.replace("\n", " ")
    done = subprocess.run(
        [found.python, "-S", "-m", "ucp_deepspeed.cli", "arm"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{PRESENT}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2 and "has no site-packages" in done.stderr
    found.packages.symlink_to("/proc/self")  # root can't write there either
    for options in ((), ("--off",)):
        status, lines, errors = found.arm(*options, path=f"{ROOT}:{PRESENT}")
        if not options:
            assert (status, lines) == (2, [])
            assert f"error: {found.packages} can't be written (" in errors and "call ucp arm as the owner" in errors
    found.packages.unlink()
    moved.rename(found.packages)
    found.line.mkdir()
    assert found.arm()[0] == 2 and list(found.line.iterdir()) == []
