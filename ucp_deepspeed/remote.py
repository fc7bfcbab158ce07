"""Folders in object stores and elsewhere, by their URL: the part of `pathlib.Path` that catalogs use, over fsspec.

fsspec says which URLs there are (``s3://``, ``gs://``, ``memory://``, …), and finds credentials. Here is what it leaves open:
reads by ranges that never fetch a whole file, one kind of error that names the URL, and what tells that an object was replaced.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, cast

from ucp_deepspeed import tunables
from ucp_deepspeed.errors import ConfigError

_URL = re.compile(r"(?:[A-Za-z][\w+.-]*::)*([A-Za-z][\w+.-]*)://")
"""The beginning of a URL; one of fsspec's may have others in front, as ``simplecache::s3://``."""

_JOINED = re.compile(r"(?:[A-Za-z][\w+.-]*::)*[A-Za-z][\w+.-]+:/(?!/)")
"""The beginning of a URL that has been a `pathlib.Path`."""

_LOCAL = ("file://", "local://")

_CHAIN = re.compile(r"((?:[A-Za-z][\w+.-]*::)*[A-Za-z][\w+.-]*://)(.*?)(::.*)?", re.DOTALL)
"""A URL: what stands before the path, the path, and what an archive lies in, as in ``zip://run::s3://bucket/run.zip``."""

_IDENTITIES = (
    *("ETag", "etag", "e_tag", "generation", "md5Hash", "content_md5"),
    *("mtime", "LastModified", "last_modified", "modified", "updated", "created"),
)
"""Keys under which the kinds of stores tell objects of one name apart, the surest first."""

_TIMES = ("mtime", "LastModified", "last_modified", "modified", "updated", "created")


_CREDENTIALS = (
    "give credentials where fsspec finds them: environment variables, or files such as ~/.config/fsspec/s3.json"
)


def is_url(path: object) -> bool:
    """Return whether a path is one that fsspec reads, and not of a mounted file system."""
    text = str(path)
    return "://" in text and _URL.match(text) is not None and not text.startswith(_LOCAL)


def on_disk(path: Any) -> Any:
    """Return the path that a URL of a mounted file system names, such as ``file:///runs``; all else as it is."""
    text = str(path)
    return text.partition("://")[2] if text.startswith(_LOCAL) else path


def located(path: object) -> Path:
    """Return the path that a text means: a `pathlib.Path`, or for a URL what behaves like one as far as this package uses it.

    Raises:
        ConfigError: fsspec knows no such URLs, or needs a package for them; or the path is a ``Path`` that was made of a URL.
    """
    if isinstance(path, RemotePath):
        return cast(Path, path)
    path = on_disk(path)
    text = str(path)
    if is_url(text):
        return cast(Path, RemotePath.of(text))
    if _JOINED.match(text) and not Path(text).parts[0] == "" and not Path(Path(text).parts[0]).exists():
        raise ConfigError(f"{text} was a URL before it became a Path, which joins slashes; give it as a text")
    return path if isinstance(path, Path) else Path(text)


def lies_in(path: Path, folder: Path) -> bool:
    """Return whether a path, links followed, is a folder or lies in it."""
    path, folder = path.resolve(), folder.resolve()
    return is_url(path) == is_url(folder) and path.is_relative_to(folder)


def is_taken(path: Path) -> bool:
    """Return whether something is at a path, be it a link that leads nowhere."""
    return path.exists() if is_url(path) else os.path.lexists(path)


class RemoteStatus(NamedTuple):
    """The status of an object or folder: the fields of `os.stat_result` that are used, and what tells versions of it apart."""

    st_size: int
    st_mtime: float
    st_mode: int
    identity: str

    @property
    def st_mtime_ns(self) -> int:
        """Time of the last write in nanoseconds."""
        return int(self.st_mtime * 1e9)


