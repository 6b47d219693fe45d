"""Cached decoding: new tokens alone through the model, in the latent (V3 section 2.1.1), with few operations a layer.

At a handful of tokens a step the time goes into starting operations and into reading weights. What depends on the
weights alone is therefore made once for a `Decoder`: the projections that read the same input are one matrix, which
also gives the rotary parts turned by a right angle, so that a rotation is one product and one fused sum; on a CPU the
experts' matrices lie as its products read them fastest. Logits are those of `Transformer.forward` to the rounding of
sums. Legend: as in `transformer.py`; P places of a slot that a step looks at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.model.config import ModelConfig
from gristmill.model.transformer import (
    Block,
    GroupedQueryAttention,
    MixtureOfExperts,
    MultiHeadLatentAttention,
    MultiTokenPrediction,
    SwiGLU,
    Transformer,
    rotary_angles,
)

DENSE_TOKENS = 64  # up to so many tokens, all experts at once are cheaper than sorting rows by expert,
DENSE_SHARE = 4  # where a token takes at least one in so many of them
PADDED_TOKENS = 256  # beyond it an expert's own product is long enough
PROMPT_SCORES = 1 << 25  # numbers of a layer's attention scores while prompts are read; a few such tensors live at once


class SlotCache:
    """What decoding keeps, `cache_width` numbers a token and layer: a slot's token at position p lies at its place p.

    A place beyond a slot's last token may hold what an earlier response or a refused draft left: nobody sees it, since
    a token is written before anyone at or behind its position looks.
    """

    def __init__(self, config: ModelConfig, slots: int, length: int, like: Tensor, layers: int | None = None) -> None:
        layers = config.num_hidden_layers if layers is None else layers
        self.latent_LBSC = like.new_zeros(layers, slots, length, config.cache_width)

    def keep(self, rows: Tensor) -> None:
        """These slots alone, in this order, within the memory that is there."""
        self.latent_LBSC[:, : len(rows)] = self.latent_LBSC[:, rows]
        self.latent_LBSC = self.latent_LBSC[:, : len(rows)]


class Step:
    """What all layers share of one step: where its tokens stand, whom they see, how far their rotary parts turn."""

    def __init__(self, turn_SR: tuple[Tensor, Tensor], start_B: Tensor, length: int, dtype: torch.dtype) -> None:
        place_S = torch.arange(length, device=start_B.device)
        self.position_BS = start_B[:, None] + place_S
        self.slot_B1 = torch.arange(len(start_B), device=start_B.device)[:, None]
        self.reach = int(start_B.max()) + length
        self.seen_BSP = torch.arange(self.reach, device=start_B.device) <= self.position_BS[..., None]
        self.mask_BSP = torch.zeros_like(self.seen_BSP, dtype=dtype).masked_fill_(~self.seen_BSP, -torch.inf)
        self.cos_BSR, self.sin_BSR = (table[self.position_BS] for table in turn_SR)

    def write(self, cache_BSC: Tensor, new_BSC: Tensor) -> Tensor:
        """Put what is new into a layer's cache; the places that this step looks at."""
        cache_BSC[self.slot_B1, self.position_BS] = new_BSC
        return cache_BSC[:, : self.reach]


class _Attention(Protocol):
    def __call__(self, x_BSD: Tensor, step: Step, cache_BSC: Tensor) -> Tensor: ...


