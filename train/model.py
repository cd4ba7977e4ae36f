"""The any-to-any transformer: an encoder over visible tokens, a decoder over those to be predicted (4M, section 2).

Legend: B samples, I input slots, T target slots (of all samples, end to end), D width, H heads, V vocabulary, M modalities.

Ids are gathered first and embedded afterwards: the token tables of all modalities are one table with an offset
per modality, so that embedding a batch costs a look-up per slot however many modalities there are. There are no empty
slots; only attention, `scaled_dot_product_attention`, puts samples of unequal length into rows with room left over.
Logits are computed only where a modality has labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fourmill.train.batches import Batch
from fourmill.train.positions import sincos_1d, sincos_2d
from fourmill.train.presets import PATCH_SIZE, ModelConfig

_PIXEL_MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as in 4M
_PIXEL_STD = (0.229, 0.224, 0.225)
_MIN_SEQUENCE_POSITIONS = 512
_INIT_STD = 0.02


class Norm(nn.LayerNorm):
    """LayerNorm without bias, eps 1e-6."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6, bias=False)


class Stacked(nn.Linear):
    """Several matrices of one input as one, without bias; initialised as if they were separate."""

    def __init__(self, dim: int, width: int, parts: int) -> None:
        super().__init__(dim, parts * width, bias=False)
        self.parts = parts


@dataclass(frozen=True, slots=True)
class Rows:
    """How slots that lie end to end stand in rows, one per sample."""

    count: int
    width: int
    places: Tensor | None  # int64 (L,): in the flattened rows; None where every row is full

    @classmethod
    def of(cls, count: int, width: int, places: Tensor, slots: Tensor) -> Rows:
        return cls(count, width, None if len(slots) == count * width else places)

    def spread(self, x: Tensor) -> Tensor:
        """(L, ...) -> (count, width, ...), zero where there is no slot."""
        if self.places is not None:
            x = x.new_zeros(self.count * self.width, *x.shape[1:]).index_copy(0, self.places, x)
        return x.unflatten(0, (self.count, self.width))

    def gather(self, x: Tensor) -> Tensor:
        """(count, width, ...) -> (L, ...)"""
        x = x.flatten(0, 1)
        return x if self.places is None else x.index_select(0, self.places)

    def key_mask(self) -> Tensor | None:
        """bool (count, 1, 1, width): the slots that there are, all of them in a row without any; None: all."""
        if self.places is None:
            return None
        full = self.spread(torch.ones_like(self.places, dtype=torch.bool))
        return (full | ~full.any(dim=1, keepdim=True))[:, None, None, :]


class Attention(nn.Module):
    """Multi-head attention, of a sequence to itself or to a context. No biases."""

    def __init__(self, dim: int, head_dim: int, *, cross: bool = False) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.query = nn.Linear(dim, dim, bias=False) if cross else None
        self.projections = Stacked(dim, dim, 2 if cross else 3)  # (q,) k, v
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        rows: Rows,
        mask: Tensor | None,
        context: Tensor | None = None,
        context_rows: Rows | None = None,
    ) -> Tensor:
        """``x`` (T, D) in ``rows``, ``context`` (S, D) in rows of its own; ``mask`` bool broadcast to (B, 1, width of
        rows, width of context), True where a slot may look."""
        source, source_rows = (x, rows) if context is None else (context, context_rows or rows)
        stacked = source_rows.spread(self.projections(source))
        heads = [self._split(part) for part in stacked.chunk(self.projections.parts, dim=-1)]
        query = self._split(rows.spread(self.query(x))) if self.query is not None else heads.pop(0)
        key, value = heads
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(rows.gather(mixed.transpose(1, 2).flatten(2)))

    def look_in_place(self) -> None:
        """Make queries and keys copies of their inputs: places with equal positions then match at once."""
        assert self.query is not None
        identity = torch.eye(self.query.in_features)
        self.query.weight.copy_(identity)
        self.projections.weight[: len(identity)].copy_(identity)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, L, head_dim)


