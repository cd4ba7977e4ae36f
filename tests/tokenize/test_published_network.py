"""The published architectures against inputs and outputs of the public 4M code (data/README.md)."""

import json
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from tokenize_released import DATA, MARGIN, VQ, arrays_of, config_of, folder_of, network_of, weights_bytes

from fourmill.errors import ConfigError
from fourmill.tokenize.published_network import PublishedNetwork, ReleasedConfig, build, metadata_config
from fourmill.tokenize.published_quantizers import EmaCodebook, Memcodes
from fourmill.tokenize.published_vit import resized_positions
from fourmill.tokenize.vqvae import sincos_positions

RUNS = [("clip_like", "r8"), ("clip_like", "r12"), ("depth", "r64"), ("depth", "r96"), ("depth", "r32x64")]
RUNS += [("global_memcodes", "v"), ("rgb", "r64"), ("sam_mask", "r64"), ("semseg", "r64")]


@pytest.mark.parametrize(("name", "tag"), RUNS)
@torch.inference_mode()
def test_every_stage_equals_the_reference(name: str, tag: str) -> None:
    network, expected = network_of(name), arrays_of(folder_of(name) / "io.npz", f"{tag}|")
    x, ids = expected["input"], expected["tokens"].long()
    close: Any = {"atol": 3e-5, "rtol": 0.0}
    torch.testing.assert_close(network.encoded(x), expected["encoder_out"], **close)
    torch.testing.assert_close(network.latents(x), expected["latents"], **close)
    assert torch.equal(network.quantize.lookup(ids), network.quantize.quantize(network.latents(x))[0])
    torch.testing.assert_close(network.quantize.lookup(ids), expected["quantized"], **close)
    decoded = network.decode(expected["quantized"])[: len(expected["decoded"])]
    torch.testing.assert_close(decoded, expected["decoded"], **close)
    clear = expected["token_margin"] >= MARGIN
    assert torch.equal(network.tokens(x)[clear], ids[clear]) and clear.float().mean() > 0.99


@pytest.mark.parametrize("name", VQ)
def test_a_tokenizer_loads_by_name_and_nothing_is_left_over(name: str) -> None:
    weights = safetensors.torch.load(weights_bytes(name))
    network = build(config_of(name), weights)
    assert network.state_dict().keys() == weights.keys() and not network.training
    assert not any(p.is_meta or p.requires_grad for p in network.parameters())


def test_the_published_sizes_are_those_of_the_paper() -> None:
    values = {**config_of("depth"), "enc_type": "vit_b_enc", "dec_type": "unet_patched", "patch_size": 16}
    mlp = {**config_of("global_memcodes"), "enc_type": "BottleneckMLP/B_6-Wi_1024"}
    with torch.device("meta"):
        shapes = {
            k: v.shape for k, v in PublishedNetwork(ReleasedConfig.from_mapping(values)).state_dict().items()
        }
        wide = {
            k: v.shape for k, v in PublishedNetwork(ReleasedConfig.from_mapping(mlp)).state_dict().items()
        }
    assert (
        shapes["encoder.blocks.11.mlp.fc1.weight"] == (3072, 768)
        and "encoder.blocks.12.norm1.bias" not in shapes
    )
    assert shapes["decoder.out.2.weight"] == (16, 256, 3, 3) and shapes["decoder.time_embed.0.weight"] == (
        1024,
        256,
    )
    assert (
        wide["encoder.blocks.5.block.0.weight"] == (4096, 1024)
        and "encoder.blocks.6.block.0.weight" not in wide
    )


def test_position_tables() -> None:
    tables = arrays_of(DATA / "position_tables.npz")
    for name, table in tables.items():
        what, grid, dim = name.split("|")
        if what == "vq_2d" and len(set(grid.split("x"))) == 1:  # the reference's other tables are scrambled
            height, width = map(int, grid.split("x"))
            ours = sincos_positions(height, width, int(dim)).T.unflatten(1, (height, width))
            torch.testing.assert_close(ours, table, atol=1e-6, rtol=0)
        elif what == "vq_2d_bicubic":
            before, after = ([int(n) for n in side.split("x")] for side in grid.split("->"))
            ours = sincos_positions(before[0], before[1], int(dim)).T.unflatten(1, tuple(before))[None]
            torch.testing.assert_close(
                resized_positions(ours, after[0], after[1])[0], table, atol=1e-6, rtol=0
            )


def test_a_stored_position_table_is_the_formula_s() -> None:
    stored = safetensors.torch.load(weights_bytes("depth"))["encoder.pos_emb"]
    ours = sincos_positions(8, 8, 64).T.unflatten(1, (8, 8))[None]
    torch.testing.assert_close(stored, ours, atol=5e-3, rtol=0)  # its weights are rounded to bfloat16


def test_a_table_trained_at_another_resolution_is_taken_as_it_is() -> None:
    """Releases adapted to 448 px may keep the config of 224 px."""
    weights = safetensors.torch.load(weights_bytes("depth"))
    network = build({**config_of("depth"), "image_size": 128}, weights)
    x = torch.randn(1, 1, 64, 64)
    assert torch.equal(network.latents(x), network_of("depth").latents(x))


