"""From a configuration to what is wanted: labelers, codecs and recipes, without loading a network."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fourmill import crops, licenses
from fourmill.checkpoints import fetch
from fourmill.checkpoints import resolve as resolve_checkpoint
from fourmill.config import Config, ModalityConfig
from fourmill.errors import ConfigError, nearest
from fourmill.flows.fit_encoder import with_encoder
from fourmill.labelers.base import COMMON_KEYS, Labeler, LabelerSettings, labelers, upstream_of
from fourmill.labelers.figures import Limit, figure_names
from fourmill.modality import SOURCE_MODALITIES, Modality
from fourmill.shards.dataset import ORIGIN, Dataset
from fourmill.shards.decode import DECODE_VERSION
from fourmill.shards.receipts import SHORT, Recipe
from fourmill.shards.sources.base import Source, make_source
from fourmill.tokenize.base import Codec, codec_hash, codecs, load_codec, read_config

_HASH = re.compile(r"\b[0-9a-f]{20,}\b")


@dataclass(frozen=True)
class Wanted:
    """One modality of a configuration, resolved. Pickles, so that actors get it whole."""

    name: str
    modality: Modality  # as the labeler describes it; the codec adds vocabulary and token count
    labeler: str | None  # None: it comes from the source
    settings: LabelerSettings | None
    label_recipe: Recipe
    crop_rule: dict[str, int]
    keep_labels: bool
    batch_size: int | None
    upstream: tuple[str, ...]  # modalities whose labels it needs
    sees_crops: bool
    needs_truth: bool
    limits: Mapping[str, Limit] = field(default_factory=dict)  # of figures; no part of any recipe
    tokenizer_folder: str | None = None  # on this machine; None: to be fitted
    tokenizer: str | None = None  # full hash
    license: str | None = None  # of the labeler's weights; None: it has none
    tokenizer_provenance: Mapping[str, str] = field(default_factory=dict)  # of a given one: model and licence

    def make_labeler(self) -> Labeler:
        assert self.labeler is not None and self.settings is not None
        return labelers.get(self.labeler)(self.settings)

    def token_recipe(self) -> Recipe | None:
        """None while its tokenizer is yet to be fitted."""
        if self.tokenizer is None:
            return None
        content = {"label": self.label_recipe.content, "tokenizer": self.tokenizer, "crops": self.crop_rule}
        return Recipe("token", content)


@dataclass(frozen=True)
class Resolved:
    """A checked configuration with its source and its wanted modalities, upstream first."""

    config: Config
    source: Source
    wanted: dict[str, Wanted]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What dataset.yaml says: it can never change."""
        c = self.config
        return {
            "seed": c.seed,
            "shard_size": c.shard_size,
            "n_crops": c.n_crops,
            "val_fraction": c.val_fraction,
            "decode": c.decode.model_dump(),
            "source": self.source.identity(),
        }

    @property
    def samples_recipe(self) -> Recipe:
        return Recipe(
            "samples",
            {**self.identity, "crop_rule": crops.CROP_RULE_VERSION, "decode_version": DECODE_VERSION},
        )

    def token_recipes(self) -> dict[str, Recipe]:
        return {n: r for n, w in self.wanted.items() if (r := w.token_recipe()) is not None}

    def unfitted(self) -> list[str]:
        return [name for name, wanted in self.wanted.items() if wanted.tokenizer is None]

    def closure(self, names: list[str]) -> list[str]:
        """The names with every modality whose label they need, in dependency order."""
        needed = set(names)
        for name in reversed(self.wanted):
            if name in needed:
                needed.update(self.wanted[name].upstream)
        return [name for name in self.wanted if name in needed]

    def groups(self) -> list[list[str]]:
        """Modalities by the actor that hosts them: as the configuration says, the rest together."""
        given = [list(group) for group in self.config.engine.groups]
        named = [name for group in given for name in group]
        for name in named:
            if name not in self.wanted:
                raise ConfigError(f"engine.groups: no modality {name!r} here{nearest(name, self.wanted)}")
            if named.count(name) > 1:
                raise ConfigError(f"engine.groups: {name!r} is in more than one group")
        rest = [name for name in self.wanted if name not in named]
        return [group for group in [*given, rest] if group]


def resolve(config: Config) -> Resolved:
    """Check every name and option, and compute the recipes. Reads configurations of checkpoints, no weights."""
    source = make_source(config.source.kind, **config.source.options)
    wanted: dict[str, Wanted] = {}
    for name in _ordered(config):
        made = _wanted(name, config, source, wanted)
        wanted[name] = replace(made, limits=_limits(made, config.modalities[name]))
    for name, entry in wanted.items():
        wanted[name] = _with_tokenizer(entry, config)
    resolved = Resolved(config, source, wanted)
    resolved.groups()
    return resolved


