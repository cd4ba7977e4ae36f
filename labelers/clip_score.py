"""How well an image and its captions belong together: a number to filter a dataset by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from fourmill.checkpoints import file_of
from fourmill.errors import CheckpointError, ConfigError, nearest
from fourmill.labelers.base import LabelBatch, LabelerSettings, register
from fourmill.labelers.card import LETTERBOXED, Card
from fourmill.labelers.clip import CARD
from fourmill.labelers.letterbox import Placement
from fourmill.labelers.network import NETWORK_OPTIONS, NetworkLabeler
from fourmill.labels import NO_CAPTION, Absent, Label
from fourmill.modality import LabelContract, Modality

CLIP_SCORE = Modality(
    name="clip_score",
    kind="scalar",
    codec="scalar",
    doc="how well an image and its captions belong together, according to CLIP",
    contract=LabelContract(
        form="scalar",
        dtype="float32",
        units="cosine",
        low=-1.001,
        high=1.001,
        flip="none",
        frame="of the embeddings of the whole image and of its captions; larger is a better match",
    ),
)

MAX_CAPTIONS = 16
_POOLS: Mapping[str, Any] = {"mean": np.mean, "max": np.max, "min": np.min}


@register("clip_score")
class ClipScore(NetworkLabeler):
    """The cosine between CLIP's embeddings of the image and of its captions (Hessel et al. 2021, without their factor 2.5).

    The first ``captions`` of each image are looked at, cut to what the text encoder takes; ``pool`` says what becomes of
    several: their ``mean``, ``max`` or ``min``. The image is letterboxed, so that all of it is seen (CLIP was trained on
    centre crops).
    """

    modality: ClassVar[Modality] = CLIP_SCORE
    card: ClassVar[Card | None] = Card(
        expects=f"{LETTERBOXED}; captions in the language of the checkpoint's text encoder",
        default=CARD.default,
        others=tuple(one for one in (CARD.paper, *CARD.others) if one is not None),
        note="4M has no such modality: it is for filtering (`train.where`)",
    )
    inputs: ClassVar[tuple[str, ...]] = ("image", "caption")
    default_model: ClassVar[str | None] = "shipped:clip"
    expected: ClassVar[str] = "a CLIP with its text encoder"
    options: ClassVar[Mapping[str, Any]] = {**NETWORK_OPTIONS, "captions": 1, "pool": "mean"}
    auto_classes: ClassVar[Mapping[str, tuple[str, ...]]] = {"CLIPModel": ("clip",)}

    def __init__(self, settings: LabelerSettings) -> None:
        super().__init__(settings)
        if self.params["pool"] not in _POOLS:
            raise ConfigError(
                f"{self.where}.pool: {self.params['pool']!r} is none of {', '.join(_POOLS)}"
                f"{nearest(str(self.params['pool']), _POOLS)}"
            )

        if not 1 <= int(self.params["captions"]) <= MAX_CAPTIONS:
            raise ConfigError(
                f"{self.where}.captions: {self.params['captions']} is not from 1 to {MAX_CAPTIONS}"
            )

    def describe(self) -> Modality:
        config = self.config()
        if not config.get("text_config"):
            raise CheckpointError(
                f"{self.where}.model: config.json of {self.weights.source} has no text_config; {self.expected} is expected"
            )
        return CLIP_SCORE

    def load(self) -> None:
        from tokenizers import Tokenizer

        where = f"{self.where}.model"
        path = file_of(self.weights, "tokenizer.json", where)
        super().load()
        text = self.network.config.text_config
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{where}: cannot read {path}: {error}") from error
        if self._tokenizer.get_vocab_size() > text.vocab_size:
            raise CheckpointError(
                f"{where}: {path} has {self._tokenizer.get_vocab_size()} tokens, the text encoder {text.vocab_size}; they "
                "are of different networks"
            )
        self._tokenizer.enable_truncation(text.max_position_embeddings)
        self._tokenizer.enable_padding(pad_id=text.pad_token_id or 0, length=text.max_position_embeddings)

    def label(self, batch: LabelBatch) -> list[Label]:
        import torch

        count = int(self.params["captions"])
        if not any(batch.captions):
            return [Absent(NO_CAPTION) for _ in batch.keys]
        # as many texts per row as ever, so that a row's score does not depend on how many the others have
        texts = [text for row in batch.captions for text in [*row[:count], *[""] * (count - len(row))]]
        encoded = self._tokenizer.encode_batch(texts)
        device = torch.device(self.settings.device)
        ids, mask = (
            torch.tensor([getattr(one, name) for one in encoded], device=device)
            for name in ("ids", "attention_mask")
        )
        canvas, placements = self.canvas(batch.frames)
        resized = self.side != self.network.config.vision_config.image_size
        with torch.inference_mode():
            output = self.run(canvas, input_ids=ids, attention_mask=mask, interpolate_pos_encoding=resized)
        pool = _POOLS[self.params["pool"]]
        return [
            float(pool(cosines[: len(row)])) if row else Absent(NO_CAPTION)
            for row, cosines in zip(batch.captions, self.read(output, placements), strict=True)
        ]

    def read(self, output: Any, placements: Sequence[Placement]) -> list[Label]:
        """float32 (captions,) per row: the cosine of the image's embedding with that of each text."""
        import torch.nn.functional as F

        images_B1D = F.normalize(output.image_embeds.float(), dim=-1)[:, None]
        texts_BKD = F.normalize(output.text_embeds.float(), dim=-1).unflatten(0, (len(placements), -1))
        cosines: np.ndarray = (images_B1D * texts_BKD).sum(dim=-1).cpu().numpy()
        return list(cosines)
