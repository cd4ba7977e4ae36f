"""Fits at several image sizes, fits of whole vectors by memory codes, and fits by several workers."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity

from fourmill.errors import CheckpointError, ConfigError, ContractError
from fourmill.labels import Label
from fourmill.modality import RGB, LabelContract, Modality
from fourmill.tokenize.base import codec_hash, load_codec
from fourmill.tokenize.fit import default_config, fit_codec
from fourmill.tokenize.fit_loop import FitOptions, fit_vqvae
from fourmill.tokenize.memory_codes import MemoryCodes, VectorNetwork
from fourmill.tokenize.peers import Peers
from fourmill.tokenize.published_network import PublishedNetwork, ReleasedConfig
from fourmill.tokenize.published_quantizers import Memcodes
from fourmill.tokenize.quantizers import CosineCodebook
from fourmill.tokenize.spaces import Bounded, Classes, Vector
from fourmill.tokenize.ssim import ssim
from fourmill.tokenize.vqvae import VQVAE, VQConfig

SIZE = 32
TINY: dict[str, Any] = {
    "preset": "demo", "dim": 32, "heads": 2, "encoder_depth": 1, "decoder_depth": 1, "patch_size": 8, "latent_dim": 8,
    "codebook_size": 64, "refine": 0, "batch_size": 8, "steps": 60, "learning_rate": 3e-3,
}  # fmt: skip
NORMAL = Modality(
    name="normal",
    kind="grid",
    codec="vqvae",
    contract=LabelContract(
        form="map", dtype="float32", channels=3, low=-1.0, high=1.0, unit_norm=True, flip="mirror_negate_x"
    ),
)
SEMSEG = Modality(
    name="semseg",
    kind="grid",
    codec="vqvae",
    contract=LabelContract(
        form="map", dtype="uint8", units="class id", resample="nearest", classes=("a", "b", "c")
    ),
)
EMBEDDING = Modality(
    name="embedding",
    kind="vector",
    codec="vqvae",
    contract=LabelContract(form="vector", dtype="float32", channels=24, flip="none"),
)


def ramps(count: int, size: int, seed: int = 0) -> list[Label]:
    """Colour ramps, uint8 (size, size, 3)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:size, 0:size] / size
    corners = rng.uniform(0, 255, (count, 3, 3))
    return [
        np.clip(c[0] + (c[1] - c[0]) * rows[..., None] + (c[2] - c[0]) * columns[..., None], 0, 255).astype(
            np.uint8
        )
        for c in corners
    ]


def test_one_tokenizer_for_several_sizes(tmp_path: Path) -> None:
    options = {**TINY, "sizes": [SIZE, 48, 64], "steps": 150}
    fit_codec(RGB, ramps(48, 64), ramps(8, SIZE, 1), image_size=SIZE, options=options, out=tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["image_size"], config["image_sizes"]) == (SIZE, [SIZE, 48, 64])
    for size in (SIZE, 48, 64):
        codec, labels = load_codec(tmp_path, RGB, size), ramps(8, size, 1)
        assert codec.modality.num_tokens == (size // 8) ** 2
        error = np.abs(np.stack(codec.decode(codec.encode(labels))).astype(float) - np.stack(labels)).mean()
        grey = np.abs(np.stack(labels) - np.stack(labels).mean()).mean()
        assert error < 0.5 * grey, size
        codec.save(tmp_path / str(size))
        assert codec_hash(tmp_path / str(size)) != ""
        assert json.loads((tmp_path / str(size) / "config.json").read_text()) == config
    with pytest.raises(CheckpointError, match="image_size 32, 48, 64, the dataset has 56"):
        load_codec(tmp_path, RGB, 56)


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="image_size 36 is no multiple of patch_size 8"):
        VQVAE(RGB, SIZE, default_config(RGB, "demo", SIZE, patch_size=8), image_sizes=[SIZE, 36])
    features = Modality(
        name="clip",
        kind="grid",
        codec="vqvae",
        contract=LabelContract(form="features", dtype="float32", channels=4),
    )
    label = np.zeros((4, 4, 4), np.float32)
    with pytest.raises(ConfigError, match="modalities.clip: `sizes` are for maps"):
        fit_codec(
            features, [label], [], image_size=SIZE, options={**TINY, "sizes": [32, 64]}, out=Path("never")
        )


