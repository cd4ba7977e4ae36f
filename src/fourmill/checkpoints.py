"""Where a network's weights come from: a local folder, a hub id, or a checkpoint that ships with fourmill.

A weights revision is what enters a recipe: a 40-digit commit for a hub id, a content hash for a folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourmill.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from filelock import BaseFileLock
    from huggingface_hub import DryRunFileInfo

_COMMIT = re.compile(r"[0-9a-f]{40}")
_IDENTITY_FILES = (".safetensors", ".json", ".txt", ".model")
SHIPPED = "shipped:"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
#: one of these says how pixels are normalised; the first that a repository has is fetched
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
#: what an index may name: a file beside it. Whoever made the repository wrote these names.
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")


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
    sums = {}
    for file in Path(folder).iterdir():
        if file.suffix in _IDENTITY_FILES and file.is_file():
            stat = file.stat()
            sums[file.name] = _file_hash(str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return identity_of(sums)


def identity_of(sums: Mapping[str, str]) -> str:
    """`folder_hash` of a folder of which the sha256 of each file is known, by name; other files do not count."""
    digest = hashlib.sha256()
    for name in sorted(sums):
        if name.endswith(_IDENTITY_FILES):
            digest.update(f"{name}\0{sums[name]}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=512)
def _file_hash(file: str, size: int, modified_ns: int, inode: int) -> str:
    """Read once as long as nothing speaks of a change."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def read_json(checkpoint: Checkpoint, name: str, where: str) -> dict[str, Any]:
    """A JSON file of the checkpoint (from the hub's cache or the folder)."""
    return _parse(file_of(checkpoint, name, where), where)


def _parse(path: Path, where: str) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{where}: cannot read {path}: {error}") from error


# -- the hub ------------------------------------------------------------------------------------------


def fetch(checkpoint: Checkpoint, where: str, preprocessed: bool = True) -> Checkpoint:
    """The checkpoint as a folder on this machine, with the identity that it had. A folder is returned as it is.

    Of a hub id the files that a labeler needs are downloaded into the hub's cache: config.json, the
    preprocessor's (not if ``preprocessed`` is false: tokenizers have none), and weights as safetensors, nothing else. A
    lock in that cache makes processes that want the same commit wait for one of them to download it. What is in the
    cache needs no request and no lock.
    ``where`` names the configuration key for `CheckpointError`: unknown repository or commit, no safetensors, no
    network, a cache that cannot be written.
    """
    if checkpoint.folder is not None:
        return checkpoint
    folder = cached_snapshot(checkpoint, where, preprocessed)
    if folder is None:
        with _hub_errors(checkpoint, where), _lock(checkpoint):
            folder = cached_snapshot(checkpoint, where, preprocessed)
            folder = folder or _download_snapshot(checkpoint, where, preprocessed)
    return Checkpoint(str(folder), None, checkpoint.identity)


def file_of(checkpoint: Checkpoint, name: str, where: str) -> Path:
    """Where one file of a checkpoint lies on this machine; of a hub id, in the cache. CheckpointError where it has none."""
    if checkpoint.folder is not None:
        if not (checkpoint.folder / name).is_file():
            raise CheckpointError(f"{where}: {checkpoint.folder} lacks {name}; copy the whole checkpoint")
        return checkpoint.folder / name
    known, path = _in_cache(checkpoint, name)
    if not known:
        with _hub_errors(checkpoint, where), _lock(checkpoint):
            known, path = _in_cache(checkpoint, name)
            if not known:
                _knock(checkpoint, name)
                path = _download(checkpoint, name)
    if path is None:
        raise _lacks(checkpoint, name, where)
    return path


def cached_file(checkpoint: Checkpoint, name: str) -> Path | None:
    """A file of a hub checkpoint in the local cache, or None; asks no hub."""
    return _in_cache(checkpoint, name)[1]


def _in_cache(checkpoint: Checkpoint, name: str) -> tuple[bool, Path | None]:
    """Whether the cache knows this file, and where it lies: (True, None) says that the repository lacks it."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(checkpoint.source, name, revision=checkpoint.revision)
    except (OSError, ValueError):  # an unreadable cache or no id at all: the download will say so
        return False, None
    return found is not None, Path(found) if isinstance(found, str) else None


def cached_snapshot(checkpoint: Checkpoint, where: str, preprocessed: bool = True) -> Path | None:
    """The cache's folder of this commit of a hub id, if nothing that `fetch` would get is missing; asks no hub."""
    _, config = _in_cache(checkpoint, CONFIG)
    first, *others = (_in_cache(checkpoint, name) for name in PREPROCESSORS)
    settled = first[1] or (first[0] and all(known for known, _ in others)) or not preprocessed
    if config is None or not settled:
        return None
    if _in_cache(checkpoint, WEIGHTS)[1] is None:
        _, index = _in_cache(checkpoint, INDEX)
        shards = [] if index is None else _shards(index, checkpoint, where)
        if not shards or any(_in_cache(checkpoint, name)[1] is None for name in shards):
            return None
    return config.parent


