"""Noise schedules, DDIM and the published diffusion decoder against the public 4M code (data/README.md)."""

from typing import Any

import pytest
import torch
from tokenize_released import DATA, arrays_of, folder_of, network_of

from fourmill.errors import ConfigError
from fourmill.tokenize.diffusion import Schedule, ddim_step, trailing_steps
from fourmill.tokenize.unet import PatchedUNet, UNetSize, timestep_embedding

CLOSE: Any = {"atol": 1e-5, "rtol": 0.0}
TABLES = arrays_of(DATA / "divae" / "schedules.npz")


@pytest.mark.parametrize("name", sorted(k for k in TABLES if k.endswith("|alphas_cumprod")))
def test_noise_schedules(name: str) -> None:
    kind = name.removesuffix("|alphas_cumprod")
    named = {"squaredcos": "squaredcos_cap_v2"}.get(kind.removesuffix("_zsnr"), kind.removesuffix("_zsnr"))
    schedule = Schedule.named(named, zero_terminal_snr=kind.endswith("_zsnr"))
    assert schedule.alphas.dtype == torch.float64
    torch.testing.assert_close(schedule.alphas.float(), TABLES[name], atol=2e-6, rtol=0)
    betas = TABLES.get(f"{kind}|betas")
    if betas is not None:
        torch.testing.assert_close(schedule.betas().float(), betas, atol=2e-4, rtol=0)
    if kind.endswith("_zsnr"):
        assert float(schedule.alphas[-1]) == 0


@pytest.mark.parametrize("name", sorted(k for k in TABLES if k.endswith("|prev")))
def test_single_steps(name: str) -> None:
    _, prediction, *settings, _ = name.split("|")
    options = dict(setting.split("=") for setting in settings)
    step = int(options["t"])
    schedule = Schedule.named("linear", zero_terminal_snr=options["zsnr"] == "True")
    made = ddim_step(
        schedule,
        TABLES["step|model_output"],
        TABLES["step|sample"],
        step,
        step - 100,
        prediction,  # type: ignore[arg-type]
        clip="True" in (options["clip"], options["thresholding"]),
        noise=TABLES["step|variance_noise"] if options["eta"] == "1.0" else None,
    )
    torch.testing.assert_close(made, TABLES[name], atol=1e-5, rtol=1e-4)


def test_a_stochastic_step_where_there_is_no_signal_is_finite() -> None:
    """The reference gives NaN there."""
    schedule = Schedule.named("linear", zero_terminal_snr=True)
    x = torch.randn(1, 1, 2, 2)
    assert ddim_step(schedule, torch.zeros_like(x), x, 999, 899, noise=torch.randn_like(x)).isfinite().all()
    with pytest.raises(ConfigError, match="no signal"):
        ddim_step(schedule, x, x, 999, 899, prediction="epsilon")


@pytest.mark.parametrize(
    ("count", "steps"), [(5, [999, 799, 599, 399, 199]), (1, [999]), (1000, list(range(999, -1, -1)))]
)
def test_trailing_steps_are_those_of_the_reference(count: int, steps: list[int]) -> None:
    assert trailing_steps(count) == steps


def test_there_are_as_many_steps_as_asked() -> None:
    for count in (3, 7, 30, 999):  # of 7 the reference makes 8, of 30 it makes 31
        steps = trailing_steps(count)
        assert (
            len(steps) == count and steps[0] == 999 and steps[-1] >= 0 and steps == sorted(set(steps))[::-1]
        )
    with pytest.raises(ConfigError, match="1 to 1000"):
        trailing_steps(0)


@pytest.fixture(scope="module")
def io() -> dict[str, torch.Tensor]:
    return arrays_of(folder_of("divae") / "io.npz")


@torch.inference_mode()
def test_the_encoder_and_one_prediction(io: dict[str, torch.Tensor]) -> None:
    network = network_of("divae")
    assert network.decoder is not None
    torch.testing.assert_close(network.latents(io["image"]), io["latents"], atol=3e-5, rtol=0)
    assert torch.equal(network.tokens(io["image"]), io["tokens"].long())
    assert torch.equal(network.quantize.lookup(io["tokens"].long()), io["quantized"])
    noisy = Schedule.named("linear", zero_terminal_snr=True).add_noise(io["image"], io["noise"], io["t"])
    torch.testing.assert_close(noisy, io["x_t"], atol=2e-6, rtol=0)
    torch.testing.assert_close(network.decoder(io["x_t"], io["t"], io["quantized"]), io["pred"], **CLOSE)
    last = network.decoder(io["noise"], torch.tensor([999, 999]), io["quantized"])
    torch.testing.assert_close(last, io["pred_from_noise_t999"], **CLOSE)


@torch.inference_mode()
def test_the_decoder_at_another_size(io: dict[str, torch.Tensor]) -> None:
    decoder = network_of("divae").decoder
    assert decoder is not None
    made = decoder(io["x96"], torch.tensor([250]), io["quantized"][:1])
    torch.testing.assert_close(made, io["pred96_t250"], **CLOSE)


@torch.inference_mode()
def test_trajectories(io: dict[str, torch.Tensor]) -> None:
    network, noise, quantized = network_of("divae"), io["noise"][:1], io["quantized"][:1]
    assert trailing_steps(5) == io["ddim5|timesteps"].tolist()
    made = network.denoised(noise, quantized, 5)
    for index, x in enumerate(made):
        torch.testing.assert_close(x, io[f"ddim5|{index}|x_prev"], **CLOSE)
    assert trailing_steps(8) == io["ddim8|timesteps"].tolist()
    torch.testing.assert_close(network.denoised(noise, quantized, 8)[-1], io["ddim8|final"], **CLOSE)
    unclipped = network.denoised(noise, quantized, 5, clip=False)[-1]
    assert (unclipped.abs() > 1).any() and (made[-1].abs() <= 1).all()


def test_timestep_embedding(io: dict[str, torch.Tensor]) -> None:
    made = timestep_embedding(torch.tensor([0, 37, 812, 999]), 32)
    torch.testing.assert_close(made, io["timestep_embedding_32_of_0_37_812_999"], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_a_map_depends_on_its_tokens_alone(io: dict[str, torch.Tensor]) -> None:
    network, quantized = network_of("divae"), io["quantized"]
    both = network.decode(quantized, steps=2)
    torch.testing.assert_close(network.decode(quantized[1:], steps=2), both[1:], **CLOSE)
    assert both.shape == (2, 3, 64, 64) and not torch.allclose(both[0], both[1], atol=1e-3)


@torch.inference_mode()
def test_a_grid_that_cannot_be_halved_three_times() -> None:
    """At 56 patches of 4 px (224 px) it can; at 10 the reference's skip connections do not fit each other."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = PatchedUNet(UNetSize(32, res_blocks=1), 1, 8)
    out = unet(torch.randn(1, 1, 40, 40), torch.tensor([3]), torch.randn(1, 8, 5, 5))
    assert out.shape == (1, 1, 40, 40) and out.isfinite().all()