class LatentAttention:
    """`MultiHeadLatentAttention` in its absorbed form: scores and values are taken in the latent itself."""

    def __init__(self, module: MultiHeadLatentAttention) -> None:
        c = self.config = module.config
        self.scale, self.query_norm, self.norm, self.out = module.scale, None, module.kv_a_layernorm, module.o_proj
        latent_CD, key_RD = module.kv_a_proj_with_mqa.weight.split([c.kv_lora_rank, c.qk_rope_head_dim])
        query = module.q_proj if c.q_lora_rank is None else module.q_b_proj
        q_HnQ = query.weight.view(c.num_attention_heads, c.head_width, -1)
        plain_HNQ, turning_HRQ = q_HnQ.split([c.qk_nope_head_dim, c.qk_rope_head_dim], 1)
        query_Q = torch.cat((plain_HNQ.flatten(0, 1), *(t.flatten(0, 1) for t in _turned(turning_HRQ))))
        if c.q_lora_rank is None:
            self.query_weight, first_QD = None, query_Q
        else:
            self.query_weight, first_QD, self.query_norm = query_Q, module.q_a_proj.weight, module.q_a_layernorm
        parts = (first_QD, latent_CD, *_turned(key_RD))
        self.sizes, self.weight = [len(part) for part in parts], torch.cat(parts)
        rotary = c.num_attention_heads * c.qk_rope_head_dim
        self.query_sizes = [c.num_attention_heads * c.qk_nope_head_dim, rotary, rotary]
        up = module.kv_b_proj.weight.view(c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)
        self.up_HNC, up_HWC = up.split([c.qk_nope_head_dim, c.v_head_dim], 1)
        self.up_HCW = up_HWC.transpose(1, 2)

    def __call__(self, x_BSD: Tensor, step: Step, cache_BSC: Tensor) -> Tensor:
        c, (batch, length, _) = self.config, x_BSD.shape
        heads, tokens = c.num_attention_heads, batch * length
        first, latent_BSC, key_BSR, turned_BSR = F.linear(x_BSD, self.weight).split(self.sizes, -1)
        key_BSR = (key_BSR * step.cos_BSR).addcmul_(turned_BSR, step.sin_BSR)
        cache_BPC = step.write(cache_BSC, torch.cat((self.norm(latent_BSC), key_BSR.to(x_BSD.dtype)), -1))
        if self.query_norm is not None and self.query_weight is not None:
            first = F.linear(self.query_norm(first), self.query_weight)
        plain, turning, turned = first.split(self.query_sizes, -1)
        turning, turned = (part.reshape(batch, length, heads, -1) for part in (turning, turned))
        q_BSHR = (turning * step.cos_BSR[:, :, None]).addcmul_(turned, step.sin_BSR[:, :, None])
        q_HTC = torch.bmm(plain.reshape(tokens, heads, -1).transpose(0, 1), self.up_HNC)
        q_BSHC = q_HTC.transpose(0, 1).reshape(batch, length, heads, -1)
        query = torch.cat((q_BSHC, q_BSHR.to(x_BSD.dtype)), -1).view(batch, length * heads, -1)
        mask = step.mask_BSP[:, :, None].expand(-1, -1, heads, -1).reshape(batch, length * heads, -1)
        scores = torch.baddbmm(mask, query, cache_BPC.transpose(1, 2), alpha=self.scale)
        weights = scores.softmax(-1, dtype=torch.float32).to(x_BSD.dtype)
        out_BSHC = torch.bmm(weights, cache_BPC[..., : c.kv_lora_rank])
        out_HTW = torch.bmm(out_BSHC.view(tokens, heads, -1).transpose(0, 1), self.up_HCW)
        return self.out(out_HTW.transpose(0, 1).reshape(batch, length, -1))


