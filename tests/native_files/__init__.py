"""An oracle: write DeepSpeed's native checkpoint files by brute force, from whole tensors.

Everything is plain ``cat``, ``pad`` and ``chunk`` on real tensors. It shares no geometry with the package, so that the two can be
checked against each other. Padding is NaN wherever DeepSpeed doesn't promise a value, so that any leak shows.

File names, keys, types and order: DeepSpeed 0.19.8, ``runtime/engine.py``, ``runtime/zero/stage_1_and_2.py``,
``runtime/zero/stage3.py``, ``runtime/bf16_optimizer.py``, ``runtime/fp16``, ``runtime/pipe/module.py``.
"""

from native_files.described import Cut, NativeModel, NativeParameter, NativeRun
from native_files.files import add_manifest, write_native
from native_files.universal import as_version_1

__all__ = ["Cut", "NativeModel", "NativeParameter", "NativeRun", "add_manifest", "as_version_1", "write_native"]
