"""A fit that is killed goes on from what it kept, and ends as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fourmill.errors import CheckpointError
from fourmill.labels import Label
from fourmill.modality import LabelContract, Modality
from fourmill.tokenize.base import codec_hash
from fourmill.tokenize.fit import fit_codec

SIZE = 32
DEPTH = Modality(
    name="depth", kind="grid", codec="vqvae",
    contract=LabelContract(form="map", dtype="float32", units="metres", low=1e-3),
)  # fmt: skip
TINY: dict[str, Any] = {
    "preset": "demo", "dim": 32, "heads": 2, "encoder_depth": 1, "decoder_depth": 1, "patch_size": 8, "latent_dim": 8,
    "codebook_size": 64, "refine": 0, "batch_size": 8, "steps": 40, "ema": 0.9, "checkpoint_steps": 7, "relaxed": 0.2,
}  # fmt: skip


class Planes(list[Label]):
    """Depth maps of tilted planes, each of which takes ``wait`` seconds to be read."""

    def __init__(self, wait: float = 0.0) -> None:
        self.wait = wait

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: Any) -> Any:
        time.sleep(self.wait)
        a, b = np.random.default_rng(int(index)).uniform(-0.8, 0.8, 2)
        rows, columns = np.mgrid[0:SIZE, 0:SIZE] / SIZE
        return np.exp(1 + a * rows + b * columns).astype(np.float32)


def fit(out: Path, scratch: Path | None, wait: float = 0.0, **changes: Any) -> Path:
    held_out = [Planes()[i] for i in range(4)]
    options = {**TINY, **changes}
    return fit_codec(
        DEPTH, Planes(wait), held_out, image_size=SIZE, options=options, out=out, scratch=scratch
    )


def kept(scratch: Path) -> list[Path]:
    return sorted(scratch.glob("*.safetensors"))


def test_a_killed_fit_ends_with_the_same_bytes(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    command = [sys.executable, __file__, str(tmp_path / "killed"), str(scratch)]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        limit = time.monotonic() + 60
        while not (scratch.is_dir() and kept(scratch)) and time.monotonic() < limit:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "killed").exists()
    (state,) = kept(scratch)
    steps: list[int] = []

    def progress(step: int, total: int, figures: dict[str, Any]) -> None:
        steps.append(step)

    fit_codec(
        DEPTH, Planes(), [Planes()[i] for i in range(4)], image_size=SIZE, options=TINY,
        out=tmp_path / "resumed", scratch=scratch, progress=progress,
    )  # fmt: skip
    fit(tmp_path / "whole", None)
    assert codec_hash(tmp_path / "resumed") == codec_hash(tmp_path / "whole")
    cards = [(tmp_path / name / "card.yaml").read_bytes() for name in ("resumed", "whole")]
    assert cards[0] == cards[1] and steps[-1] == 40
    assert kept(scratch) == [state], "the state at the end stands where that in the middle stood"


def test_a_fit_that_was_over_takes_no_step_more(tmp_path: Path) -> None:
    fit(tmp_path / "a", tmp_path / "scratch")
    started = time.monotonic()
    fit(tmp_path / "b", tmp_path / "scratch", wait=1.0)
    assert time.monotonic() - started < 10, "40 steps of eight labels would take 320 s"
    assert codec_hash(tmp_path / "a") == codec_hash(tmp_path / "b")


def test_another_fit_starts_anew(tmp_path: Path) -> None:
    fit(tmp_path / "a", tmp_path / "scratch", steps=10)
    fit(tmp_path / "b", tmp_path / "scratch", steps=12)
    fit(tmp_path / "c", None, steps=12)
    assert codec_hash(tmp_path / "b") == codec_hash(tmp_path / "c")
    assert len(kept(tmp_path / "scratch")) == 2


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    fit(tmp_path / "a", tmp_path / "scratch", steps=4)
    (state,) = kept(tmp_path / "scratch")
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{state.name} is damaged.*remove it"):
        fit(tmp_path / "b", tmp_path / "scratch", steps=4)


def test_the_running_mean_is_what_is_kept(tmp_path: Path) -> None:
    """With a decay of nearly nought it is the weights themselves; with a long one it is not."""
    for name, ema in (("none", 0.0), ("short", 1e-6), ("long", 0.95)):
        fit(tmp_path / name, None, ema=ema, steps=20)
    plain, short, long = (_weights(tmp_path / name) for name in ("none", "short", "long"))
    near, far = (float((plain - other).abs().mean()) for other in (short, long))
    assert 10 * near < far


def _weights(folder: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    weights = sorted(load_file(folder / "model.safetensors").items())
    return torch.cat([v.float().flatten() for k, v in weights if "codes" not in k])


if __name__ == "__main__":
    torch.set_num_threads(1)
    fit(Path(sys.argv[1]), Path(sys.argv[2]), wait=0.01)