class RemotePath:
    """The path of an object or a folder. Each method does what that of `pathlib.Path` does, and may raise an OSError.

    Listings are kept until `refresh`: a checkpoint's files are looked up again and again.

    Attributes:
        fs: fsspec's file system.
        path: the path in it.
    """

    __slots__ = ("_url", "fs", "path")

    def __init__(self, fs: Any, path: str, url: str) -> None:
        self.fs, self.path, self._url = fs, path, url

    def _split(self) -> tuple[str, str, str]:
        """Return what stands before the path in the URL, the path without a slash at its end, and what an archive lies in."""
        found = _CHAIN.fullmatch(self._url)
        assert found is not None, self._url
        return found[1], found[2].rstrip("/"), found[3] or ""

    @classmethod
    def of(cls, url: str) -> RemotePath:
        """Return the path of a URL; see `located`."""
        from fsspec.core import url_to_fs
        from fsspec.registry import known_implementations

        try:
            fs, path = url_to_fs(url)
        except ImportError as error:
            kinds = [known_implementations.get(kind, {}) for kind in re.findall(r"([\w+.-]+)(?=::|://)", url)]
            packages = [str(kind.get("class", "")).partition(".")[0] for kind in kinds]
            needed = " ".join(name for name in packages if name not in ("", "fsspec"))
            raise ConfigError(f"{url} can't be read ({error}): pip install {needed or 'what it names'}") from error
        except Exception as error:
            told = str(error) or type(error).__name__
            raise ConfigError(f"{url} is no URL that fsspec can open: {told}; correct it, or name a folder") from error
        before, inner, outer = cls(fs, path, url)._split()
        return cls(fs, path.rstrip("/"), before + inner + outer)

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"RemotePath({self._url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self._url == other._url

    def __lt__(self, other: RemotePath) -> bool:
        return self._url < other._url

    def __hash__(self) -> int:
        return hash(self._url)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return RemotePath.of, (self._url,)

    def __truediv__(self, name: str | PurePosixPath) -> RemotePath:
        found = self
        for part in str(name).split("/"):
            if part == "..":
                found = found.parent
            elif part not in ("", "."):
                before, inner, outer = found._split()
                url = f"{before}{inner}/{part}{outer}" if inner else f"{before}{part}{outer}"
                found = RemotePath(found.fs, f"{found.path}/{part}" if found.path else part, url)
        return found

    def as_posix(self) -> str:
        """Return the URL."""
        return self._url

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the URL behind its ``://``, of which the first may be a bucket."""
        return tuple(part for part in self._split()[1].split("/") if part)

    @property
    def name(self) -> str:
        """The last part."""
        return self.parts[-1] if self.parts else ""

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> RemotePath:
        """The folder around it; of the first folder, itself."""
        if len(self.parts) < 2:
            return self
        before, inner, outer = self._split()
        return RemotePath(self.fs, self.path.rpartition("/")[0], before + inner.rpartition("/")[0] + outer)

    @property
    def parents(self) -> tuple[RemotePath, ...]:
        """The folders around it, the nearest first."""
        found, here = [], self
        while here.parent != here:
            here = here.parent
            found.append(here)
        return tuple(found)

    def with_name(self, name: str) -> RemotePath:
        """Return a path beside it."""
        return self.parent / name

    def is_relative_to(self, other: object) -> bool:
        """Return whether it lies in a folder, or is that."""
        if not isinstance(other, RemotePath):
            return is_url(other) and self.is_relative_to(located(other))
        (before, inner, outer), (first, around, last) = self._split(), other._split()
        inside = inner == around or not around or inner.startswith(f"{around}/")
        return (before, outer) == (first, last) and inside

    def relative_to(self, other: object) -> PurePosixPath:
        """Return the path below a folder."""
        if not self.is_relative_to(other):
            raise ValueError(f"{self} doesn't lie in {other}")
        around = cast(RemotePath, located(other))._split()[1]
        return PurePosixPath(self._split()[1][len(around) :].lstrip("/"))

    def absolute(self) -> RemotePath:
        """Return itself."""
        return self

    def resolve(self) -> RemotePath:
        """Return itself."""
        return self

    def is_symlink(self) -> bool:
        """Return False: stores have no links."""
        return False

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Raise the errors of a store, of whatever kind, as an OSError with the URL."""
        try:
            yield
        except OSError as error:
            told = error.strerror or str(error) or type(error).__name__
            kind = type(error) if type(error) in (FileNotFoundError, PermissionError, NotADirectoryError) else OSError
            raise kind(error.errno or _NUMBERS.get(kind, errno.EIO), told, self._url) from error
        except (MemoryError, RecursionError):
            raise
        except Exception as error:
            way = f"; {_CREDENTIALS}" if "Credential" in type(error).__name__ else ""
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}{way}", self._url) from error

    def refresh(self, everything: bool = False) -> None:
        """List the folder anew, if it is one.

        Args:
            everything: forget all else that is known of the store too.
        """
        if everything:
            _block.cache_clear()
        with self.telling():
            self.fs.invalidate_cache(None if everything else self.path)
            with suppress(FileNotFoundError, NotADirectoryError):
                self.fs.ls(self.path, detail=True)

    def _info(self) -> Mapping[str, Any] | None:
        with self.telling():
            try:
                return cast(Mapping[str, Any], self.fs.info(self.path))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def stat(self) -> RemoteStatus:
        """Return the status of an object or a folder."""
        info = self._info()
        if info is None:
            raise FileNotFoundError(errno.ENOENT, "No such object or folder", self._url)
        mode = stat.S_IFDIR if info["type"] == "directory" else stat.S_IFREG
        told = ((key, info[key]) for key in _IDENTITIES if info.get(key) is not None)
        key, identity = next(told, ("", ""))
        identity = identity.timestamp() if isinstance(identity, datetime) else identity
        seconds = next((seconds_of(info[key]) for key in _TIMES if info.get(key) is not None), 0.0)
        return RemoteStatus(int(info.get("size") or 0), seconds, mode, f"{key} {identity}")

    def exists(self) -> bool:
        """Return whether there is such an object, or one in such a folder."""
        return self._info() is not None

    def is_file(self) -> bool:
        """Return whether it is an object."""
        info = self._info()
        return info is not None and info["type"] == "file"

    def is_dir(self) -> bool:
        """Return whether it is a folder: whether there is an object in it."""
        info = self._info()
        return info is not None and info["type"] == "directory"

    def iterdir(self) -> Iterator[RemotePath]:
        """Yield what is in the folder."""
        with self.telling():
            names = [str(entry["name"]).rstrip("/").rpartition("/")[2] for entry in self.fs.ls(self.path, detail=True)]
        own = self.path.rpartition("/")[2]
        if len(names) == 1 and names[0] == own and self.is_file():
            raise NotADirectoryError(errno.ENOTDIR, "No folder", self._url)
        yield from (self / name for name in dict.fromkeys(names) if name and (name != own or (self / name).exists()))

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Yield what in the folder has a name of the pattern; behind a slash, what in the folders of such a name."""
        first, _, rest = pattern.partition("/")
        for entry in self.iterdir():
            if fnmatchcase(entry.name, first) and (not rest or entry.is_dir()):
                yield from entry.glob(rest) if rest else (entry,)

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        """Yield what in the folder, and in folders in it, has a name of the pattern."""
        for entry in self.iterdir():
            if fnmatchcase(entry.name, pattern):
                yield entry
            if entry.is_dir():
                yield from entry.rglob(pattern)

    def open(self, mode: str = "rb", buffering: int = -1) -> IO[bytes]:
        """Open an object to read bytes of it."""
        assert mode == "rb", mode
        raw = RemoteFile(self)
        return cast(IO[bytes], raw if buffering == 0 else io.BufferedReader(raw))

    def read_bytes(self) -> bytes:
        """Return the whole content of a small object."""
        return self.read_range(0, self.stat().st_size)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        """Put an object, in one step."""
        with self.telling():
            self.fs.pipe_file(self.path, text.encode(encoding))

    def upload(self, file: Path) -> None:
        """Put a file, in one step for readers.

        Raises:
            OSError: it couldn't be put, or has another size there.
        """
        numbytes = file.stat().st_size
        with self.telling():
            self.fs.put_file(str(file), self.path)
            self.fs.invalidate_cache(self.path)
        if (found := self.stat().st_size) != numbytes:
            raise OSError(errno.EIO, f"{found} bytes arrived of {numbytes}", self._url)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove an object."""
        with self.telling():
            try:
                self.fs.rm_file(self.path)
            except FileNotFoundError:
                if not missing_ok:
                    raise
            self.fs.invalidate_cache(self.path)

    def read_range(self, start: int, stop: int) -> bytes:
        """Return bytes of an object, by one request.

        Raises:
            OSError: the object ends before.
        """
        if start >= stop:
            return b""
        with self.telling():
            found = bytes(self.fs.cat_file(self.path, start=start, end=stop))
        if len(found) != stop - start:
            raise OSError(errno.EIO, f"{len(found)} bytes came of {stop - start} from byte {start} on", self._url)
        return found


_NUMBERS: Mapping[type[OSError], int] = {
    FileNotFoundError: errno.ENOENT,
    PermissionError: errno.EACCES,
    NotADirectoryError: errno.ENOTDIR,
}


def seconds_of(time: Any) -> float:
    """Return a time of a store in seconds; 0 if it is told in another way than is known."""
    if isinstance(time, str):
        try:
            time = datetime.fromisoformat(time.replace("Z", "+00:00"))
        except ValueError:
            return 0.0
    return float(time.timestamp() if isinstance(time, datetime) else time)


@lru_cache(maxsize=tunables.KEPT_BLOCKS)
def _block(path: RemotePath, version: RemoteStatus, number: int) -> bytes:
    """Return a block of an object of this version: a file's directory, its pickle and their like are read several times."""
    start = number * tunables.BLOCK_REQUEST_NUMBYTES
    return path.read_range(start, min(start + tunables.BLOCK_REQUEST_NUMBYTES, version.st_size))


