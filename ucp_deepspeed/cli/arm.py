"""``ucp arm``: the line in site-packages that looks at ``UCP_DEEPSPEED`` whenever Python starts."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

import click

from ucp_deepspeed.environment import FILE_NAME, LINE, VARIABLE
from ucp_deepspeed.errors import UniversalCheckpointError


def write(off: bool) -> None:
    """Do what ``ucp arm`` says."""
    folders = _folders()
    if off:
        _remove([folder / FILE_NAME for folder in folders])
        return
    path = folders[0] / FILE_NAME
    known = path.is_file() and path.read_text(encoding="utf-8", errors="replace") == LINE
    if not known:
        _put(path)
    if not _arms(folders[0]):
        raise UniversalCheckpointError(
            f"{path} is written, and {sys.executable} still doesn't arm itself with {VARIABLE}=1: it doesn't find the package at "
            f"its start; install the package into this environment with pip, or start scripts with -m ucp_deepspeed.run"
        )
    click.echo(f"{path} {'is there already' if known else 'written'}: it does nothing unless {VARIABLE} is set")
    click.echo(
        f"next: {VARIABLE}=1 in the environment of a run, on every machine, arms it; ucp arm --off takes this back"
    )


def _folders() -> list[Path]:
    """Return the folders of this Python in which it reads such lines, the one that pip installs into first."""
    named = [Path(folder) for folder in dict.fromkeys((sysconfig.get_path("purelib"), *site.getsitepackages()))]
    read = {*map(os.path.realpath, site.getsitepackages())}
    found = [folder for folder in named if folder.is_dir() and os.path.realpath(folder) in read]
    if not found or sys.flags.no_site:
        raise UniversalCheckpointError(
            f"{sys.executable} has no site-packages in which it reads lines at its start (looked for "
            f"{', '.join(map(str, named))}); make a virtual environment, install the package there, and call its ucp arm; or "
            f"start scripts with -m ucp_deepspeed.run, which needs no such line"
        )
    return found


def _put(path: Path) -> None:
    """Write the line. The file appears when it is whole: Python may start at any moment."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        hidden.write_text(LINE, encoding="utf-8")
        hidden.chmod(0o644)  # for whoever else starts this Python
        hidden.replace(path)
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    finally:
        hidden.unlink(missing_ok=True)


def _arms(folder: Path) -> bool:
    """Start Python with the variable, and see whether the line works: perhaps the working folder alone leads to the package."""
    code = "import sys; sys.exit('ucp_deepspeed' not in sys.modules)"
    started = subprocess.run([sys.executable, "-c", code], env=os.environ | {VARIABLE: "1"}, cwd=folder, check=False)
    return started.returncode == 0


def _remove(paths: list[Path]) -> None:
    there = [path for path in paths if path.is_file() or path.is_symlink()]
    for path in there:
        try:
            path.unlink()
        except OSError as error:
            raise _unwritable(path.parent, error) from error
        click.echo(f"{path} removed: {VARIABLE} arms nothing here any more")
    if not there:
        click.echo(f"nothing to remove: there is no {' and no '.join(map(str, paths))}")
    click.echo(
        "next: import ucp_deepspeed in the script, or start it with -m ucp_deepspeed.run; ucp arm writes the line again"
    )


def _unwritable(folder: Path, error: OSError) -> UniversalCheckpointError:
    return UniversalCheckpointError(
        f"{folder} can't be written ({error.strerror or error}); call ucp arm as the owner of {sys.executable}'s environment, or "
        f"in a virtual environment of your own; or start scripts with -m ucp_deepspeed.run, which needs no such line"
    )
