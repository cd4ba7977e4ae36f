"""The source ``webdataset``: tars of images and captions, as img2dataset writes them, on any fsspec URL.

``url`` is a brace or star expression, one tar, or a folder of tars. A row is a run of members that share a key (the
member's name up to the first dot of its last part); the row's key is ``tar name/member key``, the tar's name being
its path below the fixed part of the URL, without ``.tar``. The caption is the ``.txt`` member, else ``caption`` in
the ``.json`` member. Listing reads tar headers alone; a position holds byte offsets, so reading fetches just those
bytes. Member names are data and are never used as paths.

A tar that is cut off or damaged is listed up to the damage; its last sample may lack members and is a reject
("truncated"), and a warning names the tar. One that is no tar from its first byte is an error.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from fourmill.errors import SourceError
from fourmill.shards.decode import MAX_BYTES, RejectedImage
from fourmill.shards.listing import Root, SourceFile, files_digest, reported
from fourmill.shards.sources.base import RawSample, Row, Source, register
from fourmill.shards.tar import Damage, Member, scan_tar

log = logging.getLogger(__name__)

IMAGE_ENDINGS = (
    "jpg",
    "jpeg",
    "png",
    "webp",
    "gif",
    "tif",
    "tiff",
    "bmp",
    "ppm",
    "avif",
)  # the first one wins
MAX_TEXT_BYTES = 1 << 20  # of a caption; the rest of a longer .txt is left, a longer .json ignored
GAP_BYTES = 64 << 10  # read through rather than make two requests
WINDOW_BYTES = 8 << 20  # fetched at once where rows are read in order
SCAN_BLOCK_BYTES = 1 << 20
SCAN_AHEAD = 8  # remote tars whose headers are read at the same time

Span = tuple[int, int]  # first byte, end


@register("webdataset")
class WebDataset(Source):
    """Option: ``url``."""

    options: ClassVar[Mapping[str, Any]] = {"url": ...}

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.url = options["url"]
        self._root = Root(self.url, (".tar",))
        self._window: tuple[str, int, bytes] = ("", 0, b"")  # of which tar, from which byte, what

    def identity(self) -> dict[str, Any]:
        return {"kind": "webdataset", "url": self.url}

    def digest(self) -> str:
        return files_digest(self._root.files("tar"))

    # -- listing --------------------------------------------------------------------------------------

    def rows(self) -> Iterator[Row]:
        tars = self._root.files("tar")
        empty = True
        for found in self._scanned(tars):
            for row in found:
                empty = False
                yield row
        if empty:
            raise SourceError(
                f"source {self.url}: {len(tars)} tars without a single image, text or json member"
            )

    def _scanned(self, tars: Sequence[SourceFile]) -> Iterator[list[Row]]:
        """The rows of each tar, in order; remote tars are scanned a few ahead."""
        if self._root.is_local:
            yield from map(self._tar_rows, tars)
            return
        with ThreadPoolExecutor(SCAN_AHEAD, thread_name_prefix="scan-tar") as pool:
            pending = [pool.submit(self._tar_rows, tar) for tar in tars[:SCAN_AHEAD]]
            for index in range(len(tars)):
                if index + SCAN_AHEAD < len(tars):
                    pending.append(pool.submit(self._tar_rows, tars[index + SCAN_AHEAD]))
                yield pending.pop(0).result()

    def _tar_rows(self, tar: SourceFile) -> list[Row]:
        groups: list[tuple[str, dict[str, Span]]] = []
        damage: Damage | None = None
        with reported(f"{self.url}: {tar.name}"), self._open(tar) as stream:
            for item in scan_tar(stream, tar.size):
                if isinstance(item, Damage):
                    damage = item
                else:
                    _add(groups, item)
        if damage is not None and damage.at == 0:
            raise SourceError(
                f"source {self.url}: {tar.name} is not a tar ({damage.reason}); compressed ones must be unpacked"
            )
        if damage is not None:
            log.warning(
                "source %s: %s is damaged at byte %d of %d: %s; it is used up to there", self.url, tar.name, damage.at,
                tar.size, damage.reason,
            )  # fmt: skip
        stem = tar.name.removesuffix(".tar")
        rows = [Row(f"{stem}/{key}", _position(tar, spans)) for key, spans in groups]
        if damage is not None and rows:
            rows[-1] = Row(rows[-1].key, _position(tar, {}, damage=damage.reason))
        return rows

    def _open(self, tar: SourceFile) -> Any:
        if self._root.is_local:
            return open(tar.path, "rb", buffering=0)
        return self._root.fs.open(tar.path, "rb", block_size=SCAN_BLOCK_BYTES, cache_type="readahead")

    # -- reading --------------------------------------------------------------------------------------

    def read(self, rows: Sequence[Row]) -> Iterator[RawSample | Exception]:
        places = [json.loads(row.position) for row in rows]
        for index, place in enumerate(places):
            image = place.get("image")
            if "damage" in place:
                yield RejectedImage("truncated", place["damage"])
            elif image is None:
                yield RejectedImage(
                    "no image", f"members: {', '.join(sorted(set(place) - {'tar', 'bytes'}))}"
                )
            elif image[1] > MAX_BYTES:
                yield RejectedImage("too large", f"{image[1]} bytes; the limit is {MAX_BYTES}")
            else:
                self._reach(places, index)
                yield RawSample(self._cut(place, "image", MAX_BYTES), self._captions(place))

    def _captions(self, place: Mapping[str, Any]) -> tuple[str, ...]:
        text = self._cut(place, "txt", MAX_TEXT_BYTES).decode("utf-8-sig", "replace").strip()
        if text:
            return (text,)
        if place.get("json", (0, 0))[1] > MAX_TEXT_BYTES:
            return ()
        try:
            facts = json.loads(self._cut(place, "json", MAX_TEXT_BYTES))
        except (ValueError, RecursionError):
            return ()
        caption = facts.get("caption") if isinstance(facts, dict) else None
        found = caption if isinstance(caption, list) else [caption]
        return tuple(text for text in found if isinstance(text, str) and text.strip())

    def _cut(self, place: Mapping[str, Any], member: str, most: int) -> bytes:
        """The first ``most`` bytes of a member; b"" where the row has none."""
        offset, size = place.get(member, (0, 0))
        size = min(size, most)
        if not size:
            return b""
        tar, start, data = self._window
        if tar != place["tar"] or offset < start or offset + size > start + len(data):
            _, start, data = self._fetch(place, offset, offset + size)
        return data[offset - start : offset - start + size]

    def _reach(self, places: Sequence[Mapping[str, Any]], index: int) -> None:
        """Have the whole row in the window, and the rows after it as far as they follow closely."""
        place = places[index]
        first, end = _extent(place)
        tar, start, data = self._window
        if tar == place["tar"] and start <= first and end <= start + len(data):
            return
        if not 0 < end - first <= MAX_BYTES + WINDOW_BYTES:
            return  # empty, or members far apart: each is fetched by itself
        follows = tar == place["tar"] and start <= first < start + len(data) + GAP_BYTES
        limit = max(end, first + WINDOW_BYTES)
        if follows:  # the last call read up to here: read ahead of this one
            end = min(limit, int(place["bytes"]))
        for later in places[index + 1 :]:
            if later["tar"] != place["tar"] or "image" not in later or "damage" in later:
                break
            later_first, later_end = _extent(later)
            if not first <= later_first <= end + GAP_BYTES or later_end > limit:
                break
            end = max(end, later_end)
        self._fetch(place, first, end)

    def _fetch(self, place: Mapping[str, Any], first: int, end: int) -> tuple[str, int, bytes]:
        """The new window, by one ranged read. I/O errors are raised as they are; a tar that changed since it was listed is an error."""
        path = self._root.path(str(place["tar"]))
        size = self._root.size(path)
        data = bytes(self._root.fs.cat_file(path, start=first, end=end)) if size == place["bytes"] else b""
        if len(data) != end - first:
            raise SourceError(
                f"source {self.url}: {place['tar']} had {place['bytes']} bytes when it was listed and has {size} now; "
                "restore it, or give the new one another name"
            )
        window = self._window = (str(place["tar"]), first, data)
        return window


def _add(groups: list[tuple[str, dict[str, Span]]], member: Member) -> None:
    """Put a member to the run that it continues, or start a new one."""
    folder, slash, last = member.name.rpartition("/")
    stem, dot, ending = last.partition(".")
    if not stem or not dot:
        return  # hidden, or without an ending: no part of a sample
    key, ending = f"{folder}{slash}{stem}", ending.lower()
    if not groups or groups[-1][0] != key or ending in groups[-1][1]:
        groups.append((key, {}))
    groups[-1][1][ending] = (member.offset, member.size)


def _position(tar: SourceFile, spans: Mapping[str, Span], damage: str = "") -> str:
    place: dict[str, Any] = {"tar": tar.name, "bytes": tar.size}
    if damage:
        place["damage"] = damage
    image = next((ending for ending in IMAGE_ENDINGS if ending in spans), None)
    if image is not None:
        place["image"] = spans[image]
    place |= {ending: spans[ending] for ending in ("txt", "json") if ending in spans}
    return json.dumps(place)


def _extent(place: Mapping[str, Any]) -> Span:
    """From the first byte to the last that `read` wants of a row."""
    offset, size = place["image"]
    first, end = offset, offset + size
    for name in ("txt", "json"):
        if name in place:
            offset, size = place[name]
            first, end = min(first, offset), max(end, offset + min(size, MAX_TEXT_BYTES))
    return first, end
