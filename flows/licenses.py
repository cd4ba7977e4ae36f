"""What a dataset was made with, and under which licences: `fourmill status --licenses`, from receipts alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fourmill.flows.status import latest_run, recipe_of
from fourmill.licenses import ADVICE, UNKNOWN, Terms, terms
from fourmill.shards.dataset import Dataset

TOKENIZER = "(tokenizer)"
NO_WEIGHTS = "no weights"
_STYLES: dict[Terms, str] = {
    "permissive": "", "non-commercial": "red", "conditions": "yellow", "unknown": "yellow",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Use:
    """Weights that shards of a modality were made with. ``revision``: 40 digits, sha256:..., None without weights."""

    modality: str
    labeler: str  # or `TOKENIZER`, for one that was given
    model: str | None
    revision: str | None
    license: str | None  # None: there are no weights
    terms: Terms | None
    shards: int


def uses(dataset: Dataset, run: dict[str, Any] | None = None) -> list[Use]:
    """By modality, labelers first: what made the finished shards that the newest run asks for, kept labels too.

    A licence that nobody had named when a shard was made is the one that the newest run's configuration names since.
    """
    run = run or latest_run(dataset)
    entries = run.get("config", {}).get("modalities", {})
    counts: dict[tuple[str, str, str | None, str | None, str | None], set[int]] = {}
    for name, short in _columns(run):
        for shard, receipt in dataset.receipts(name, short).items():
            for labeler, model, revision, named in _made_with(receipt.provenance):
                if named == UNKNOWN:
                    entry = entries.get(name) or {}
                    entry = entry.get("tokenizer") or {} if labeler == TOKENIZER else entry
                    named = entry.get("license") or UNKNOWN
                counts.setdefault((name, labeler, model, revision, named), set()).add(shard)
    return [
        Use(name, labeler, model, revision, named, terms(named) if named else None, len(shards))
        for (name, labeler, model, revision, named), shards in counts.items()
    ]


def _columns(run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(modality, short recipe) of tokens, and of labels where they are kept."""
    labels = run.get("labels", {})
    for name, content in run["recipes"].items():
        recipe = recipe_of(content)
        if recipe is not None:
            yield name, recipe.short
        if name in labels:
            yield name, labels[name]["recipe"]


def _made_with(provenance: Mapping[str, Any]) -> Iterator[tuple[str, str | None, str | None, str | None]]:
    """(labeler, model, revision, licence); a receipt that says nothing of a licence is as one that nobody named."""
    if "labeler" in provenance:
        weights = provenance.get("weights")
        named = provenance.get("license") or (UNKNOWN if weights else None)
        yield str(provenance["labeler"]), provenance.get("model"), weights, named
    if "tokenizer" in provenance:
        yield TOKENIZER, provenance["tokenizer"], None, provenance.get("tokenizer_license", UNKNOWN)


def licenses_json(found: list[Use]) -> list[dict[str, Any]]:
    return [asdict(use) for use in found]


def licenses_report(found: list[Use], url: str) -> Group:
    """A table, and a sentence for each licence that is not plainly free, with the modalities that it binds."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("modality", "labeler", "model", "revision", "licence", "shards"):
        table.add_column(
            heading,
            justify="right" if heading == "shards" else "left",
            overflow="fold",
            no_wrap=heading == "modality",
        )
    marked: dict[str, list[str]] = {}
    for use in found:
        style = _STYLES[use.terms] if use.terms else ""
        shown = [use.modality, use.labeler, use.model or "", _short(use.revision)]
        table.add_row(*map(Text, shown), Text(use.license or NO_WEIGHTS, style=style), str(use.shards))
        if use.license and use.terms != "permissive":
            names = marked.setdefault(use.license, [])
            names += [use.modality] if use.modality not in names else []
    sentences = [
        Text(f"{', '.join(names)}: {_sentence(license)}", style=_STYLES[terms(license)])
        for license, names in marked.items()
    ]
    if found and not sentences:
        sentences = [Text("every licence here allows any use; some ask to be named", style="green")]
    if not found:
        sentences = [
            Text("no finished shard yet was made with a labeler or a given tokenizer", style="yellow")
        ]
    return Group(Text(url, style="bold"), table, *sentences)


def _sentence(license: str) -> str:
    kind = terms(license)
    if kind == "unknown":
        return f"licence {license}: {ADVICE[kind]}"
    return f"{license}, {'for non-commercial use only' if kind == 'non-commercial' else 'a licence of its own'}: {ADVICE[kind]}"


def _short(revision: str | None) -> str:
    """Enough of it to tell two apart; all digits are in the receipts, and in --json."""
    return (revision or "")[: 19 if (revision or "").startswith("sha256:") else 12]
