import pytest
import torch
import torch.nn.functional as F

from fourmill.tokenize import quantizers
from fourmill.tokenize.quantizers import CosineCodebook, FiniteScalar, make_quantizer, nearest_codes


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def started(num_codes: int = 32, dim: int = 4, **changes: float) -> CosineCodebook:
    """A codebook that has seen one batch."""
    codebook = CosineCodebook(num_codes, dim, **changes).train()
    codebook.quantize(torch.randn(8, dim, 4, 4, generator=rng(1)), rng())
    return codebook


def test_nearest_code_equals_brute_force_at_any_block_size() -> None:
    vectors = F.normalize(torch.randn(57, 5, generator=rng()), dim=1)
    codes = F.normalize(torch.randn(13, 5, generator=rng(1)), dim=1)
    distances = ((vectors[:, None] - codes[None]) ** 2).sum(-1)
    for cells in (1, 13, 40, 1 << 20):
        assert torch.equal(nearest_codes(vectors, codes, cells), distances.argmin(1))


def test_the_search_never_holds_all_similarities(monkeypatch: pytest.MonkeyPatch) -> None:
    widest = 0
    original = quantizers._largest

    def watch(similarities: torch.Tensor) -> torch.Tensor:
        nonlocal widest
        widest = max(widest, similarities.numel())
        return original(similarities)

    monkeypatch.setattr(quantizers, "_largest", watch)
    nearest_codes(torch.randn(100, 3), torch.randn(10, 3), cells=50)
    assert 0 < widest <= 50


def test_lookup_returns_what_quantize_chose() -> None:
    codebook = started().eval()
    quantized, ids, _ = codebook.quantize(torch.randn(2, 4, 3, 5, generator=rng(2)))
    assert ids.shape == (2, 3, 5) and ids.dtype == torch.int64
    assert torch.allclose(codebook.lookup(ids), quantized, atol=1e-6)
    assert torch.allclose(codebook.codes.norm(dim=1), torch.ones(32), atol=1e-5)


@pytest.mark.parametrize("quantizer", [started().eval(), FiniteScalar((8, 5, 5, 5))])
def test_ids_alone_are_those_of_quantize(quantizer: CosineCodebook | FiniteScalar) -> None:
    latents = torch.randn(3, 4, 5, 7, generator=rng(2))
    assert torch.equal(quantizer.ids(latents), quantizer.quantize(latents)[1])


def test_scale_of_the_latents_does_not_matter() -> None:
    codebook = started().eval()
    latents = torch.randn(2, 4, 3, 3, generator=rng(2))
    assert torch.equal(codebook.quantize(latents)[1], codebook.quantize(17 * latents)[1])


@pytest.mark.parametrize("quantizer", [started().eval(), FiniteScalar((8, 5, 5, 5))])
def test_the_gradient_passes_straight_through(quantizer: CosineCodebook | FiniteScalar) -> None:
    latents = torch.randn(1, 4, 2, 2, generator=rng(3), requires_grad=True)
    weights = torch.randn(1, 4, 2, 2, generator=rng(4))
    (quantizer.quantize(latents)[0] * weights).sum().backward()
    through = latents.grad
    latents.grad = None
    (quantizer.relax(latents) * weights).sum().backward()
    assert through is not None and latents.grad is not None
    assert through.abs().sum() > 0 and torch.allclose(through, latents.grad, atol=1e-6)


def test_commitment_pulls_latents_to_their_codes() -> None:
    codebook = started().eval()
    latents = torch.randn(2, 4, 2, 2, generator=rng(3), requires_grad=True)
    for _ in range(200):
        loss = codebook.quantize(latents)[2]
        (gradient,) = torch.autograd.grad(loss, latents)
        latents = (latents - 5 * gradient).detach().requires_grad_(True)
    first = codebook.quantize(torch.randn(2, 4, 2, 2, generator=rng(3)))[2]
    assert codebook.quantize(latents)[2] < 0.01 * first


def test_averages_follow_the_data_and_unused_codes_stay() -> None:
    codebook = started(num_codes=8, dim=2, decay=0.5, dead_share=0.0)
    with torch.no_grad():
        angles = torch.arange(8) * torch.pi / 4
        codebook.codes.copy_(torch.stack([angles.cos(), angles.sin()], 1))
        codebook.code_sum.copy_(codebook.codes)
        codebook.cluster_size.fill_(1)
    before = codebook.codes.clone()
    target = F.normalize(torch.tensor([[1.0, 0.2]]), dim=1)
    for _ in range(20):
        codebook.quantize(target.view(1, 2, 1, 1))
    assert torch.allclose(codebook.codes[0], target[0], atol=1e-3)
    assert torch.allclose(codebook.codes[1:], before[1:], atol=1e-5)
    assert codebook.cluster_size[0] == pytest.approx(1.0) and float(codebook.cluster_size[1:].max()) < 1e-5


