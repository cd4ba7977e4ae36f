"""``fourmill import-webdataset``: a tree that 4M trains from, as a dataset that can be trained on here.

What its modalities are stands in the tree's export.json, where fourmill exported it, or in a file:

    image_size: 224
    modalities:
      rgb: {folder: rgb_tok, vocab_size: 16384, num_tokens: 196}      # folder: the modality's own name by default
      caption: {vocabulary: text_tokenizer_4m_wordpiece_30k.json}
      det: {vocabulary: text_tokenizer_4m_wordpiece_30k.json}
      edges: {kind: grid, tokenizer: tokenizers/edges}                # a tokenizer's folder says the numbers
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import yaml

from fourmill import __version__, licenses
from fourmill.checkpoints import folder_hash
from fourmill.errors import ConfigError, DatasetError, nearest
from fourmill.flows.crop_labels import DRAWN, blank_label, crop_label
from fourmill.flows.progress import progress
from fourmill.flows.tree_config import (
    MAX_TOKENS,
    MAX_VOCABULARY,
    ModalityEntry,
    facts_of,
    first,
    given_in,
    told_by,
)
from fourmill.labelers.base import labelers
from fourmill.labels import Absent, Label
from fourmill.modality import SOURCE_MODALITIES, Form, Kind, LabelContract, Modality
from fourmill.seeds import generator, key64
from fourmill.shards.arrow import Cell
from fourmill.shards.dataset import Dataset, modality_json, safe_name
from fourmill.shards.export import MARKER, TOKENIZERS
from fourmill.shards.export_cells import LABELLED
from fourmill.shards.exported_tree import Tree
from fourmill.shards.filters import parse_conditions
from fourmill.shards.import_webdataset import Encode, Plan, Rows, Wanted, import_shards
from fourmill.shards.receipts import SHORT, sha256
from fourmill.shards.snapshot import Snapshot
from fourmill.shards.tokenizer_files import SUMS
from fourmill.storage import Store
from fourmill.tokenize.base import Codec, codecs, load_codec
from fourmill.tokenize.text import VocabularyCodec
from fourmill.tokenize.vocabulary import Vocabulary

MAX_FILE_BYTES = 4 << 30  # of a tokenizer in the tree
MAX_WORDS = 200  # of what a tree says of its origins
_WAY = ("labeler", "model", "weights", "license", "tokenizer", "tokenizer_license")
_FORMS: Mapping[str, Form] = {
    "grid": "map", "vector": "vector", "embedding": "vector", "scalar": "scalar", "sequence": "text",
}  # fmt: skip


@dataclass(frozen=True)
class Imported:
    """``rows`` of all ``shards``, pinned in a snapshot."""

    shards: int
    rows: int
    snapshot: Snapshot


def import_webdataset(url: str, dataset_url: str, file: str | None = None) -> Imported:
    """Import a tree, or go on with one, and register a snapshot of it.

    Raises ConfigError where nobody says what a modality is, DatasetError where the tree is not what it should be.
    """
    facts, given = facts_of(url), given_in(file)
    told = told_by(facts, url)
    seed = first(given.seed, told.seed, 0)
    val_fraction = first(given.val_fraction, told.val_fraction, 0.01)
    size = first(given.image_size, told.image_size, 224)
    entries = {name: entry or ModalityEntry() for name, entry in given.modalities.items()}
    names = sorted({*facts.get("modalities", {}), *entries})
    if not names:
        lack = f"has an {MARKER} that does not say what is in it" if facts else f"has no {MARKER}"
        raise ConfigError(f"{url} {lack}; say what its modalities are with --modalities FILE")
    with ExitStack() as stack:
        made: dict[str, tuple[Wanted, Path | None]] = {}
        for name in names:
            scratch = Path(stack.enter_context(TemporaryDirectory(prefix="fourmill-import-")))
            made[name] = _wanted(
                url, facts, name, entries.get(name, ModalityEntry()), size, seed, scratch / name
            )
        wanted = {name: one for name, (one, _) in made.items()}
        folders = [one.folder for one in wanted.values()]
        with progress("Identify", "tars") as advance:
            tree = Tree.open(url, folders, lambda done, total: advance(done, total, ""), told.n_crops or 0)
        plan = Plan(tree, wanted, seed, val_fraction, size)
        dataset = Dataset.create(dataset_url, plan.identity)
        for name, (_, folder) in made.items():
            if folder is not None:
                dataset.add_tokenizer(name, folder)
        with progress("Import", "shards") as advance:
            rows = import_shards(plan, dataset, lambda done, total: advance(done, total, ""))
    run = _remember(dataset, plan, rows)
    return Imported(len(rows), sum(rows.values()), imported_snapshot(dataset, run))


def imported_snapshot(
    dataset: Dataset, run: Mapping[str, Any], names: Sequence[str] | None = None, where: Sequence[str] = ()
) -> Snapshot:
    """Pin what was imported, or some modalities of it. ``run``: the note of the import."""
    entries = run["modalities"]
    for name in names or ():
        if name not in entries:
            raise ConfigError(f"{dataset.url} has no modality {name!r}{nearest(name, entries)}")
    conditions = parse_conditions(where, "where")
    for condition in conditions:
        if condition.name not in entries:
            raise ConfigError(f"where: {dataset.url} has no modality {condition.name!r}")
    chosen = [n for n in entries if names is None or n in names or n in {c.name for c in conditions}]
    return Snapshot.create(
        dataset,
        {name: entries[name]["recipe"] for name in chosen},
        {name: _modality_of(entries[name], dataset.url) for name in chosen},
        {name: entries[name]["tokenizer"] for name in chosen if entries[name]["tokenizer"]},
        int(run["imported"]["image_size"]),
        conditions,
    )


def _remember(dataset: Dataset, plan: Plan, rows: Mapping[int, int]) -> dict[str, Any]:
    """runs/<id>.yaml, from which `status` and `export` know what there is to be."""
    recipes = plan.recipes()
    content = {
        "fourmill": __version__,
        "imported": {"url": plan.tree.url, "image_size": plan.image_size},
        "modalities": {
            name: {
                **modality_json(wanted.modality),
                "recipe": recipes[name].short,
                "tokenizer": wanted.tokenizer[:SHORT],
            }
            for name, wanted in plan.wanted.items()
        },
        "recipes": {name: {"kind": r.kind, **r.content} for name, r in recipes.items()},
        "shards": {str(shard): count for shard, count in rows.items()},
    }
    content = json.loads(json.dumps(content))
    note = yaml.safe_dump(content, sort_keys=False)
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    dataset.store.put(f"runs/{now}-{sha256(note)[:SHORT]}.yaml", note.encode())
    return dict(content)


# -- what the modalities are --------------------------------------------------------------------------


def _wanted(
    url: str, facts: Mapping[str, Any], name: str, entry: ModalityEntry, image_size: int, seed: int, scratch: Path
) -> tuple[Wanted, Path | None]:  # fmt: skip
    """A modality, and the folder of its tokenizer if there is one. ``scratch``: a folder to be made for it."""
    safe_name(name)
    noted = facts.get("modalities", {}).get(name)
    modality = _modality_of(noted, f"{url}/{MARKER}") if noted is not None else _declared(name, entry)
    if modality.name != name:
        raise DatasetError(f"{url}/{MARKER}: modality {name!r} says that it is {modality.name!r}")
    if entry.classes is not None:
        modality = modality.with_classes(tuple(entry.classes))
    modality = replace(
        modality,
        vocab_size=entry.vocab_size or modality.vocab_size,
        num_tokens=entry.num_tokens or modality.num_tokens,
    )
    short = str(noted.get("tokenizer") or "") if noted else ""
    folder, modality = _tokenizer(url, name, entry, modality, image_size, short, scratch)
    encode = None
    if modality.kind == "sequence":
        if folder is None:
            raise ConfigError(
                f"modalities.{name}: its texts are to be tokenized; give its `vocabulary` (a file) or `tokenizer` (a "
                "folder) in --modalities FILE"
            )
        codec = load_codec(folder, modality, image_size)
        modality, encode = codec.modality, _encoder(name, codec, seed)
    elif folder is not None:
        modality = _agreed(name, entry, modality, load_codec(folder, modality, image_size).modality)
    _check(name, modality)
    digest = folder_hash(str(folder.resolve())) if folder is not None else ""
    provenance = _provenance(facts.get("provenance", {}).get(name), modality)
    folder_name = entry.folder or name
    return Wanted(modality, folder_name, digest, encode, provenance), folder


def _provenance(ways: Any, modality: Modality) -> dict[str, Any]:
    """Whose weights it was made with, as an export noted it; a licence that nobody named is unknown. Texts have none."""
    if not isinstance(ways, list) or not all(isinstance(way, dict) for way in ways):
        named = {} if modality.contract.form == "text" else {"license": licenses.UNKNOWN}
        return {"labeler": "imported", **named}
    if len(ways) == 1:
        return {"labeler": "imported"} | {k: str(ways[0][k])[:MAX_WORDS] for k in _WAY if ways[0].get(k)}
    found = sorted(
        {str(way[k])[:MAX_WORDS] for way in ways for k in ("license", "tokenizer_license") if way.get(k)}
    )
    return {"labeler": "imported", **({"license": " and ".join(found)} if found else {})}


def _modality_of(entry: Any, where: str) -> Modality:
    """From its JSON (`modality_json`), which others may have written."""
    try:
        contract = {**entry["contract"], "classes": tuple(map(str, entry["contract"]["classes"]))}
        fields = ("name", "kind", "codec", "vocab_size", "num_tokens", "reference_name", "doc")
        modality = Modality(contract=LabelContract(**contract), **{name: entry[name] for name in fields})
    except (KeyError, TypeError) as error:
        raise DatasetError(f"{where}: a modality is not described as it should be: {error!r}") from error
    return modality


def _declared(name: str, entry: ModalityEntry) -> Modality:
    """By its name, as this fourmill knows it, or by its kind."""
    known = {cls.modality.name: cls.modality for _, cls in labelers.items()} | SOURCE_MODALITIES
    if entry.kind is None and entry.form is None and name in known:
        return known[name]
    kind: Kind | None = "sequence" if entry.form else entry.kind
    if kind is None:
        raise ConfigError(f"modalities.{name}: say of which `kind` it is{nearest(name, known)}")
    form: Form = entry.form or _FORMS[kind]
    like = next((m for m in known.values() if entry.form and m.contract.form == form), None)
    if like is not None:
        return replace(like, name=name)
    codec = {"metadata": "metadata", "palette": "palette", "poses": "poses", "text": "text"}.get(form, "")
    return Modality(name=name, kind=kind, codec=codec, contract=LabelContract(form=form, dtype="float32"))


def _agreed(name: str, entry: ModalityEntry, modality: Modality, made: Modality) -> Modality:
    """What a tokenizer says of itself, unless somebody says otherwise."""
    for field in ("vocab_size", "num_tokens"):
        said, is_so = getattr(modality, field), getattr(made, field)
        if said and said != is_so:
            raise ConfigError(f"modalities.{name}.{field}: {said}, but its tokenizer has {is_so}")
    return made


def _check(name: str, modality: Modality) -> None:
    if modality.kind not in get_args(Kind) or modality.kind == "pixels":
        raise ConfigError(f"modalities.{name}: {modality.kind!r} cannot be imported")
    if modality.kind == "sequence" and modality.contract.form not in ("text", *LABELLED):
        raise ConfigError(f"modalities.{name}: sequences of {modality.contract.form!r} cannot be imported")
    lacking = [
        field
        for field, most in (("vocab_size", MAX_VOCABULARY), ("num_tokens", MAX_TOKENS))
        if not (type(value := getattr(modality, field)) is int and 1 <= value <= most)
    ]
    needed = {"embedding": ["num_tokens"], "scalar": []}.get(modality.kind, ["vocab_size", "num_tokens"])
    for field in lacking:
        if field in needed:
            raise ConfigError(f"modalities.{name}.{field}: missing; say it in --modalities FILE")


# -- tokenizers ---------------------------------------------------------------------------------------


def _tokenizer(
    url: str, name: str, entry: ModalityEntry, modality: Modality, image_size: int, short: str, scratch: Path
) -> tuple[Path | None, Modality]:  # fmt: skip
    """Its folder: the given one, one made around a given vocabulary, or the one in the tree; None where there is none."""
    store, inside = Store(url), f"{TOKENIZERS}/{name}/{short}"
    if entry.tokenizer is not None:
        folder = Path(entry.tokenizer)
        if not folder.is_dir():
            raise ConfigError(f"modalities.{name}.tokenizer: {folder} is no folder")
    elif entry.vocabulary is not None:
        return _around(name, modality, image_size, Vocabulary.load(Path(entry.vocabulary)), scratch)
    elif short and len(short) == SHORT and short.isalnum() and store.names(inside):
        folder = scratch
        folder.mkdir()
        for file, found in store.entries(inside).items():
            if found.size > MAX_FILE_BYTES:
                raise DatasetError(
                    f"{url}/{inside}/{file} has {found.size} bytes; the limit is {MAX_FILE_BYTES}"
                )
            if file != SUMS:
                (folder / file).write_bytes(store.read(f"{inside}/{file}"))
    else:
        return None, modality
    if short and folder_hash(str(folder.resolve()))[:SHORT] != short:
        raise ConfigError(
            f"{name}: {folder if entry.tokenizer else f'{url}/{inside}'} is not the tokenizer {short}"
        )
    return folder, modality


def _around(
    name: str, modality: Modality, image_size: int, vocabulary: Vocabulary, scratch: Path
) -> tuple[Path, Modality]:
    cls = codecs.get(modality.codec) if modality.codec in codecs else None
    if cls is None or not issubclass(cls, VocabularyCodec):
        raise ConfigError(f"modalities.{name}.vocabulary: {name} is not written as text")
    if modality.contract.form == "boxes" and not modality.contract.classes:
        modality = modality.with_classes(tuple(vocabulary.classes))
    cls.make(modality, image_size, vocabulary, {}).save(scratch)
    return scratch, modality


def _encoder(name: str, codec: Codec, seed: int) -> Encode:
    """Crops labels and makes tokens of them, just as a build does."""

    def crops_of(label: Label, row: int, rows: Rows) -> Iterator[Label]:
        for index, crop in enumerate(rows.crops[row]):
            if isinstance(label, Absent):
                yield blank_label(codec.modality, codec.image_size)
                continue
            rng = None
            if codec.modality.contract.form in DRAWN:
                rng = generator(seed, f"crop of {name}", key64(rows.keys[row]), index)
            size = rows.sizes[row][::-1]
            yield crop_label(codec.modality, label, index, crop, size, codec.image_size, rng)

    def encode(labels: Sequence[Label], rows: Rows) -> list[Cell]:
        n_crops = rows.crops.shape[1]
        cropped = [crop for row, label in enumerate(labels) for crop in crops_of(label, row, rows)]
        values = codec.encode(cropped)
        return [
            label if isinstance(label, Absent) else values[row * n_crops : (row + 1) * n_crops]
            for row, label in enumerate(labels)
        ]

    return encode