class RemoteFile(io.RawIOBase):
    """An object, as a file to read. Small reads go through blocks that are kept, large ones straight to the store."""

    def __init__(self, path: RemotePath) -> None:
        super().__init__()
        self._path, self._status, self._place = path, path.stat(), 0
        if not stat.S_ISREG(self._status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "It is a folder", str(path))

    @property
    def numbytes(self) -> int:
        """Size of the object."""
        return self._status.st_size

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a place."""
        place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.numbytes}[whence]
        if place < 0:
            raise OSError(errno.EINVAL, "a place before the beginning")
        self._place = place
        return place

    def tell(self) -> int:
        """Return the place."""
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Fill memory, or read up to the end."""
        view = memoryview(buffer).cast("B")
        view = view[: max(self.numbytes - self._place, 0)]
        step, done = tunables.BLOCK_REQUEST_NUMBYTES, 0
        if len(view) > tunables.KEPT_READ_NUMBYTES:
            view[:] = self._path.read_range(self._place, self._place + len(view))
            done = len(view)
        while done < len(view):
            number, first = divmod(self._place + done, step)
            part = _block(self._path, self._status, number)[first : first + len(view) - done]
            view[done : done + len(part)] = part
            done += len(part)
        self._place += done
        return done


def numbytes_of(file: IO[bytes]) -> int:
    """Return the size of a file that is open, whichever it is; its place may change."""
    raw = getattr(file, "raw", file)
    return raw.numbytes if isinstance(raw, RemoteFile) else os.fstat(file.fileno()).st_size


def read_at(file: IO[bytes], start: int, numbytes: int) -> bytes:
    """Return bytes from a place of an open file, fewer at its end; its place may change."""
    raw = getattr(file, "raw", file)
    if not isinstance(raw, RemoteFile):
        return os.pread(file.fileno(), numbytes, start)
    file.seek(start)
    return file.read(numbytes)