def test_a_replaced_code_lives_on_until_it_has_had_its_chance() -> None:
    """A code given a count below the threshold would be drawn again in every batch."""
    codebook = started(num_codes=16, dim=4, decay=0.9)
    batch = torch.randn(4, 4, 4, 4, generator=rng(5))
    with torch.no_grad():
        codebook.codes[3] = torch.tensor([-1.0, 0.0, 0.0, 0.0])
        codebook.cluster_size[3] = codebook.code_sum[3] = 0.0
    batch[:, 0] = 1 + batch[:, 0].abs()  # nothing in it is near that code
    codebook.quantize(batch, rng(6))
    flat = F.normalize(batch, dim=1).permute(0, 2, 3, 1).reshape(-1, 4)
    assert torch.isclose(flat @ codebook.codes[3], torch.ones(())).any(), "it is a latent of the batch"
    fresh = codebook.codes[3].clone()
    away = -fresh.view(1, 4, 1, 1).expand(4, 4, 4, 4)  # batches in which nobody chooses it
    for _ in range(20):
        codebook.quantize(away, rng(7))
        assert torch.allclose(codebook.codes[3], fresh, atol=1e-5)
    for _ in range(40):
        codebook.quantize(away, rng(8))
    assert not torch.allclose(codebook.codes[3], fresh, atol=1e-2), "still unused: given up at last"


def test_restart_fills_a_collapsed_codebook() -> None:
    codebook = started(num_codes=64, dim=4, decay=0.9)
    with torch.no_grad():
        codebook.codes.copy_(F.normalize(torch.ones(64, 4), dim=1))
        codebook.code_sum.copy_(codebook.codes)
        codebook.cluster_size.fill_(1e-6)
    generator, used = rng(9), 0
    for _ in range(60):
        used = len(codebook.quantize(torch.randn(16, 4, 4, 4, generator=generator), generator)[1].unique())
    assert used > 55


def test_the_same_generator_gives_the_same_codebook() -> None:
    books = []
    for _ in range(2):
        generator, codebook = rng(3), CosineCodebook(64, 4, decay=0.8).train()
        for _ in range(30):
            codebook.quantize(torch.randn(2, 4, 3, 3, generator=generator), generator)
        books.append(codebook.codes)
    assert torch.equal(*books)


def test_more_codes_than_latents_is_no_error() -> None:
    codebook = CosineCodebook(40, 4).train()
    codebook.quantize(torch.randn(1, 4, 3, 3, generator=rng()), rng())
    assert torch.allclose(codebook.codes.norm(dim=1), torch.ones(40), atol=1e-5)


@pytest.mark.parametrize("levels", [(2,), (3, 2), (8, 5, 5), (4, 3, 2, 5)])
def test_fsq_ids_and_points_are_a_bijection(levels: tuple[int, ...]) -> None:
    fsq = FiniteScalar(levels)
    ids = torch.arange(fsq.num_codes).view(1, -1, 1)
    points = fsq.lookup(ids)
    assert len(points.permute(0, 2, 3, 1).reshape(-1, len(levels)).unique(dim=0)) == fsq.num_codes
    assert points.min() == -1 and points.max() == 1
    inverse = torch.atanh(points * (fsq.levels.view(1, -1, 1, 1) - 1) / (fsq.levels.view(1, -1, 1, 1) - 0.02))
    assert torch.equal(fsq.quantize(inverse)[1], ids)
    assert torch.equal(fsq.quantize(inverse)[0], points)


def test_fsq_saturates_inside_its_levels() -> None:
    fsq = FiniteScalar((8, 5))
    ids = fsq.quantize(torch.tensor([-1e4, 1e4]).view(2, 1, 1, 1).expand(2, 2, 1, 1))[1]
    assert ids.flatten().tolist() == [0, 39]


def test_make_quantizer_names_what_it_knows() -> None:
    assert make_quantizer("fsq", 0, 0, (4, 4)).num_codes == 16
    with pytest.raises(ValueError, match="cosine, fsq"):
        make_quantizer("kmeans", 4, 4)
    with pytest.raises(ValueError, match="at least 2"):
        FiniteScalar((4, 1))