def _labeler_of(name: str, entry: ModalityConfig) -> str | None:
    if name in SOURCE_MODALITIES:
        if entry.labeler is not None:
            raise ConfigError(
                f"modalities.{name}.labeler: {name} comes from the source itself; remove the key"
            )
        return None
    if entry.labeler is None and name not in labelers:
        known = [*SOURCE_MODALITIES, *(cls.modality.name for _, cls in labelers.items())]
        raise ConfigError(f"modalities.{name}: unknown modality{nearest(name, known)}")
    return entry.labeler or name


def _ordered(config: Config) -> Iterator[str]:
    """The configured modalities, and those that only their labels are needed of, upstream first."""
    done: list[str] = []

    def visit(name: str, wanted_by: str | None) -> None:
        if name in done:
            return
        entry = config.modalities.get(name)
        if entry is None:
            raise ConfigError(
                f"modalities.{wanted_by}: its labeler needs the labels of {name!r}; add `{name}: {{}}`"
            )
        labeler = _labeler_of(name, entry)
        for upstream in upstream_of(labelers.get(labeler).inputs) if labeler else ():
            visit(upstream, name)
        done.append(name)

    for name in config.modalities:
        visit(name, None)
    yield from done


def _wanted(name: str, config: Config, source: Source, before: dict[str, Wanted]) -> Wanted:
    entry = config.modalities[name]
    labeler_name = _labeler_of(name, entry)
    crop_rule = {
        "version": crops.CROP_RULE_VERSION,
        "n_crops": config.n_crops,
        "image_size": config.image_size,
    }
    decode = {**config.decode.model_dump(), "version": DECODE_VERSION}
    if labeler_name is None:
        for key in (
            *entry.options,
            *(k for k in ("model", "revision", "license") if getattr(entry, k) is not None),
        ):
            raise ConfigError(
                f"modalities.{name}.{key}: unknown key{nearest(key, ['keep_labels', 'quality', 'tokenizer'])}"
            )
        modality = SOURCE_MODALITIES[name]
        content: dict[str, Any] = {"labeler": "source", "modality": name, "version": 1}
        if modality.contract.form == "image":
            content["decode"] = decode
        return Wanted(
            name,
            modality,
            None,
            None,
            Recipe("label", content),
            crop_rule,
            entry.keep_labels,
            None,
            (),
            False,
            False,
        )
    settings = LabelerSettings(
        modality=name,
        model=entry.model,
        revision=entry.revision,
        license=entry.license,
        precision=entry.precision,
        image_size=config.image_size,
        options=entry.options,
        upstream={
            up: before[up].modality for up in upstream_of(labelers.get(labeler_name).inputs) if up in before
        },
    )
    labeler = labelers.get(labeler_name)(settings)
    modality = labeler.describe()
    if modality.name != name:
        raise ConfigError(
            f"modalities.{name}.labeler: labeler {labeler_name!r} makes {modality.name!r}, not {name!r}"
        )
    needs_truth = "truth" in labeler.inputs
    if needs_truth and not source.has_truth:
        raise ConfigError(
            f"modalities.{name}.labeler: {labeler_name!r} needs a source with ground truth, such as scenes"
        )
    upstream = labeler.upstream_modalities()
    content = {**labeler.recipe(), "labeler": labeler_name, "modality": name, "decode": decode}
    content["inputs"] = {up: before[up].label_recipe.hash for up in upstream}
    if labeler.sees == "crops":
        content["crops"] = crop_rule
    return Wanted(
        name,
        modality,
        labeler_name,
        settings,
        Recipe("label", content),
        crop_rule,
        entry.keep_labels,
        entry.batch_size,
        upstream,
        labeler.sees == "crops",
        needs_truth,
        license=labeler.license,
    )


def _limits(wanted: Wanted, entry: ModalityConfig) -> dict[str, Limit]:
    """``quality:`` of a modality, whose keys are figures that are measured of it."""
    noted = labelers.get(wanted.labeler).notes if wanted.labeler is not None else ()
    known = figure_names(wanted.modality, noted)
    for name in entry.quality:
        if name not in known:
            raise ConfigError(
                f"modalities.{wanted.name}.quality.{name}: no such figure{nearest(name, known)}; "
                f"measured are {', '.join(known)}"
            )
    return {name: Limit(**limit.model_dump()) for name, limit in entry.quality.items()}


