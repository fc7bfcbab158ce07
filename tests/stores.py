"""A real S3-compatible server on loopback, which counts what it sends and fails when it is told to, and copies into stores.

s3fs and moto lie beside the environment (``scripts/setup_environment.sh``): botocore asks for an older ``python-dateutil``.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

BUCKET = "bucket"


def use(endpoint: str) -> None:
    """Have this process find s3fs, and a server."""
    place = str(Path(sys.prefix) / "s3")
    if place not in sys.path:
        sys.path.append(place)
    os.environ.update(
        AWS_ACCESS_KEY_ID="key",
        AWS_SECRET_ACCESS_KEY="secret",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_ENDPOINT_URL=endpoint,
    )
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()


def upload(folder: Path, url: str) -> str:
    """Copy a folder into a store, and return its URL there."""
    from fsspec.core import url_to_fs

    fs, path = url_to_fs(url)
    for entry in sorted(folder.rglob("*")):
        if entry.is_file():
            fs.pipe_file(f"{path}/{entry.relative_to(folder).as_posix()}", entry.read_bytes())
    fs.invalidate_cache()
    return url


class Server:
    """moto's S3.

    Attributes:
        sent: bytes of objects that it has sent.
        requested: objects that were read, each with the range that was asked for.
        put: objects that were written, in order.
        fail: is asked for each request (method, path, range): a status to answer with, or None.
    """

    def __init__(self) -> None:
        use("")
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, *args: Any, **settings: Any) -> None:
                pass

        self.sent, self.requested, self.put = 0, list[tuple[str, str]](), list[str]()
        self.fail: Callable[[str, str, str], int | None] = lambda method, path, asked: None
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Quiet)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        use(self.endpoint)
        import fsspec

        with suppress(FileExistsError):  # moto's servers of one process share what they hold
            fsspec.filesystem("s3").mkdir(BUCKET)

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path, asked = environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE", "")
        if (status := self.fail(method, path, asked)) is not None:
            start(f"{status} Failed", [("Content-Length", "0")])
            return []
        if method == "PUT":
            self.put.append(path)
        if method != "GET" or path.count("/") < 2:
            return self._app(environ, start)
        self.requested.append((path, asked))
        return self._counted(self._app(environ, start))

    def _counted(self, parts: Iterable[bytes]) -> Iterator[bytes]:
        for part in parts:
            self.sent += len(part)
            yield part

    @contextmanager
    def failing(self, status: int, *parts: str) -> Iterator[None]:
        """Answer so in the block, wherever method, path or range have these parts."""
        self.fail = lambda *request: status if all(part in " ".join(request) for part in parts) else None
        try:
            yield
        finally:
            self.fail = lambda *request: None

    def count_anew(self) -> None:
        """Forget what was counted."""
        self.sent = 0
        self.requested.clear()
        self.put.clear()

    def stop(self) -> None:
        """Stop, as when a machine is lost."""
        self._server.shutdown()
        self._server.server_close()
