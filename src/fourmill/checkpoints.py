"""Where a network's weights come from: a local folder, a hub id, or a checkpoint that ships with fourmill.

A weights revision is what enters a recipe: a 40-digit commit for a hub id, a content hash for a folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from fourmill.errors import CheckpointError, ConfigError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_IDENTITY_FILES = (".safetensors", ".json", ".txt", ".model")
SHIPPED = "shipped:"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """``source`` is what ``from_pretrained`` takes; ``revision`` is the hub commit or None for a folder."""

    source: str
    revision: str | None
    identity: str  # "<40 digits>" or "sha256:<64 digits>"

    @property
    def folder(self) -> Path | None:
        return Path(self.source) if self.revision is None else None

    def kwargs(self) -> dict[str, Any]:
        """Arguments for ``from_pretrained``: safetensors only, and never code from the checkpoint."""
        pinned = {"revision": self.revision} if self.revision else {"local_files_only": True}
        return {**pinned, "trust_remote_code": False}


def shipped_folder(name: str) -> Path:
    """``shipped:NAME``: a specialist in labelers/specialists or a tokenizer in tokenize/fitted."""
    roots = [
        Path(str(files("fourmill.labelers") / "specialists")),
        Path(str(files("fourmill"))) / "tokenize" / "fitted",
    ]
    for root in roots:
        if re.fullmatch(r"[a-z0-9_-]+(/[a-z0-9_-]+)?", name) and (root / name).is_dir():
            return root / name
    known = sorted(p.name for root in roots if root.is_dir() for p in root.iterdir() if p.is_dir())
    raise ConfigError(f"model: 'shipped:{name}' does not ship with fourmill; known: {', '.join(known)}")


def resolve(model: str, revision: str | None, where: str) -> Checkpoint:
    """Find a checkpoint. ``where`` names the configuration key for the error message."""
    if model.startswith(SHIPPED):
        return _folder(shipped_folder(model.removeprefix(SHIPPED)), where)
    path = Path(model).expanduser()
    if path.is_dir():
        return _folder(path, where)
    if model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise CheckpointError(
            f"{where}: checkpoint folder {model!r} does not exist; give a folder or a hub id"
        )
    if revision is None or not _COMMIT.fullmatch(revision):
        raise ConfigError(
            f"{where}: hub id {model!r} needs `revision:` with the 40-digit commit to pin (got {revision!r}); "
            "without one the labels could change under you"
        )
    return Checkpoint(model, revision, revision)


def _folder(path: Path, where: str) -> Checkpoint:
    if not any(path.glob("*.json")):
        raise CheckpointError(f"{where}: {path} holds no config.json; is it a checkpoint folder?")
    return Checkpoint(str(path), None, f"sha256:{folder_hash(str(path.resolve()))}")


def folder_hash(folder: str) -> str:
    """sha256 over the names and contents of the files that determine a network's output."""
    files = [f for f in sorted(Path(folder).iterdir()) if f.suffix in _IDENTITY_FILES and f.is_file()]
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        content = _file_hash(str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino)
        digest.update(f"{file.name}\0{content}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=512)
def _file_hash(file: str, size: int, modified_ns: int, inode: int) -> str:
    """Read once as long as nothing speaks of a change."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def read_json(checkpoint: Checkpoint, name: str, where: str) -> dict[str, Any]:
    """A JSON file of the checkpoint (from the hub's cache or the folder)."""
    if checkpoint.folder is not None:
        path = checkpoint.folder / name
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import logging as hub_logging

        hub_logging.set_verbosity_error()  # the one line below says it all
        try:
            path = Path(hf_hub_download(checkpoint.source, name, revision=checkpoint.revision))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{where}: {checkpoint.source} is not in the local cache, and the hub does not give {name} "
                f"({type(error).__name__}); check the connection, or give a checkpoint's folder"
            ) from error
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{where}: cannot read {path}: {error}") from error
    return dict(content)