def _with_tokenizer(wanted: Wanted, config: Config) -> Wanted:
    """Fill in the tokenizer: the given one, or the one that was fitted here with these options."""
    given = config.modalities[wanted.name].tokenizer
    if given.model is not None:
        if given.options:
            key = next(iter(given.options))
            raise ConfigError(f"modalities.{wanted.name}.tokenizer.{key}: no such key beside a given `model`")
        where = f"modalities.{wanted.name}.tokenizer.model"
        checkpoint = resolve_checkpoint(given.model, given.revision, where)
        folder = fetch(checkpoint, where, preprocessed=False).folder
        assert folder is not None
        wanted = use_tokenizer(wanted, folder, config.image_size)
        published = codecs.get(read_config(folder)["family"]).license
        named = given.license or published or licenses.in_folder(folder) or licenses.UNKNOWN
        return replace(wanted, tokenizer_provenance={"tokenizer": given.model, "tokenizer_license": named})
    _check_fit(wanted, config)
    try:
        dataset = Dataset(config.dataset)
    except ConfigError:  # not built yet: nothing was fitted
        with_encoder(None, wanted.name, given.options)
        return wanted
    if (short := fitted_tokenizer(dataset, wanted, config)) is not None:
        return use_tokenizer(wanted, dataset.tokenizer_folder(wanted.name, short), config.image_size)
    with_encoder(dataset, wanted.name, given.options)
    return wanted


def _check_fit(wanted: Wanted, config: Config) -> None:
    """ConfigError where its tokenizer cannot be fitted with these options: said before the fit set is labelled."""
    if codecs.get(wanted.modality.codec).needs_fit:
        from fourmill.tokenize.fit import check_fit  # PyTorch is imported where it is needed

        options = {**config.fit.options(), **config.modalities[wanted.name].tokenizer.options}
        check_fit(wanted.modality, options, config.image_size)


def use_tokenizer(wanted: Wanted, folder: Path, image_size: int) -> Wanted:
    """The modality with this tokenizer: loads it, so that a wrong one is refused before any work."""
    codec = load_codec(folder, wanted.modality, image_size)
    return replace(
        wanted,
        modality=codec.modality,
        tokenizer_folder=str(folder),
        tokenizer=codec_hash(folder),
        tokenizer_provenance=_inside(codec),
    )


def _inside(codec: Codec) -> dict[str, str]:
    """Published weights within a tokenizer that was set up here: of bodies, of masks."""
    inner, published = getattr(codec, "inner", None), getattr(codec, "published", "")
    if not isinstance(inner, Codec) or inner.license is None:
        return {}
    return {"tokenizer": str(published), "tokenizer_license": inner.license}


def fitted_tokenizer(dataset: Dataset, wanted: Wanted, config: Config) -> str | None:
    """The short hash of the dataset's tokenizer that was fitted as the configuration asks for."""
    origin = fit_origin(wanted, config)
    for short in dataset.tokenizers(wanted.name):
        raw = dataset.store.read_if_exists(f"tokenizers/{wanted.name}/{short}/{ORIGIN}")
        if raw is not None and json.loads(raw) == origin:
            return short
    return None


def fit_origin(wanted: Wanted, config: Config) -> dict[str, Any]:
    """What a fitted tokenizer is fitted on and how, so that the same request finds it again."""
    fit = config.fit.identity()
    options = config.modalities[wanted.name].tokenizer.options
    if not codecs.get(wanted.modality.codec).needs_fit:
        fit = {}
    return {
        "label_recipe": wanted.label_recipe.hash,
        "options": options,
        "fit": fit,
        "crops": wanted.crop_rule,
    }


def recipe_diff(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Which lines of two recipes differ, as ``path: old -> new``; hashes are cut short, unless they would look alike."""

    def flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and (value or not path):
            for key, entry in value.items():
                yield from flat(entry, f"{path}.{key}" if path else str(key))
        else:
            yield path, value

    a, b = dict(flat(old, "")), dict(flat(new, ""))
    lines = []
    for key in sorted({*a, *b}):
        exact = [json.dumps(side[key], ensure_ascii=False) if key in side else "nothing" for side in (a, b)]
        if exact[0] != exact[1]:
            plain = [
                _HASH.sub(_cut, str(side[key])) if _is_word(side.get(key)) else e
                for side, e in zip((a, b), exact, strict=True)
            ]
            was, now = plain if plain[0] != plain[1] else exact
            lines.append(f"{key}: {was} -> {now}")
    return lines


def _cut(match: re.Match[str]) -> str:
    return f"{match[0][:SHORT]}.."


def _is_word(value: Any) -> bool:
    """Shown without quotes."""
    return isinstance(value, str) and value not in ("", "nothing")


__all__ = [
    "COMMON_KEYS",
    "ORIGIN",
    "SHORT",
    "Resolved",
    "Wanted",
    "fit_origin",
    "fitted_tokenizer",
    "recipe_diff",
    "resolve",
    "use_tokenizer",
]