class SwiGLU(nn.Module):
    """fc2(silu(fc1 x) * fc3 x), with fc1 and fc3 as one matrix."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = Stacked(dim, hidden, 2)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Context(NamedTuple):
    """What the decoder sees of the inputs: states (I, D), their rows, and which of the rows' places hold one."""

    states: Tensor
    rows: Rows
    mask: Tensor | None


class EncoderBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = Norm(config.dim)
        self.attention = Attention(config.dim, config.head_dim)
        self.mlp_norm = Norm(config.dim)
        self.mlp = SwiGLU(config.dim, config.mlp_hidden)

    def forward(self, x: Tensor, rows: Rows, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rows, mask)
        return x + self.mlp(self.mlp_norm(x))


class DecoderBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = Norm(config.dim)
        self.attention = Attention(config.dim, config.head_dim)
        self.query_norm = Norm(config.dim)
        self.context_norm = Norm(config.dim)
        self.cross_attention = Attention(config.dim, config.head_dim, cross=True)
        self.mlp_norm = Norm(config.dim)
        self.mlp = SwiGLU(config.dim, config.mlp_hidden)

    def forward(self, x: Tensor, rows: Rows, mask: Tensor | None, context: Context) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rows, mask)
        seen = self.context_norm(context.states)
        x = x + self.cross_attention(self.query_norm(x), rows, context.mask, seen, context.rows)
        return x + self.mlp(self.mlp_norm(x))


