"""The runner: takes a shard, decodes each image once, has it labelled and tokenized, and commits.

It is a plain object that is given a ``call`` function to reach specialists; `fourmill.flows.engine` wraps
it in a Ray actor, tests use it in a loop.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from fourmill import __version__
from fourmill.config import Config
from fourmill.crops import draw_crops
from fourmill.errors import DatasetError, FourmillError
from fourmill.flows.plan import Job
from fourmill.flows.resolve import Resolved, Wanted
from fourmill.flows.shard_content import ShardContent, check_unchanged, reasons_of, rows_of
from fourmill.flows.specialist import NO_CAPTION, MicroBatch, MicroResult
from fourmill.labels import Absent, Label
from fourmill.seeds import key64, keys_digest
from fourmill.shards.arrow import column_table, write_table
from fourmill.shards.dataset import SAMPLES, Dataset, absent_counts
from fourmill.shards.decode import Frame, RejectedImage, decode_frame
from fourmill.shards.receipts import Receipt, Recipe, pack_presence
from fourmill.shards.samples import DUPLICATE, OK
from fourmill.shards.sources.base import RawSample, Row, Source, make_source
from fourmill.shards.tar import read_labels, write_labels

#: reasons that are facts of the source and no fault: they count neither as rejects nor toward the limit
NOT_A_FAULT = frozenset({NO_CAPTION, DUPLICATE})


class TooManyAbsent(FourmillError):
    """More rows of a shard have no value than the configuration allows; the column is not committed."""


@dataclass(frozen=True, slots=True)
class Call:
    """A micro-batch under way at a specialist: ``result()`` waits for it."""

    result: Callable[[], MicroResult]


#: (group number, micro-batch, labels wanted back, modalities to tokenize) -> what is under way
Submit = Callable[[int, MicroBatch, Sequence[str], Sequence[str]], Call]


@dataclass
class JobReport:
    """What became of a job. ``parked``: column -> why it was not committed."""

    shard: int
    rows: int = 0
    committed: list[str] = field(default_factory=list)
    lost_races: list[str] = field(default_factory=list)
    parked: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class Runner:
    """Runs jobs one at a time."""

    def __init__(
        self, config: Config, wanted: Mapping[str, Wanted], submit: Submit, environment: dict[str, Any]
    ) -> None:
        source = make_source(config.source.kind, **config.source.options)
        self._resolved = Resolved(config, source, dict(wanted))
        self._source: Source = source
        self._submit = submit
        self._environment = {
            "fourmill": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pyarrow": pa.__version__,
            "batch_size": config.engine.batch_size,
            **environment,
        }
        self._dataset = Dataset(config.dataset)
        self._groups = self._resolved.groups()
        self._rows_total = 0
        self._source_digest: str | None = None
        self._truth = any(w.needs_truth for w in wanted.values())
        self._decoders = ThreadPoolExecutor(2)
        self.rows_done = 0  # read by the progress display while a job runs

    def run(self, job: Job) -> JobReport:
        """Make and commit the job's columns. Raises what failed the attempt; commits nothing partial."""
        started = time.perf_counter()
        report = JobReport(
            job.shard, seconds={"decode": 0.0, "wait": 0.0, "forward": 0.0, "tokenize": 0.0, "write": 0.0}
        )
        frozen = None if job.rows is not None else self._dataset.samples(job.shard)
        rows = job.rows if job.rows is not None else rows_of(frozen)
        given = self._kept_labels(job, rows)
        content = ShardContent(len(rows), job)
        window: deque[tuple[int, Call]] = deque()
        for start, batch in self._micro_batches(job, rows, frozen, given, content, report):
            for number, group in enumerate(self._groups):
                labels = [n for n in group if n in job.labels]
                tokens = [n for n in group if n in job.tokens]
                if labels or tokens:
                    window.append((start, self._submit(number, batch, labels, tokens)))
            while len(window) > 2 * len(self._groups) + 2:
                self._take(content, window.popleft(), report)
        while window:
            self._take(content, window.popleft(), report)
        write_started = time.perf_counter()
        report.rows = len(rows)
        report.seconds["total"] = time.perf_counter() - started
        self._commit(job, rows, frozen, content, report)
        report.seconds["write"] += time.perf_counter() - write_started
        return report

    # -- reading and decoding ------------------------------------------------------------------------

    def _micro_batches(
        self,
        job: Job,
        rows: Sequence[Row],
        frozen: pa.Table | None,
        given: dict[str, dict[int, Label]],
        content: ShardContent,
        report: JobReport,
    ) -> Iterator[tuple[int, MicroBatch]]:
        size = self._resolved.config.engine.batch_size
        needs_pixels = bool(job.labels or job.tokens) or frozen is None
        for start in range(0, len(rows), size):
            began = time.perf_counter()
            part = rows[start : start + size]
            skip = self._skipped(job, frozen, start, len(part))
            decoded = self._decode(part, skip) if needs_pixels else []
            if frozen is not None:
                check_unchanged(part, skip, decoded)
            content.add(start, decoded, frozen is None)
            if frozen is None and start + size >= len(rows):
                content.make_samples(rows, self._resolved)
            batch = self._batch(part, decoded, frozen, start, given)
            report.seconds["decode"] += time.perf_counter() - began
            yield start, batch
            self.rows_done += len(part)

    def _skipped(self, job: Job, frozen: pa.Table | None, start: int, count: int) -> list[str | None]:
        """Per row, why it is not read: set aside earlier, or a second row with a key."""
        if frozen is not None:
            status = frozen.column("status").slice(start, count).to_pylist()
            return [None if s == OK else s for s in status]
        return [DUPLICATE if start + i in job.duplicates else None for i in range(count)]

    def _decode(
        self, part: Sequence[Row], skip: Sequence[str | None]
    ) -> list[tuple[Frame | str, tuple[str, ...]]]:
        """(frame or reason, captions) per row. I/O errors are raised: they fail the attempt, not the sample."""
        live = [row for row, why in zip(part, skip, strict=True) if why is None]
        raw = iter(list(self._source.read(live)))
        decode = self._resolved.config.decode

        def one(sample: RawSample | Exception) -> tuple[Frame | str, tuple[str, ...]]:
            if isinstance(sample, RejectedImage):
                return sample.reason, ()
            if isinstance(sample, Exception):
                return f"unreadable: {type(sample).__name__}", ()
            try:
                return decode_frame(sample.image, decode.shorter_side, decode.filter), sample.captions
            except RejectedImage as error:
                return error.reason, sample.captions

        done = self._decoders.map(one, raw)
        return [next(done) if why is None else (why, ()) for why in skip]

    def _batch(
        self,
        part: Sequence[Row],
        decoded: Sequence[tuple[Frame | str, tuple[str, ...]]],
        frozen: pa.Table | None,
        start: int,
        given: dict[str, dict[int, Label]],
    ) -> MicroBatch:
        """Fill up to the fixed batch shape with blanks; rows that were set aside are blank too."""
        config = self._resolved.config
        size, side = config.engine.batch_size, config.decode.shorter_side
        blank = np.zeros((side, side, 3), np.uint8)
        frames, keys = [blank] * size, [""] * size
        captions: list[Sequence[str]] = [()] * size
        truth: list[Mapping[str, Any] | None] = [None] * size
        present = np.zeros(size, bool)
        sizes = np.full((size, 2), side, np.int32)
        whole = np.array([0, 0, side, side, 0], np.int32)
        crops = np.tile(whole, (size, config.n_crops, 1))
        for i, (row, (frame, texts)) in enumerate(zip(part, decoded, strict=True)):
            keys[i] = row.key
            if isinstance(frame, str):
                continue
            frames[i], captions[i], present[i] = frame.pixels, texts, True
            sizes[i] = frame.height, frame.width
            crops[i] = draw_crops(config.seed, key64(row.key), frame.width, frame.height, config.n_crops)
            if self._truth:
                truth[i] = self._source.truth(row.key)
        kept = {
            name: [labels.get(start + i, Absent("blank")) for i in range(size)]
            for name, labels in given.items()
        }
        return MicroBatch(keys, frames, present, sizes, crops, captions, truth, kept)

    def _kept_labels(self, job: Job, rows: Sequence[Row]) -> dict[str, dict[int, Label]]:
        """Labels of this shard that were kept earlier: no forward pass is spent on them again."""
        given: dict[str, dict[int, Label]] = {}
        for name in self._resolved.closure(list(job.tokens)):
            recipe = self._resolved.wanted[name].label_recipe
            if job.shard in self._dataset.finished(name, recipe.short):
                receipt = self._dataset.receipt(name, recipe.short, job.shard)
                if receipt.keys != keys_digest(row.key for row in rows):
                    raise DatasetError(
                        f"{receipt.file}: its keys are not those of the shard; remove its receipt"
                    )
                given[name] = read_labels(
                    self._dataset.store.read(receipt.file), self._resolved.wanted[name].modality
                )
        return given

    def _take(self, content: ShardContent, item: tuple[int, Call], report: JobReport) -> None:
        start, call = item
        began = time.perf_counter()
        result = call.result()
        report.seconds["wait"] += time.perf_counter() - began
        for phase, seconds in result.seconds.items():
            report.seconds[phase] += seconds
        content.fill(start, result)

    # -- committing ----------------------------------------------------------------------------------

    def _commit(
        self,
        job: Job,
        rows: Sequence[Row],
        frozen: pa.Table | None,
        content: ShardContent,
        report: JobReport,
    ) -> None:
        """Samples first, then each column: data file, then receipt."""
        keys = keys_digest(row.key for row in rows)
        if frozen is None:
            status = content.samples.column("status").to_pylist()
            reasons = [None if s == OK else s for s in status]
            self._write(
                SAMPLES,
                self._resolved.samples_recipe,
                job.shard,
                keys,
                reasons,
                SAMPLES,
                write_table(content.samples),
                "arrow",
                report,
                None,
            )
            if job.shard not in self._dataset.finished(SAMPLES, self._resolved.samples_recipe.short):
                raise DatasetError(f"{self._dataset.url}: the receipt of samples {job.shard} did not appear")
        else:
            status = frozen.column("status").to_pylist()
        for name in [n for n in self._resolved.wanted if n in job.labels]:
            wanted = self._resolved.wanted[name]
            labels = [Absent(s) if s != OK else v for s, v in zip(status, content.labels[name], strict=True)]
            data = write_labels([row.key for row in rows], labels, wanted.modality)
            self._write(
                name,
                wanted.label_recipe,
                job.shard,
                keys,
                reasons_of(labels),
                f"labels/{name}",
                data,
                "tar",
                report,
                wanted,
            )
        for name in [n for n in self._resolved.wanted if n in job.tokens]:
            wanted = self._resolved.wanted[name]
            cells = [Absent(s) if s != OK else v for s, v in zip(status, content.values[name], strict=True)]
            recipe = wanted.token_recipe()
            assert recipe is not None
            meta = {"recipe": recipe.hash, "tokenizer": wanted.tokenizer or ""}
            table = column_table(wanted.modality, cells, self._resolved.config.n_crops, meta)
            self._write(
                name,
                recipe,
                job.shard,
                keys,
                reasons_of(cells),
                f"tokens/{name}",
                write_table(table),
                "arrow",
                report,
                wanted,
            )

    def _write(
        self,
        column: str,
        recipe: Recipe,
        shard: int,
        keys: str,
        reasons: Sequence[str | None],
        folder: str,
        data: bytes,
        ending: str,
        report: JobReport,
        wanted: Wanted | None,
    ) -> None:
        engine = self._resolved.config.engine
        absent = absent_counts(reasons)
        faults = sum(count for reason, count in absent.items() if reason not in NOT_A_FAULT)
        limit = max(engine.max_absent_share * len(reasons), engine.max_absent_rows)
        if faults > limit and column != SAMPLES:
            most = max((r for r in absent if r not in NOT_A_FAULT), key=lambda r: absent[r])
            report.parked[column] = (
                f"{faults} of {len(reasons)} rows have no value (limit {int(limit)}), most often {most!r}; "
                "look at the source, or raise engine.max_absent_share"
            )
            return
        name = self._dataset.put_data(folder, shard, data, ending)
        receipt = Receipt(
            column=column,
            recipe=recipe.hash,
            shard=shard,
            rows=len(reasons),
            absent=absent,
            presence=pack_presence(np.array([r is None for r in reasons], bool)),
            keys=keys,
            file=name,
            sha256=hashlib.sha256(data).hexdigest(),
            bytes=len(data),
            dataset=self._dataset.digest,
            source=self._source_facts() if column == SAMPLES else {},
            provenance=_provenance(wanted),
            environment=self._environment,
            timings={k: round(v, 4) for k, v in report.seconds.items()},
        )
        (report.committed if self._dataset.commit(recipe, receipt) else report.lost_races).append(column)

    def _source_facts(self) -> dict[str, Any]:
        if self._source_digest is None:
            self._source_digest = self._source.digest()
        return {"digest": self._source_digest, "rows_total": self._rows_total}

    def set_listing(self, digest: str, rows: int) -> None:
        """The source as it was when these jobs were planned: its digest, and how many rows it listed."""
        self._source_digest, self._rows_total = digest, rows


def _provenance(wanted: Wanted | None) -> dict[str, Any]:
    if wanted is None or wanted.settings is None:
        return {}
    checkpoint = wanted.make_labeler().checkpoint
    model = wanted.settings.model or wanted.make_labeler().default_model
    return {"labeler": wanted.labeler, "model": model, "weights": checkpoint.identity if checkpoint else None}
