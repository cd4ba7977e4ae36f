"""A server on this machine that speaks the hub's protocol, and the hub's library told to ask it."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0123456789" * 4


class Hub:
    """Repositories are folders. Weights are redirected to another host name, as the hub does to its store."""

    def __init__(self) -> None:
        self.repos: dict[str, Path] = {}
        self.requests: list[tuple[str, str]] = []  # (method, file), the redirects aside
        self.errors: dict[str, tuple[int, str]] = {}  # repository -> status and error code
        self.commit = COMMIT  # what the answers say
        self.unavailable = 0  # so many requests are answered with 503
        self.cut = False  # weights end after half their bytes
        self.weights_asked, self.weights_free = threading.Event(), threading.Event()
        self.weights_free.set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.weights_free.set()
        self.server.shutdown()
        self.server.server_close()

    def gets(self) -> Counter[str]:
        return Counter(name for method, name in self.requests if method == "GET")

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = request.path.strip("/").split("/")
        if len(parts) < 5 or parts[2] != "resolve":  # nothing that we ask for
            return self._refuse(request, 404, "EntryNotFound")
        repo, commit, name, store = "/".join(parts[:2]), parts[3], "/".join(parts[4:]), "?" in request.path
        name = name.partition("?")[0]
        file = self.repos.get(repo, Path("/nowhere")) / name
        if self.unavailable:
            self.unavailable -= 1
            return self._refuse(request, 503, "")
        if repo in self.errors:
            return self._refuse(request, *self.errors[repo])
        if repo not in self.repos:
            return self._refuse(request, 404, "RepoNotFound")
        if commit != COMMIT:
            return self._refuse(request, 404, "RevisionNotFound")
        if not file.is_file():
            return self._refuse(request, 404, "EntryNotFound")
        content = file.read_bytes()
        if name.endswith(".safetensors") and not store:
            request.send_response(302)
            request.send_header("Location", f"http://localhost:{self.port}{request.path}?stored")
            request.send_header("X-Linked-Size", str(len(content)))
            request.send_header("X-Linked-ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            length = 0
        else:
            self.requests.append((request.command, name))
            request.send_response(200)
            request.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            length = len(content)
        request.send_header("X-Repo-Commit", self.commit)
        request.send_header("Content-Length", str(length))
        request.end_headers()
        if request.command == "GET" and length:
            if store:
                self.weights_asked.set()
                self.weights_free.wait(60)
            with suppress(ConnectionError):  # from a client that was killed
                request.wfile.write(content[: length // 2] if store and self.cut else content)

    def _refuse(self, request: BaseHTTPRequestHandler, status: int, code: str) -> None:
        request.send_response(status)
        if code:
            request.send_header("X-Error-Code", code)
        if code == "EntryNotFound":
            request.send_header("X-Repo-Commit", self.commit)
        request.send_header("Content-Length", "0")
        request.end_headers()


@contextmanager
def local_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """With an empty cache in ``tmp_path``. The library reads its environment once, on import: here it is told in its constants."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    hub = Hub()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    yield hub
    close_session()
    hub.stop()
