"""The end of a process that shall go quickly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import atexit, gc, sys
from ucp_deepspeed.waiting import end_quickly

class Cycle:
    def __init__(self, path, mode):
        self.own, self.file = self, open(path, mode)

atexit.register(lambda: print(gc.get_freeze_count() > 0))
end_quickly()
for name, mode, text in ("a", "w", "text"), ("b", "wb", b"bytes"), ("c", "w", "closed"):
    cycle = Cycle(f"{sys.argv[1]}/{name}", mode)
    cycle.file.write(text)
cycle.file.close()
del cycle
"""


def test_buffers_are_written_and_cycles_left(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
    assert [(tmp_path / name).read_text() for name in "abc"] == ["text", "bytes", "closed"]
