"""Cached decoding: new tokens alone through the model, in the latent (V3 section 2.1.1), with few operations a layer.

At a handful of tokens a step the time goes into starting operations and into reading weights: the projections that
read the same input are therefore one matrix, made once for a `Decoder`. Logits are those of `Transformer.forward` to
the rounding of sums. Legend: as in `transformer.py`; P places of a slot that a step looks at.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.decoder_layers import DecoderLayers, LayerWeights, MtpWeights, Shape, joined, runs
from gristmill.kernels.linear import linear
from gristmill.kernels.moe_mlp import experts_are_compiled, moe_mlp
from gristmill.kernels.router import Choice
from gristmill.model.cache import Cache, PagedCache, SlotCache
from gristmill.model.transformer import (
    LATENT_EPS,
    Block,
    GroupedQueryAttention,
    Linear,
    MixtureOfExperts,
    MultiHeadLatentAttention,
    MultiTokenPrediction,
    RMSNorm,
    SwiGLU,
    Transformer,
    rotary_angles,
    score_scale,
)

DENSE_TOKENS = 64  # up to so many tokens, all experts at once are cheaper than sorting rows by expert,
DENSE_SHARE = 4  # where a token takes at least one in so many of them
PROMPT_SCORES = (
    1 << 25
)  # numbers of a layer's scores while prompts are read, where torch holds them; a few such tensors at once


class Step:
    """What all layers share of one step: where its tokens stand, whom they see, how far their rotary parts turn."""

    def __init__(
        self, turn_SR: tuple[Tensor, Tensor], start_B: Tensor, length: int, table_BJ: Tensor | None = None
    ) -> None:
        place_S = torch.arange(length, device=start_B.device)
        self.start_B, self.position_BS = start_B, start_B[:, None] + place_S
        self.slot_B1, self.table_BJ = torch.arange(len(start_B), device=start_B.device)[:, None], table_BJ
        self.reach = int(start_B.max()) + length
        self.cos_BSR, self.sin_BSR = (table[self.position_BS] for table in turn_SR)

    @cached_property
    def seen_BSP(self) -> Tensor:
        """The places that each token may look at."""
        return torch.arange(self.reach, device=self.position_BS.device) <= self.position_BS[..., None]

    def write(self, cache_BSC: Tensor, new_BSC: Tensor) -> Tensor:
        """Put what is new into a layer's cache; the places that this step looks at."""
        if self.table_BJ is None:
            cache_BSC[self.slot_B1, self.position_BS] = new_BSC
            return cache_BSC[:, : self.reach]
        page = cache_BSC.shape[1]
        cache_BSC[self.table_BJ.gather(1, self.position_BS // page), self.position_BS % page] = new_BSC
        return cache_BSC[self.table_BJ[:, : -(-self.reach // page)]].flatten(1, 2)[:, : self.reach]


class _Attention(Protocol):
    def __call__(self, x_BSD: Tensor, step: Step, cache_BSC: Tensor) -> Tensor: ...


class LatentAttention:
    """`MultiHeadLatentAttention` in its absorbed form."""

    def __init__(self, module: MultiHeadLatentAttention) -> None:
        self.module, self.weight = module, module.reading()

    def __call__(self, x_BSD: Tensor, step: Step, cache_BSC: Tensor) -> Tensor:
        rotary, where = (step.cos_BSR, step.sin_BSR), (step.start_B, step.reach, step.table_BJ)
        return self.module.absorbed(x_BSD, self.weight, rotary, cache_BSC, *where)


class GroupedAttention:
    """`GroupedQueryAttention`, the cache holding each head's keys and then values."""

    def __init__(self, module: GroupedQueryAttention) -> None:
        self.module = module

    def __call__(self, x_BSD: Tensor, step: Step, cache_BSC: Tensor) -> Tensor:
        q_BSHR, k_BSGR, v_BSGR = self.module.project(x_BSD, (step.cos_BSR, step.sin_BSR))
        cache_BPC = step.write(cache_BSC, torch.cat((k_BSGR.flatten(2), v_BSGR.flatten(2)), -1))
        k_BPGR, v_BPGR = (part.unflatten(-1, (self.module.groups, -1)) for part in cache_BPC.chunk(2, -1))
        q, k, v = (x.transpose(1, 2) for x in (q_BSHR, k_BPGR, v_BPGR))
        scale, seen = self.module.scale, step.seen_BSP[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
        return self.module.o_proj(out.transpose(1, 2).flatten(2))


class FewTokens:
    """`MixtureOfExperts` at few tokens; at many, and on a CPU that compiles its kernels, it is the module itself.

    Where there are few experts for each that a token takes, all of them see every token, with a weight of zero where
    they were not chosen.
    """

    def __init__(self, module: MixtureOfExperts) -> None:
        c = self.config = module.config
        self.module, experts = module, module.experts
        few = c.n_routed_experts <= DENSE_SHARE * c.num_experts_per_tok
        self.dense = few and not experts_are_compiled(experts.down_proj)
        if self.dense:
            gate_up: list[Tensor] = [experts.gate_up_proj]
            down: list[Tensor] = [experts.down_proj.transpose(1, 2).flatten(0, 1)]
            if module.shared_experts is not None:  # as so many further experts that every token takes
                halves = module.shared_experts.gate_up_proj.weight.unflatten(0, (2, c.n_shared_experts, -1))
                gate_up.append(halves.transpose(0, 1).flatten(1, 2))
                down.append(module.shared_experts.down_proj.weight.t())
            self.gate_up, self.down = torch.cat(gate_up).flatten(0, 1), torch.cat(down)

    def __call__(self, x_BSD: Tensor) -> Tensor:
        if not self.dense or x_BSD.shape[0] * x_BSD.shape[1] > DENSE_TOKENS:
            return self.module(x_BSD, None)
        x_TD = x_BSD.flatten(0, 1)
        expert_TK, gate_TK, *_ = self.module.gate(x_TD)
        everyone = self.config.n_routed_experts + self.config.n_shared_experts
        weight_TE = x_TD.new_zeros(len(x_TD), everyone)
        weight_TE[:, self.config.n_routed_experts :] = 1.0
        weight_TE.scatter_(1, expert_TK, gate_TK.to(x_TD.dtype))
        gate, up = F.linear(x_TD, self.gate_up).view(len(x_TD), everyone, 2, -1).unbind(2)
        hidden = F.silu(gate).mul_(up).mul_(weight_TE[..., None])
        return (hidden.view(len(x_TD), -1) @ self.down).view_as(x_BSD)


class Layer:
    """A `Block` for decoding."""

    def __init__(self, block: Block) -> None:
        self.attention_norm, self.ffn_norm = block.input_layernorm, block.post_attention_layernorm
        attention = block.self_attn
        self.attention: _Attention = (
            LatentAttention(attention)
            if isinstance(attention, MultiHeadLatentAttention)
            else GroupedAttention(attention)
        )
        self.ffn: FewTokens | SwiGLU = FewTokens(block.mlp) if isinstance(block.mlp, MixtureOfExperts) else block.mlp

    def __call__(self, x_BSD: Tensor, step: Step, cache_BSC: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), step, cache_BSC)
        return x_BSD + self.ffn(self.ffn_norm(x_BSD))


def one_call(
    blocks: list[Layer], norm: RMSNorm, model: Transformer, turn_SR: tuple[Tensor, Tensor]
) -> DecoderLayers | None:
    """These layers and the head behind that norm as one operation; none where they are not such as it takes.

    It takes float32 on a CPU, latent attention, and products as they are without a training precision.
    """
    c = model.config
    plain = all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())
    plain = plain and all(m.product is linear for m in model.modules() if isinstance(m, Linear))
    plain = plain and all(mixture.experts.product is moe_mlp for mixture in model.mixtures())
    if not plain or c.attention != "mla":
        return None
    choice = next((mixture.gate.choice for mixture in model.mixtures()), Choice(1))  # the same of all
    shape = Shape(
        width=c.hidden_size, heads=c.num_attention_heads, plain=c.qk_nope_head_dim, turning=c.qk_rope_head_dim,
        value=c.v_head_dim, latent=c.kv_lora_rank, query_rank=c.q_lora_rank or 0, experts=c.n_routed_experts,
        choice=choice, eps=c.rms_norm_eps, latent_eps=LATENT_EPS, scale=score_scale(c),
    )  # fmt: skip
    return DecoderLayers(
        [layer_weights(block) for block in blocks], shape, turn_SR, (norm.weight, model.lm_head.weight)
    )


def layer_weights(layer: Layer) -> LayerWeights:
    """Of a layer with latent attention."""
    attention = layer.attention
    assert isinstance(attention, LatentAttention)
    module, ffn = attention.module, layer.ffn
    dense = isinstance(ffn, SwiGLU)
    gate = None if dense else ffn.module.gate
    shared = None if dense else ffn.module.shared_experts
    latent = module.config.q_lora_rank is not None
    return LayerWeights(
        attention_norm_D=layer.attention_norm.weight,
        first_XD=attention.weight,
        query_norm_Q=module.q_a_layernorm.weight if latent else None,
        query_up_XQ=module.q_b_proj.weight if latent else None,
        latent_norm_C=module.kv_a_layernorm.weight,
        up_HXC=module.kv_b_proj.weight.unflatten(0, (module.config.num_attention_heads, -1)),
        out_DX=module.o_proj.weight,
        ffn_norm_D=layer.ffn_norm.weight,
        gate_up=ffn.gate_up_proj.weight if dense else ffn.module.experts.gate_up_proj,
        down=ffn.down_proj.weight if dense else ffn.module.experts.down_proj,
        gate_ED=gate.weight if gate is not None else None,
        bias_E=gate.e_score_correction_bias if gate is not None else None,
        shared_gate_up=shared.gate_up_proj.weight if shared is not None else None,
        shared_down=shared.down_proj.weight if shared is not None else None,
    )


class Decoder:
    """The model as it is now, made ready to decode; of later changes to its weights it sees only some: make it anew."""

    @torch.no_grad()
    def __init__(self, model: Transformer) -> None:
        self.model, self.config = model.eval(), model.config
        self.embedding = model.embed_tokens.weight.detach()
        self.layers = [Layer(block) for block in model.layers if isinstance(block, Block)]
        position = torch.arange(self.config.max_position_embeddings + 1, device=self.device)
        cos, sin = rotary_angles(self.config, position)
        self.turn_SR = cos, sin
        self.whole = one_call(self.layers, model.norm, model, self.turn_SR)
        self.module: MultiTokenPrediction | None = None
        for module in model.mtp[:1]:
            assert isinstance(module, MultiTokenPrediction)
            self.module, self.module_layer = module, Layer(module.block)
            self.whole_module = one_call([self.module_layer], module.norm, model, self.turn_SR)
            self.joining = MtpWeights(module.hnorm.weight, module.enorm.weight, module.eh_proj.weight)

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    def cache(self, slots: int, length: int, layers: int | None = None) -> SlotCache:
        """An empty cache; one for the MTP module has one layer."""
        return SlotCache(self.config, slots, length, self.model.lm_head.weight, layers)

    def paged_cache(self, rows: int, length: int, places: int) -> PagedCache:
        """An empty cache of so many places over all rows."""
        return PagedCache(self.config, rows, length, places, self.model.lm_head.weight)

    def advance(self, token_BS: Tensor, start_B: Tensor, cache: Cache) -> Tensor:
        """The last block's output before the final norm for tokens that begin at these positions, (B, S, D).

        Slot b keeps token s at place `start_B[b] + s`, which must be below its length.
        """
        return self._advanced(token_BS, start_B, cache, logits=False)[0]

    def step(self, token_BS: Tensor, start_B: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
        """What `advance` gives, and the logits of the tokens that come next, (B, S, V)."""
        hidden_BSD, logits_BSV = self._advanced(token_BS, start_B, cache, logits=True)
        return hidden_BSD, self.logits(hidden_BSD) if logits_BSV is None else logits_BSV

    def _advanced(
        self, token_BS: Tensor, start_B: Tensor, cache: Cache, *, logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The states, and the logits where they are wanted and come along."""
        x_BSD = torch.embedding(self.embedding, token_BS)
        if self.whole is not None and runs(x_BSD, token_BS.numel()):
            return self.whole.through(x_BSD, start_B, cache.latent_LBSC, table_BJ=cache.table_BJ, logits=logits)
        return self._one_by_one(x_BSD, start_B, cache), None

    @torch.no_grad()
    def _one_by_one(self, x_BSD: Tensor, start_B: Tensor, cache: Cache) -> Tensor:
        """All layers, operation by operation."""
        step = Step(self.turn_SR, start_B, x_BSD.shape[1], cache.table_BJ)
        for layer, cache_BSC in zip(self.layers, cache.latent_LBSC, strict=True):
            x_BSD = layer(x_BSD, step, cache_BSC)
        return x_BSD

    def portions(self, length: int, cache: Cache) -> Iterator[slice]:
        """Positions of prompts of this length, in order, so few at a time that `PROMPT_SCORES` holds their scores.

        Prompts that are read at once have a score for each pair of their positions: memory that grows with the square.
        """
        slots, places = cache.shape
        size = max(1, PROMPT_SCORES // (slots * places * self.config.num_attention_heads))
        for first in range(0, length, size):
            yield slice(first, min(first + size, length))

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Of the next token, from what `advance` gives, (..., V)."""
        return self.model.lm_head(self.model.norm(hidden))

    def draft(self, hidden_BSD: Tensor, next_BS: Tensor, start_B: Tensor, asked_B: Tensor, cache: SlotCache) -> Tensor:
        """Logits of the token after next behind one of each row's tokens, (B, V).

        The MTP module reads `advance`'s states and the tokens behind them; its cache keeps all of them.

        Raises:
            ValueError: the model has no MTP module.
        """
        if self.module is None:
            raise ValueError("the model has no MTP module to draft with: load it with its module, or use sample")
        next_BSD = torch.embedding(self.embedding, next_BS)
        if self.whole_module is not None and runs(next_BSD, next_BS.numel()):
            x_BSD = joined(hidden_BSD, next_BSD, self.model.norm.weight, self.joining, self.config.rms_norm_eps)
            _, logits_BSV = self.whole_module.through(x_BSD, start_B, cache.latent_LBSC, asked_B)
            assert logits_BSV is not None
            return logits_BSV[:, 0]
        return self._drafted_one_by_one(self.module, hidden_BSD, next_BSD, start_B, asked_B, cache)

    @torch.no_grad()
    def _drafted_one_by_one(
        self, module: MultiTokenPrediction, hidden_BSD: Tensor, next_BSD: Tensor, start_B: Tensor, asked_B: Tensor,
        cache: SlotCache,
    ) -> Tensor:  # fmt: skip
        """What `draft` gives, operation by operation."""
        x_BSD = module.joined(self.model.norm(hidden_BSD), next_BSD)
        x_BSD = self.module_layer(x_BSD, Step(self.turn_SR, start_B, x_BSD.shape[1]), cache.latent_LBSC[0])
        row_B = torch.arange(len(asked_B), device=asked_B.device)
        return self.model.lm_head(module.norm(x_BSD[row_B, asked_B]))


def padded_prompts(prompts: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as (B, S), filled up behind their ends, and how many tokens each has, (B,)."""
    longest = max(map(len, prompts))
    rows = [[*prompt, *[pad] * (longest - len(prompt))] for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor([len(p) for p in prompts], device=device)