def _download_snapshot(checkpoint: Checkpoint, where: str, preprocessed: bool) -> Path:
    """Weights come last, so that whatever ends this early leaves a snapshot that shows it is not whole."""
    _knock(checkpoint, CONFIG)
    config = _download(checkpoint, CONFIG)
    if config is None:
        raise _lacks(checkpoint, CONFIG, where)
    for name in PREPROCESSORS if preprocessed else ():
        if _download(checkpoint, name) is not None:
            break
    whole = _look_up(checkpoint, WEIGHTS)
    wanted = {WEIGHTS: whole}
    if whole is None:
        index = _download(checkpoint, INDEX)
        if index is None:
            raise CheckpointError(
                f"{where}: {checkpoint.source} has no {WEIGHTS} at commit {checkpoint.revision}, and no other format "
                "is loaded; choose a commit that has it, or convert the network and give its folder"
            )
        wanted = {name: _look_up(checkpoint, name) for name in _shards(index, checkpoint, where)}
    sizes = [file.file_size if file.will_download else 0 for file in wanted.values() if file is not None]
    print(f"fetching {checkpoint.source}{_megabytes(sizes)}", file=sys.stderr, flush=True)
    for name, file in wanted.items():
        if file is None or _download(checkpoint, name) is None:
            raise _lacks(checkpoint, name, where)
    return config.parent


def _megabytes(sizes: list[int | None]) -> str:
    known = [size for size in sizes if size is not None]
    return f" ({sum(known) / 1e6:.1f} MB)" if len(known) == len(sizes) else ""


def _shards(index: Path, checkpoint: Checkpoint, where: str) -> list[str]:
    """The files that an index names, once each; any name that is not one of a file beside it is refused."""
    weights = _parse(index, where).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(
            f"{where}: {INDEX} of {checkpoint.source} names no weights; choose another commit"
        )
    for name in weights.values():
        if not isinstance(name, str) or not _SHARD.fullmatch(name) or ".." in name:
            raise CheckpointError(
                f"{where}: {INDEX} of {checkpoint.source} names {str(name)[:80]!r}, which is no safetensors file "
                "beside it; do not use this repository"
            )
    return sorted(set(weights.values()))


def _lock(checkpoint: Checkpoint) -> BaseFileLock:
    """Released by the system when its holder dies."""
    from filelock import FileLock
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / ".locks" / f"models--{checkpoint.source.replace('/', '--')}"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"fourmill-{checkpoint.revision}.lock")


def _knock(checkpoint: Checkpoint, name: str) -> None:
    """Fail at once where nobody answers: the library's downloads would try for half a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(checkpoint.source, name, revision=checkpoint.revision))
    except HfHubHTTPError:  # somebody answers; the download retries what may pass, and says what does not
        return


def _look_up(checkpoint: Checkpoint, name: str) -> DryRunFileInfo | None:
    """Size and state of a file without downloading it; None if the repository lacks it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        return hf_hub_download(checkpoint.source, name, revision=checkpoint.revision, dry_run=True)
    except RemoteEntryNotFoundError:
        return None


def _download(checkpoint: Checkpoint, name: str) -> Path | None:
    """A file in the cache's folder of this commit; None if the repository lacks it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import FileMetadataError, RemoteEntryNotFoundError

    try:
        path = Path(hf_hub_download(checkpoint.source, name, revision=checkpoint.revision))
    except RemoteEntryNotFoundError:
        return None
    if path.parent.name != checkpoint.revision:
        raise FileMetadataError(f"it answers with commit {path.parent.name} for {checkpoint.revision}")
    return path


def _lacks(checkpoint: Checkpoint, name: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: {checkpoint.source} has no {name} at commit {checkpoint.revision}; choose another commit, or give "
        "a checkpoint's folder"
    )


@contextmanager
def _hub_errors(checkpoint: Checkpoint, where: str) -> Iterator[None]:
    """What the hub's library raises, as one line; its own log and progress bars are off meanwhile."""
    from huggingface_hub import utils

    level, bars = utils.logging.get_verbosity(), not utils.are_progress_bars_disabled()
    utils.logging.set_verbosity_error()
    utils.disable_progress_bars()
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        # its HTTP client's errors have no base that we could name: which client it is depends on the version
        raise CheckpointError(f"{where}: {_explain(error, checkpoint)}") from error
    finally:
        utils.logging.set_verbosity(level)
        if bars:
            utils.enable_progress_bars()


def _explain(error: Exception, checkpoint: Checkpoint) -> str:
    from huggingface_hub import constants, errors

    hub_id, cause = checkpoint.source, error.__cause__ or error
    reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:160]}"
    if isinstance(error, errors.GatedRepoError):
        return f"{hub_id} is gated; accept its terms at {constants.ENDPOINT}/{hub_id} and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no {hub_id} that you may read; check the id, or set HF_TOKEN if it is private"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{hub_id} has no commit {checkpoint.revision}; set `revision:` to one that its page lists"
    if isinstance(error, errors.HFValidationError):
        return f"{hub_id!r} is no hub id; give ORG/NAME or a checkpoint's folder"
    if isinstance(error, (errors.HfHubHTTPError, errors.FileMetadataError)):
        return (
            f"the hub at {constants.ENDPOINT} does not give {hub_id} ({reason}); try later, or give a folder"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            f"{hub_id} is not in the local cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE forbids to fetch it; "
            "unset it, set HF_HOME to a cache that has it, or give a checkpoint's folder"
        )
    if isinstance(error, OSError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"cannot fetch {hub_id} into {constants.HF_HUB_CACHE} ({reason}); free space there, or set HF_HOME"
    return (
        f"{hub_id} is not in the local cache ({constants.HF_HUB_CACHE}), and the hub at {constants.ENDPOINT} cannot be "
        f"reached ({reason}); check the connection, set HF_HOME to a cache that has it, or give a checkpoint's folder"
    )
