"""How the losses of the modalities become one number (4M, section 4.3 of the notes).

Both rules are linear in the sums of cross-entropies, with weights that depend on label counts alone. The counts are
those of the whole step (all ranks, all micro-batches), so the result does not depend on how a step is split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal


def loss_weights(
    counts: Sequence[int],
    is_target: Sequence[bool],
    rule: Literal["mod", "token"],
    count_absent: bool = False,
) -> list[float]:
    """The weight of each modality's sum of cross-entropies.

    ``mod``: the mean over modalities of each one's mean; a modality without labels in the step does not count, or with
    ``count_absent`` counts as zero, as in 4M's own code. ``token``: the mean over all labels, whatever their vocabulary.
    """
    total = sum(counts)
    if rule == "token":
        return [1.0 / total if total else 0.0] * len(counts)
    present = sum(is_target) if count_absent else sum(count > 0 for count in counts)
    return [1.0 / (count * present) if count else 0.0 for count in counts]