def _turned(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a projection whose results are rotated in interleaved pairs, halves apart; and those a right angle on."""
    even, odd = rows[..., 0::2, :], rows[..., 1::2, :]
    return torch.cat((even, odd), -2), torch.cat((-odd, even), -2)


class GroupedAttention:
    """`GroupedQueryAttention`, the cache holding each head's keys and then values."""

    def __init__(self, module: GroupedQueryAttention) -> None:
        self.module = module

    def __call__(self, x_BSD: Tensor, step: Step, cache_BSC: Tensor) -> Tensor:
        half = step.cos_BSR.shape[-1] // 2
        rotary = step.cos_BSR[..., :half], step.sin_BSR[..., :half]
        q_BSHR, k_BSGR, v_BSGR = self.module.project(x_BSD, rotary)
        cache_BPC = step.write(cache_BSC, torch.cat((k_BSGR.flatten(2), v_BSGR.flatten(2)), -1))
        k_BPGR, v_BPGR = (part.unflatten(-1, (self.module.groups, -1)) for part in cache_BPC.chunk(2, -1))
        q, k, v = (x.transpose(1, 2) for x in (q_BSHR, k_BPGR, v_BPGR))
        scale, seen = self.module.scale, step.seen_BSP[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
        return self.module.o_proj(out.transpose(1, 2).flatten(2))


class FewTokens:
    """`MixtureOfExperts` at few tokens; at many it is the module itself.

    Where there are few experts for each that a token takes, all of them see every token, with a weight of zero where
    they were not chosen. Otherwise, on a CPU, each expert's rows are filled up to those of the busiest one, so that all
    are one batched product; this holds a second copy of the experts' matrices, transposed.
    """

    def __init__(self, module: MixtureOfExperts) -> None:
        c = self.config = module.config
        self.module, experts = module, module.experts
        self.dense = c.n_routed_experts <= DENSE_SHARE * c.num_experts_per_tok
        self.padded = not self.dense and experts.down_proj.device.type == "cpu"
        if self.dense:
            gate_up: list[Tensor] = [experts.gate_up_proj]
            down: list[Tensor] = [experts.down_proj.transpose(1, 2).flatten(0, 1)]
            if module.shared_experts is not None:  # as so many further experts that every token takes
                halves = module.shared_experts.gate_up_proj.weight.unflatten(0, (2, c.n_shared_experts, -1))
                gate_up.append(halves.transpose(0, 1).flatten(1, 2))
                down.append(module.shared_experts.down_proj.weight.t())
            self.gate_up, self.down = torch.cat(gate_up).flatten(0, 1), torch.cat(down)
        elif self.padded:
            self.gate_up, self.down = (
                w.transpose(1, 2).contiguous() for w in (experts.gate_up_proj, experts.down_proj)
            )

    def __call__(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.flatten(0, 1)
        tokens, experts = len(x_TD), self.config.n_routed_experts
        if self.dense and tokens <= DENSE_TOKENS:
            return self._all(x_TD).view_as(x_BSD)
        if self.padded and tokens <= PADDED_TOKENS and tokens * self.config.num_experts_per_tok >= experts:
            return self._batched(x_TD).view_as(x_BSD)
        return self.module(x_BSD, None)

    def _all(self, x_TD: Tensor) -> Tensor:
        expert_TK, gate_TK, *_ = self.module.gate(x_TD)
        everyone = self.config.n_routed_experts + self.config.n_shared_experts
        weight_TE = x_TD.new_zeros(len(x_TD), everyone)
        weight_TE[:, self.config.n_routed_experts :] = 1.0
        weight_TE.scatter_(1, expert_TK, gate_TK.to(x_TD.dtype))
        gate, up = F.linear(x_TD, self.gate_up).view(len(x_TD), everyone, 2, -1).unbind(2)
        hidden = F.silu(gate).mul_(up).mul_(weight_TE[..., None])
        return hidden.view(len(x_TD), -1) @ self.down

    def _batched(self, x_TD: Tensor) -> Tensor:
        expert_TK, gate_TK, *_ = self.module.gate(x_TD)
        experts, chosen = self.config.n_routed_experts, expert_TK.shape[1]
        expert_M = expert_TK.flatten()
        load_E = torch.bincount(expert_M, minlength=experts)
        rows, order_M = int(load_E.max()), expert_M.argsort(stable=True)
        sorted_M = expert_M[order_M]
        within_M = torch.arange(len(order_M), device=x_TD.device) - (load_E.cumsum(0) - load_E)[sorted_M]
        place_M = torch.empty_like(order_M)
        place_M[order_M] = sorted_M * rows + within_M
        x_ND = x_TD.new_zeros(experts * rows, x_TD.shape[1])
        x_ND[place_M] = x_TD.repeat_interleave(chosen, 0)
        gate, up = torch.bmm(x_ND.view(experts, rows, -1), self.gate_up).chunk(2, -1)
        y_NM = torch.bmm(F.silu(gate).mul_(up), self.down).flatten(0, 1)
        y_TKD = y_NM[place_M].view(len(x_TD), chosen, -1)
        out_TD = torch.bmm(gate_TK[:, None].to(x_TD.dtype), y_TKD)[:, 0]
        return out_TD if self.module.shared_experts is None else out_TD + self.module.shared_experts(x_TD)


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


class Decoder:
    """The model as it is now, made ready to decode; of later changes to its weights it sees only some: make it anew."""

    @torch.no_grad()
    def __init__(self, model: Transformer) -> None:
        self.model, self.config = model.eval(), model.config
        self.layers = [Layer(block) for block in model.layers if isinstance(block, Block)]
        self.module: MultiTokenPrediction | None = None
        for module in model.mtp[:1]:
            assert isinstance(module, MultiTokenPrediction)
            self.module, self.module_layer = module, Layer(module.block)
        position = torch.arange(self.config.max_position_embeddings + 1, device=self.device)
        cos, sin = rotary_angles(self.config, position)
        self.turn_SR = cos.repeat(1, 2), sin.repeat(1, 2)

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    def cache(self, slots: int, length: int, layers: int | None = None) -> SlotCache:
        """An empty cache; one for the MTP module has one layer."""
        return SlotCache(self.config, slots, length, self.model.lm_head.weight, layers)

    @torch.no_grad()
    def advance(self, token_BS: Tensor, start_B: Tensor, cache: SlotCache) -> Tensor:
        """The last block's output before the final norm for tokens that begin at these positions, (B, S, D).

        Slot b keeps token s at place `start_B[b] + s`, which must be below its length.
        """
        x_BSD: Tensor = self.model.embed_tokens(token_BS)
        step = Step(self.turn_SR, start_B, token_BS.shape[1], x_BSD.dtype)
        for layer, cache_BSC in zip(self.layers, cache.latent_LBSC, strict=True):
            x_BSD = layer(x_BSD, step, cache_BSC)
        return x_BSD

    def portions(self, length: int, cache: SlotCache) -> Iterator[slice]:
        """Positions of prompts of this length, in order, so few at a time that `PROMPT_SCORES` holds their scores.

        Prompts that are read at once have a score for each pair of their positions: memory that grows with the square.
        """
        slots, places = cache.latent_LBSC.shape[1:3]
        size = max(1, PROMPT_SCORES // (slots * places * self.config.num_attention_heads))
        for first in range(0, length, size):
            yield slice(first, min(first + size, length))

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Of the next token, from what `advance` gives, (..., V)."""
        return self.model.lm_head(self.model.norm(hidden))

    @torch.no_grad()
    def drafts(self, hidden_BSD: Tensor, next_BS: Tensor, start_B: Tensor, cache: SlotCache) -> Tensor:
        """What the MTP module makes of `advance`'s states and the tokens behind them, after its norm, (B, S, D).

        `lm_head` makes of it the logits of the token after next.

        Raises:
            ValueError: the model has no MTP module.
        """
        if self.module is None:
            raise ValueError("the model has no MTP module to draft with: load it with its module, or use sample")
        x_BSD = self.module.joined(self.model.norm(hidden_BSD), self.model.embed_tokens(next_BS))
        step = Step(self.turn_SR, start_B, next_BS.shape[1], x_BSD.dtype)
        return self.module.norm(self.module_layer(x_BSD, step, cache.latent_LBSC[0]))


def padded_prompts(prompts: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as (B, S), filled up behind their ends, and how many tokens each has, (B,)."""
    longest = max(map(len, prompts))
    rows = [[*prompt, *[pad] * (longest - len(prompt))] for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor([len(p) for p in prompts], device=device)