@pytest.mark.parametrize("tag", ["no_replace", "norm_latents", "batch_random", "decay0.9_w0.25"])
@pytest.mark.parametrize("step", [1, 2])
def test_one_codebook_update(tag: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    every = arrays_of(DATA / "vq" / "codebook_ema.npz", f"{tag}|")
    before, after = ({k: every[f"{at}|{k}"] for k in ("embed", "cluster_size")} for at in (step - 1, step))
    options: dict[str, Any] = {
        "decay0.9_w0.25": {"decay": 0.9, "commitment": 0.25},
        "batch_random": {"dead_below": 1.0},
    }
    codebook = EmaCodebook(128, 16, norm_latents=tag == "norm_latents", **options.get(tag, {})).train()
    codebook._codebook.embed.copy_(before["embed"])
    codebook._codebook.cluster_size.copy_(before["cluster_size"])
    fresh = every.get(f"{step}|replacement_vectors")
    if fresh is not None:  # which vectors are drawn is the generator's business
        monkeypatch.setattr(codebook, "_fresh", lambda unit, count, generator: fresh[:count])
    latents = every[f"{step}|latents"].requires_grad_()
    quantized, ids, loss = codebook.quantize(latents)
    (loss + (quantized * torch.linspace(-1, 1, quantized.numel()).view_as(quantized)).sum()).backward()
    close: Any = {"atol": 1e-6, "rtol": 1e-6}
    assert torch.equal(ids, every[f"{step}|tokens"].long())
    torch.testing.assert_close(quantized.detach(), every[f"{step}|quantized"], **close)
    torch.testing.assert_close(loss.detach(), every[f"{step}|loss"][0], **close)
    torch.testing.assert_close(latents.grad, every[f"{step}|grad_latents"], **close)
    torch.testing.assert_close(codebook._codebook.embed, after["embed"], **close)
    dead = after["cluster_size"] < (1.0 if fresh is not None else 0.0)
    assert int(dead.sum()) == (0 if fresh is None else len(fresh))
    torch.testing.assert_close(codebook._codebook.cluster_size[~dead], after["cluster_size"][~dead], **close)
    assert (codebook._codebook.cluster_size[dead] >= 1).all()  # ours live on; the reference's die again


def test_a_replaced_code_is_not_replaced_again_at_once() -> None:
    codebook = EmaCodebook(8, 4, dead_below=0.5).train()
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 3, 3, generator=draw)
    codebook.quantize(latents, draw)
    first = codebook._codebook.embed.clone()
    assert torch.allclose(first.norm(dim=1), torch.ones(8), atol=1e-5)
    codebook.quantize(latents, draw)
    assert F.cosine_similarity(first, codebook._codebook.embed).min() > 0.99


def test_memcodes_work_on_maps() -> None:
    """The reference's own lookup fails on maps larger than one place."""
    memcodes = Memcodes(8, 12, 3)
    for parameter in memcodes.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    latents = torch.randn(2, 12, 3, 2)
    quantized, ids, _ = memcodes.quantize(latents)
    assert ids.shape == (2, 3, 3, 2) and quantized.shape == latents.shape
    alone, its_ids, _ = memcodes.quantize(latents[1:, :, 2:, 1:])
    assert torch.equal(its_ids[0, :, 0, 0], ids[1, :, 2, 1])
    assert torch.allclose(alone[0, :, 0, 0], quantized[1, :, 2, 1])


def test_the_metadata_of_a_stand_alone_file_is_its_config() -> None:
    metadata = json.loads((folder_of("global_memcodes") / "standalone_metadata.json").read_text())
    parsed = metadata_config({**metadata, "n_labels": "None"})
    told = config_of("global_memcodes")
    assert parsed.pop("n_labels") is None and parsed == {k: told[k] for k in parsed}
    assert {k: told[k] for k in ("num_codebooks", "patch_proj", "enc_type")}.items() <= parsed.items()


def test_a_decoder_of_an_unknown_kind_leaves_the_encoder() -> None:
    network = build(
        {**config_of("rgb"), "dec_type": "uvit_b_p4_f16"}, safetensors.torch.load(weights_bytes("rgb"))
    )
    expected = arrays_of(folder_of("rgb") / "io.npz", "r64|")
    assert torch.equal(network.tokens(expected["input"]), expected["tokens"].long())
    with pytest.raises(ConfigError, match="no decoder of the type 'uvit_b_p4_f16'"):
        network.decode(expected["quantized"])


def test_a_config_says_only_what_is_not_the_published_default() -> None:
    config = ReleasedConfig.from_mapping(
        {"dec_type": "unet_patched", "codebook_size": "8_192", "ckpt_path": None}
    )
    assert (config.enc_type, config.codebook_size, config.quant_type) == ("vit_b_enc", 8192, "lucid")
    with pytest.raises(ConfigError, match="dec_type is missing"):
        ReleasedConfig.from_mapping({"enc_type": "vit_b_enc"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_size": 64}, "embed has the shape \\(128, 16\\), config.json asks for \\(64, 16\\)"),
        ({"post_mlp": False}, "also hold decoder.norm_mlp.bias and 11 others"),
        ({"out_conv": True}, "lack decoder.out_conv"),
        ({"enc_type": "resnet"}, "enc_type 'resnet'; known are vit_xs_enc"),
        ({"quant_type": "fsq"}, "quant_type 'fsq'"),
        ({"latent_dim": None}, "latent_dim is None; expected is int"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"patch_proj": 1}, "patch_proj is 1; expected is bool"),
    ],
)
def test_what_does_not_fit_is_said(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build({**config_of("depth"), **changes}, safetensors.torch.load(weights_bytes("depth")))
