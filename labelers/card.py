"""A labeler's card: which weights it takes, under which licence, and whose work they are.

What its labels are is not written here: that is the contract of its modality, against which every batch is held.
Licences are those of the weights, not of the code around them. A commit is the one whose files were looked at; where none
could be, ``revision`` is None and the card asks you to pin one.
"""

from __future__ import annotations

from dataclasses import dataclass

from fourmill.checkpoints import Checkpoint
from fourmill.licenses import UNKNOWN, in_checkpoint

#: what the networks of all labelers that see whole images take
LETTERBOXED = (
    "whole images in RGB, of any size: letterboxed onto the square of the checkpoint's preprocessor (or `input_size`), "
    "normalised as its preprocessor_config.json says"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Weights that somebody published."""

    model: str  # hub id
    license: str  # SPDX id or a short name
    revision: str | None = None  # 40 digits
    loads: bool = True  # False: there is no loader for it here
    note: str = ""  # where the licence stands if not on the hub, what to set, what it was trained on
    citation: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """``default`` is for photographs (the network that ships, `Labeler.default_model`, is for rendered scenes);
    ``paper`` what 4M and 4M-21 used; ``others`` are well-known alternatives.
    """

    expects: str  # the images that it is made for
    default: Weights | None = None
    paper: Weights | None = None
    others: tuple[Weights, ...] = ()
    note: str = ""

    def weights(self) -> tuple[Weights, ...]:
        """Everything that the card names, the default first."""
        return tuple(one for one in (self.default, self.paper, *self.others) if one is not None)


def license_of(
    said: str | None, card: Card | None, model: str | None, checkpoint: Checkpoint | None
) -> str | None:
    """The licence of the weights that a labeler uses; None where it uses none.

    What the configuration says wins, then the card where it knows the model, then what the checkpoint names for itself.
    """
    if said or checkpoint is None:
        return said
    known = {one.model: one.license for one in card.weights()} if card is not None else {}
    return known.get(str(model)) or in_checkpoint(checkpoint) or UNKNOWN
