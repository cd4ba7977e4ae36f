"""A server on loopback that speaks the S3 protocol, and that can be told to fail."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs

import pytest
import s3fs
from moto.server import ThreadedMotoServer


class Flaky:
    """A WSGI application that fails a ``share`` of its requests (none by default), of every kind in turn."""

    share = 0.0
    kinds = ("503", "503 after", "broken", "broken after", "slow")

    def __init__(self, app: Any) -> None:
        self._app, self._random, self._lock = app, random.Random(0), threading.Lock()
        self.requests = self.failed = 0
        self.listed: list[str] = []  # prefixes
        self.reads: Counter[str] = Counter()  # of objects' contents, by path

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self._lock:
            kind = None
            self.requests += 1
            query = parse_qs(str(environ.get("QUERY_STRING")))
            self.listed += query.get("prefix", [])
            if environ["REQUEST_METHOD"] == "GET" and not query:
                self.reads[str(environ["PATH_INFO"])] += 1
            if self._random.random() < self.share:
                kind = self.kinds[self.failed % len(self.kinds)]
                self.failed += 1
        if kind == "slow":
            time.sleep(0.3)
        if kind in (None, "slow"):
            return self._app(environ, start_response)
        if kind.endswith("after"):
            b"".join(self._app(environ, lambda *status: lambda data: None))
        else:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if kind.startswith("broken"):
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError("as asked")
        start_response("503 Slow Down", [("Content-Type", "application/xml")])
        return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]


@contextmanager
def s3_server() -> Iterator[Flaky]:
    """Every process of ours, and those that they start, take it for the S3 there is."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    assert server._server is not None
    server._server.app = flaky = Flaky(server._server.app)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield flaky
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