def test_labels_are_resized_by_their_own_rule() -> None:
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(0, 3, (2, 64, 64)))
    small = Classes(SEMSEG, 8).resize(ids, 32)
    assert (
        small.shape == (2, 32, 32)
        and small.dtype == torch.int64
        and set(small.unique().tolist()) <= {0, 1, 2}
    )
    vectors = F.normalize(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    assert torch.allclose(Bounded(NORMAL).resize(vectors, 32).norm(dim=1), torch.ones(2, 32, 32), atol=1e-5)


def embeddings(count: int, seed: int) -> list[Label]:
    """Mixtures of four fixed vectors."""
    base = np.random.default_rng(7).normal(size=(4, 24))
    rng = np.random.default_rng(seed)
    return [(rng.dirichlet([0.3] * 4) @ base).astype(np.float32) for _ in range(count)]


MEMORY: dict[str, Any] = {
    "preset": "demo", "quantizer": "memory", "memory_heads": 4, "latent_dim": 32, "dim": 48, "encoder_depth": 2,
    "decoder_depth": 2, "codebook_size": 32, "batch_size": 32, "steps": 160, "learning_rate": 3e-3,
}  # fmt: skip


def test_memory_codes_learn_vectors(tmp_path: Path) -> None:
    held_out = embeddings(64, 1)
    fit_codec(EMBEDDING, embeddings(256, 0), held_out, image_size=SIZE, options=MEMORY, out=tmp_path)
    codec = load_codec(tmp_path, EMBEDDING, SIZE)
    assert (codec.modality.num_tokens, codec.modality.vocab_size) == (4, 32)
    tokens = np.stack([np.asarray(t) for t in codec.encode(held_out)])
    assert tokens.shape == (64, 4) and tokens.dtype == np.uint16
    decoded = np.stack(codec.decode(list(tokens)))
    error = ((decoded - np.stack(held_out)) ** 2).mean()
    trivial = ((np.mean(embeddings(256, 0), axis=0) - np.stack(held_out)) ** 2).mean()
    assert error < 0.3 * trivial
    assert isinstance(codec, VQVAE) and all(len(np.unique(column)) > 2 for column in tokens.T)
    certain = np.eye(32, dtype=np.float32)[tokens]
    assert np.allclose(codec.decode_expected(certain), decoded, atol=1e-4)
    assert codec.code_vectors().shape == (32, 32)


def test_the_full_size_of_vectors_is_that_of_4m_21() -> None:
    config = default_config(EMBEDDING, "4m", 224)
    assert (config.quantizer, config.memory_heads, config.codebook_size) == ("memory", 16, 8192)
    with torch.device("meta"):
        network = VectorNetwork(config, Vector(EMBEDDING, 768, is_whole=True))
        released = PublishedNetwork(
            ReleasedConfig(
                enc_type="BottleneckMLP/B_6-Wi_1024", dec_type="BottleneckMLP/B_6-Wi_1024", quant_type="memcodes",
                n_channels=768, latent_dim=1024, num_codebooks=16, codebook_size=8192, patch_proj=False,
            )
        )  # fmt: skip
    ours = {k: v.shape for k, v in network.state_dict().items() if k not in ("shift", "scale")}
    theirs = {k.replace("quantize.", "quantizer."): v.shape for k, v in released.state_dict().items()}
    assert ours == theirs


@torch.no_grad()
def test_whole_vectors_go_the_way_of_the_published_network() -> None:
    config = VQConfig(
        dim=48, heads=4, encoder_depth=2, decoder_depth=3, latent_dim=32, codebook_size=64, quantizer="memory", memory_heads=4
    )  # fmt: skip
    ours = VectorNetwork(config, Vector(EMBEDDING, 24, is_whole=True)).eval()
    released = ReleasedConfig(
        enc_type="BottleneckMLP/B_2-Wi_48", dec_type="BottleneckMLP/B_3-Wi_48", quant_type="memcodes",
        n_channels=24, latent_dim=32, num_codebooks=4, codebook_size=64, patch_proj=False,
    )  # fmt: skip
    theirs = PublishedNetwork(released).eval()
    theirs.load_state_dict(
        {
            k.replace("quantizer.", "quantize."): v
            for k, v in ours.state_dict().items()
            if k not in ("shift", "scale")
        }
    )
    x = torch.randn(16, 24, 1, 1, generator=torch.Generator().manual_seed(0))
    output, ids, _ = ours(x)
    assert torch.equal(ids, theirs.tokens(x)) and len(ids.unique()) > 8
    expected = theirs.decode(theirs.quantize.lookup(ids))
    assert torch.allclose(output, expected, atol=1e-5)


def test_a_drawn_choice_has_the_probability_of_its_score() -> None:
    """Training draws from the softmax of the scores, and what it gives is exactly the drawn code's value."""
    codes = MemoryCodes(5, 4, 2).train()
    part = torch.randn(1, 4, 1, 1, generator=torch.Generator().manual_seed(3))
    quantized, ids, loss = codes.quantize(part.expand(20_000, -1, -1, -1), torch.Generator().manual_seed(0))
    assert ids.shape == (20_000, 2, 1, 1) and float(loss) == 0
    scores = codes.to_k(codes.codes) @ part.view(2, 2, 1) * 2**-0.5
    for head in range(2):
        drawn = torch.bincount(ids[:, head].flatten(), minlength=5) / 20_000
        assert torch.allclose(drawn, scores[head, :, 0].softmax(0), atol=0.015)
    assert torch.allclose(quantized, Memcodes.lookup(codes, ids), atol=1e-4)
    quantized.sum().backward()
    assert codes.codes.grad is not None and float(codes.codes.grad.abs().sum()) > 0


def test_memory_codes_are_for_vectors() -> None:
    with pytest.raises(ConfigError, match="modality 'rgb': the quantizer 'memory' is for vectors"):
        VQVAE(RGB, SIZE, VQConfig(dim=32, heads=2, latent_dim=32, quantizer="memory"))
    with pytest.raises(ConfigError, match=r"latent_dim 30 must be a multiple of memory_heads \(16\)"):
        VQConfig(latent_dim=30, quantizer="memory")


class Threads:
    """Workers as threads of this process, which meet at every sum."""

    def __init__(self, world: int) -> None:
        self.world, self.barrier = world, threading.Barrier(world, timeout=60)
        self.given: list[Any] = [None] * world

    def meet(self, rank: int, value: Any) -> list[Any]:
        self.given[rank] = value
        self.barrier.wait()
        every = list(self.given)
        self.barrier.wait()
        return every

    def run(self, call: Callable[[Peers], Any]) -> list[Any]:
        results: list[Any] = [None] * self.world

        def work(rank: int) -> None:
            try:
                results[rank] = call(_Thread(self, rank))
            except BaseException:
                self.barrier.abort()
                raise

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class _Thread(Peers):
    __slots__ = ("group",)

    def __init__(self, group: Threads, rank: int) -> None:
        super().__init__(rank, group.world)
        object.__setattr__(self, "group", group)

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        every = self.group.meet(self.rank, values.clone())  # type: ignore[attr-defined]
        return values.copy_(torch.stack(every).sum(0))

    def share(self, value: Any) -> Any:
        return self.group.meet(self.rank, value)[0]  # type: ignore[attr-defined]

    def wait(self) -> None:
        self.group.meet(self.rank, None)  # type: ignore[attr-defined]


def test_workers_end_with_one_network_near_that_of_one_alone() -> None:
    labels = ramps(32, SIZE)
    config = default_config(RGB, "demo", SIZE, **{k: TINY[k] for k in list(TINY)[1:9]})
    options = FitOptions(steps=12, batch_size=8, learning_rate=1e-3, relaxed=0.5)

    def fit(peers: Peers) -> VQVAE:
        return fit_vqvae(RGB, labels, config, image_size=SIZE, options=options, peers=peers)

    one, two = (codec.network.state_dict() for codec in Threads(2).run(fit))
    assert all(torch.equal(one[k], two[k]) for k in one)
    options = FitOptions(steps=12, batch_size=8, learning_rate=1e-3, relaxed=1.0)
    start = fit_vqvae(RGB, labels, config, image_size=SIZE, options=replace(options, learning_rate=0.0))
    begun, alone, many = (_flat(codec) for codec in (start, fit(Peers()), Threads(2).run(fit)[0]))
    assert (alone - many).abs().mean() < 0.02 * (alone - begun).abs().mean()
    with pytest.raises(ConfigError, match=r"batch_size 9 is no multiple of fit.workers \(2\)"):
        fit_vqvae(RGB, labels, config, image_size=SIZE, options=FitOptions(batch_size=9), peers=Peers(0, 2))


def _flat(codec: VQVAE) -> torch.Tensor:
    return torch.cat([p.flatten() for p in codec.network.parameters()])


def test_codebooks_of_workers_are_equal_after_restarts() -> None:
    def fill(peers: Peers) -> tuple[torch.Tensor, torch.Tensor, int]:
        codebook = CosineCodebook(64, 4, decay=0.8).train()
        codebook.peers = peers
        rng = torch.Generator().manual_seed(peers.rank)
        for _ in range(30):
            codebook.quantize(torch.randn(4, 4, 4, 4, generator=rng), rng)
        return codebook.codes, codebook.cluster_size, peers.rank

    (codes, sizes, _), (others, other_sizes, _) = Threads(2).run(fill)
    assert torch.equal(codes, others) and torch.equal(sizes, other_sizes)
    assert len(codes.unique(dim=0)) == 64
    assert float(sizes.sum()) == pytest.approx(128, rel=0.1), "vectors of both workers are counted"


def test_labels_that_are_not_finite_are_refused_by_name() -> None:
    codec = VQVAE(NORMAL, SIZE, default_config(NORMAL, "demo", SIZE))
    label = np.full((SIZE, SIZE, 3), np.nan, np.float32)
    with pytest.raises(ContractError, match="tokenizer of 'normal': a label has values that are not finite"):
        codec.encode([label])


def test_labels_of_another_meaning_are_refused(tmp_path: Path) -> None:
    metres = Modality(
        name="depth",
        kind="grid",
        codec="vqvae",
        contract=LabelContract(form="map", dtype="float32", units="metres"),
    )
    VQVAE(metres, SIZE, default_config(metres, "demo", SIZE)).freeze().save(tmp_path)
    other = metres.resolved(contract=LabelContract(form="map", dtype="float32", units="disparity"))
    with pytest.raises(CheckpointError, match="whose units is 'metres', that of 'depth' is 'disparity'"):
        load_codec(tmp_path, other, SIZE)
    wider = RGB.resolved(
        contract=LabelContract(form="image", dtype="uint8", channels=3, units="sRGB", low=0, high=1023)
    )
    VQVAE(RGB, SIZE, default_config(RGB, "demo", SIZE)).freeze().save(tmp_path / "rgb")
    with pytest.raises(CheckpointError, match="whose high is 255"):
        load_codec(tmp_path / "rgb", wider, SIZE)


@pytest.mark.parametrize("channels", [None, 3])
def test_ssim_is_that_of_scikit_image(channels: int | None) -> None:
    rng = np.random.default_rng(0)
    shape = (40, 33) if channels is None else (40, 33, channels)
    a = rng.integers(0, 256, shape).astype(np.uint8)
    b = np.clip(a + rng.normal(0, 25, shape), 0, 255).astype(np.uint8)
    expected = structural_similarity(
        a.astype(float), b.astype(float), data_range=255, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, channel_axis=None if channels is None else 2,
    )  # fmt: skip
    assert ssim(a, b, 255) == pytest.approx(expected, abs=1e-9)
    assert ssim(a, a, 255) == 1.0


def test_figures_of_every_space() -> None:
    """By hand: a map that is a tenth too far everywhere, another that is half too far."""
    metres = Modality(
        name="depth",
        kind="grid",
        codec="vqvae",
        contract=LabelContract(form="map", dtype="float32", units="metres"),
    )
    space = VQVAE(metres, SIZE, default_config(metres, "demo", SIZE)).space
    label = np.random.default_rng(0).uniform(1, 10, (SIZE, SIZE)).astype(np.float32)
    found = space.figures([label, label], [label * 1.1, label * 1.5])
    assert found["abs_rel"] == pytest.approx(0.3, abs=1e-5) and found["delta1"] == 0.5
    relative = metres.resolved(contract=LabelContract(form="map", dtype="float32", units="disparity"))
    space = VQVAE(relative, SIZE, default_config(relative, "demo", SIZE)).space
    made = space.to_labels(space.to_network(label[None]))
    found = space.figures([label], made)
    assert found["abs_rel"] < 1e-5 and found["delta1"] == 1.0 and found["mean_absolute_error"] < 1e-5
    image = np.random.default_rng(0).integers(0, 250, (SIZE, SIZE, 3)).astype(np.uint8)
    found = Bounded(RGB).figures([image], [image + 5])
    assert found["psnr_db"] == pytest.approx(20 * np.log10(255 / 5), abs=1e-6) and 0.9 < found["ssim"] < 1
    x, y = (np.broadcast_to(np.array(v, np.float32), (4, 4, 3)) for v in ([1, 0, 0], [0, 1, 0]))
    found = Bounded(NORMAL).figures([x, x], [x, y])
    assert found["mean_degrees"] == pytest.approx(45) and found["within_11.25_degrees"] == 0.5