class FourMill(nn.Module):
    """Predicts any modality from any others. Weights are a function of (config, seed); None: they will be loaded."""

    input_offset: Tensor  # int64 (M,): where a modality's rows begin in a table
    target_offset: Tensor
    position_offset: Tensor
    fixed_positions: Tensor  # float32 (rows, D)
    is_causal: Tensor  # bool (M,)

    def __init__(self, config: ModelConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False  # recompute blocks in the backward pass
        specs, dim = config.modalities, config.dim
        self._offsets("input_offset", [s.vocab_size if s.is_input else 0 for s in specs])
        self._offsets("target_offset", [s.vocab_size if s.is_target else 0 for s in specs])
        self._position_tables()
        self.register_buffer("is_causal", torch.tensor([s.is_sequence for s in specs]), persistent=False)
        self.encoder_tokens = nn.Embedding(max(1, sum(s.vocab_size for s in specs if s.is_input)), dim)
        self.decoder_tokens = nn.Embedding(max(1, sum(s.vocab_size for s in specs if s.is_target)), dim)
        self.modality_embedding = nn.Parameter(torch.empty(len(specs), dim))
        self.mask_token = nn.Parameter(torch.empty(dim))
        self.patch_projection = (
            nn.Linear(3 * PATCH_SIZE**2, dim, bias=False) if any(s.kind == "pixels" for s in specs) else None
        )
        self.encoder = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_depth))
        self.encoder_norm = Norm(dim)
        self.context_projection = nn.Linear(dim, dim)
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_depth))
        self.decoder_norm = Norm(dim)
        if seed is not None:
            self._initialise(seed)

    # -- construction ---------------------------------------------------------------------------------

    def _offsets(self, name: str, sizes: list[int]) -> None:
        starts = [
            sum(sizes[:m]) if size else 0 for m, size in enumerate(sizes)
        ]  # 0: has no rows, any will do
        self.register_buffer(name, torch.tensor(starts), persistent=False)

    def _position_tables(self) -> None:
        """One table: fixed sine-cosine rows of grids and sequences, then the learned ones of vectors."""
        tables: dict[object, Tensor] = {}
        rows: list[int] = []
        learned = 0
        specs, dim = self.config.modalities, self.config.dim
        longest = max([2 * (s.num_tokens + 1) for s in specs if s.is_sequence], default=0)
        for spec in specs:
            if spec.is_sequence and "sequence" not in tables:
                tables["sequence"] = sincos_1d(max(_MIN_SEQUENCE_POSITIONS, longest), dim)
            elif spec.kind in ("grid", "pixels") and spec.side not in tables:
                tables[spec.side] = sincos_2d(spec.side, spec.side, dim)
        starts, total = {}, 0
        for key, table in tables.items():
            starts[key], total = total, total + len(table)
        for spec in specs:
            if spec.kind == "vector":
                rows.append(total + learned)
                learned += spec.num_tokens
            else:
                rows.append(starts["sequence" if spec.is_sequence else spec.side])
        fixed = torch.cat(list(tables.values())) if tables else torch.zeros(0, dim)
        self.register_buffer("fixed_positions", fixed, persistent=False)
        self.register_buffer("position_offset", torch.tensor(rows), persistent=False)
        # Learned positions are not shared between encoder and decoder, as in 4M.
        self.encoder_positions = nn.Parameter(torch.empty(learned, dim)) if learned else None
        self.decoder_positions = nn.Parameter(torch.empty(learned, dim)) if learned else None

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Xavier-uniform for each matrix by itself (q, k, v and gate, up count as separate); embeddings N(0, 0.02).

        The decoder's token tables are also the heads, and get a head's initialisation, by modality.
        """
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                parts = module.parts if isinstance(module, Stacked) else 1
                _xavier(module.weight, module.in_features, module.out_features // parts, generator)
                if module.bias is not None:
                    module.bias.zero_()
        self.encoder_tokens.weight.normal_(0.0, self.config.token_std, generator=generator)
        self.modality_embedding.normal_(0.0, self.config.modality_std, generator=generator)
        for parameter in (self.mask_token, self.encoder_positions, self.decoder_positions):
            if parameter is not None:
                parameter.normal_(0.0, _INIT_STD, generator=generator)
        if self.config.look_in_place:
            for block in self.decoder:
                assert isinstance(block, DecoderBlock)
                block.cross_attention.look_in_place()
        for m, spec in enumerate(self.config.modalities):
            if spec.is_target:
                _xavier(self.heads()[m], self.config.dim, spec.vocab_size, generator)

    @torch.no_grad()
    def start_from_codebooks(self, codebooks: Mapping[str, Tensor], seed: int) -> None:
        """Let tokens of grids begin as random projections of their tokenizer's codes (V, d), with the usual spread.

        What is learned of a token then holds for similar ones too, which counts where data or steps are few.
        """
        generator = torch.Generator().manual_seed(seed)
        for m, spec in enumerate(self.config.modalities):
            if spec.name not in codebooks:
                continue
            codes = codebooks[spec.name] - codebooks[spec.name].mean(dim=0)
            codes = codes / codes.std().clamp_min(1e-6)
            start = int(self.input_offset[m])
            tables = [self.encoder_tokens.weight[start : start + spec.vocab_size]] if spec.is_input else []
            tables += [self.heads()[m]] if spec.is_target else []
            for table in tables:
                spread = table.std() / codes.shape[1] ** 0.5
                projection = torch.randn(codes.shape[1], self.config.dim, generator=generator)
                table.copy_(codes @ projection * spread)

    # -- parts ----------------------------------------------------------------------------------------

    def heads(self) -> tuple[Tensor, ...]:
        """For each modality (V, D), its rows of the decoder's token table: logits are x @ head.T.

        One split, because the gradient of each slice by itself would be as large as the whole table.
        """
        sizes = [spec.vocab_size if spec.is_target else 0 for spec in self.config.modalities]
        return self.decoder_tokens.weight.split([*sizes, len(self.decoder_tokens.weight) - sum(sizes)])

    def _embedding(self, modality: Tensor, positions: Tensor, learned: Tensor | None) -> Tensor:
        """Position plus modality (L, D)."""
        table = self.fixed_positions if learned is None else torch.cat([self.fixed_positions, learned])
        return F.embedding(self.position_offset[modality] + positions, table) + F.embedding(
            modality, self.modality_embedding
        )

    def encode(self, batch: Batch) -> Context:
        """What the decoder may look at."""
        modality = batch.input_modality.long()
        tokens = self.encoder_tokens(self.input_offset[modality] + batch.input_ids.long())
        if self.patch_projection is not None:
            tokens = self._add_patches(tokens, batch)
        embedding = self._embedding(modality, batch.input_positions.long(), self.encoder_positions)
        rows = Rows.of(len(batch), batch.input_width, batch.input_places, modality)
        mask = rows.key_mask()
        x = tokens + embedding
        for block in self.encoder:
            x = self._run(block, x, rows, mask)
        return Context(self.context_projection(self.encoder_norm(x)) + embedding, rows, mask)

    def _add_patches(self, tokens: Tensor, batch: Batch) -> Tensor:
        assert self.patch_projection is not None
        scale = torch.tensor(_PIXEL_STD, device=tokens.device).repeat(PATCH_SIZE**2)
        shift = torch.tensor(_PIXEL_MEAN, device=tokens.device).repeat(PATCH_SIZE**2)
        patches = self.patch_projection((batch.patches / 255.0 - shift) / scale)
        return tokens.index_copy(0, batch.patch_slots, patches.to(tokens.dtype))

    def decode(self, batch: Batch, context: Context) -> Tensor:
        """(T, D): the normalised state of every target slot."""
        modality = batch.target_modality.long()
        tokens = self.decoder_tokens(self.target_offset[modality] + batch.previous.long())
        reads = self.is_causal[modality].unsqueeze(-1)  # the token before; others read the mask token
        tokens = torch.where(reads, tokens, self.mask_token.to(tokens.dtype))
        x = tokens + self._embedding(modality, batch.target_positions.long(), self.decoder_positions)
        rows = Rows.of(len(batch), batch.target_width, batch.target_places, modality)
        mask = decoder_mask(rows.spread(modality + 1) - 1, self.is_causal)
        for block in self.decoder:
            x = self._run(block, x, rows, mask, context)
        return self.decoder_norm(x)

    def _run(self, block: nn.Module, *args: Any) -> Tensor:
        if self.checkpoint_blocks and self.training:
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def logits(self, batch: Batch, states: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For each modality with labels: its index, logits (n, V) and labels int64 (n,), in the batch's label order."""
        chosen = states.index_select(0, batch.label_order).split(batch.counts)
        labels = batch.labels.long().index_select(0, batch.label_order).split(batch.counts)
        heads = self.heads()
        for m, count in enumerate(batch.counts):
            if count:
                yield m, F.linear(chosen[m], heads[m]), labels[m]

    def forward(self, batch: Batch) -> Tensor:
        """float32 (M,): the sum of the cross-entropies of each modality's labels, in nats."""
        states = self.decode(batch, self.encode(batch))
        nothing = (
            states[..., :0].float().sum()
        )  # zero, but part of the graph: every parameter gets a gradient
        sums = [nothing] * len(self.config.modalities)
        for m, logits, labels in self.logits(batch, states):
            sums[m] = F.cross_entropy(logits.float(), labels, reduction="sum")
        return torch.stack(sums)


def decoder_mask(modality: Tensor, is_causal: Tensor) -> Tensor:
    """bool (B, 1, W, W), True where place i may look at place j (section 3.6 of the 4M notes).

    ``modality`` int64 (B, W), -1 where there is no slot. Within a modality only; grids and vectors see all of it,
    sequences what comes before. Every place sees itself, so that empty ones have something to attend to.
    """
    same = (modality[:, :, None] == modality[:, None, :]) & (modality[:, None, :] >= 0)
    slots = torch.arange(modality.shape[1], device=modality.device)
    earlier = slots[:, None] >= slots[None, :]
    causal = is_causal[modality.clamp(min=0)][:, :, None]
    allowed = same & (earlier | ~causal) | torch.eye(len(slots), dtype=torch.bool, device=modality.device)
    return allowed[:, None]


def _xavier(weight: Tensor, fan_in: int, fan_out: int, generator: torch.Generator) -> None:
    bound = math.sqrt(6.0 / (fan_in + fan_out))
    weight.uniform_(-bound, bound, generator=generator)
