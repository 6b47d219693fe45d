"""DeepSeek-V3 on one device, read from top to bottom (arXiv 2412.19437, section 2).

By configuration also DeepSeek-V2 (softmax gate) and the small dense models it is distilled into (grouped queries).
Parallelism, optimizers and checkpoints are applied from outside. Shapes are written as suffixes:

    B  sequences      T  tokens (all sequences laid end to end, B·S)      S  positions of a sequence
    D  width          H  heads                                             V  rows of the vocabulary
    C  key/value latent   Q  query latent or width   N, R  head width without and with rotation   W  value width
    G  heads of keys and values, where they are fewer than those of queries
    E  routed experts K  experts a token chose       F  hidden width of an FFN
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gristmill.kernels.cross_entropy import linear_cross_entropy_mean
from gristmill.kernels.linear import linear
from gristmill.kernels.mla_attention import attention, latent_attention
from gristmill.kernels.mla_decode import mla_decode
from gristmill.kernels.moe_mlp import moe_mlp
from gristmill.kernels.norm_rope import rms_norm, rotate_halves
from gristmill.kernels.router import Choice, Routes, route
from gristmill.kernels.swiglu import swiglu
from gristmill.model.config import ModelConfig

LATENT_EPS = 1e-6  # of the norms on the latents, whatever rms_norm_eps is: DeepSeek's own code gives them none


@dataclass(frozen=True)
class Batch:
    """Packed sequences. `position_BS` restarts at each document unless documents may see those before them.

    A query sees the tokens from `first_BS` up to itself, places in the sequence, (B, S); none means from the beginning.
    """

    token_BS: Tensor
    position_BS: Tensor
    first_BS: Tensor | None = None


@dataclass
class Routing:
    """What the gates of one forward pass decided, for bias balancing and for the load's curves."""

    load_LE: list[Tensor] = field(default_factory=list)  # rows each expert received, one tensor a MoE block
    balance_loss: list[Tensor] = field(default_factory=list)


class Linear(nn.Module):
    """A matrix, stored (out, in) as Hugging Face does, and rarely a bias; `product` is set from outside (precision)."""

    product: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.product = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x.to(self.weight.dtype), self.weight, self.eps)


def rotary_frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """Radians a position of each rotated pair, float32, (R/2); scaled for long contexts where that is asked for."""
    width, scaling = config.rotary_width, config.rope_scaling
    power = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    frequency = 1.0 / config.rope_theta**power
    if scaling is None:
        return frequency
    if scaling.type == "llama3":
        turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    else:
        low, high = (
            width * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi))
            / (2 * math.log(config.rope_theta))
            for turns in (scaling.beta_fast, scaling.beta_slow)
        )  # fmt: skip
        low, high = max(math.floor(low), 0), min(math.ceil(high), width - 1)
        pair = torch.arange(width // 2, device=device, dtype=torch.float32)
        kept = 1 - (pair - low) / max(high - low, 0.001)
    kept = kept.clamp(0, 1)
    return frequency * kept + frequency / scaling.factor * (1 - kept)


def yarn_amplitude(factor: float, weight: float) -> float:
    """√(1/t) of YaRN (arXiv 2309.00071, equation 22), the weight being its 1."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotary_angles(config: ModelConfig, position: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, float32, shape (*position.shape, R/2)."""
    angle, scaling = position[..., None].float() * rotary_frequencies(config, position.device), config.rope_scaling
    if scaling is None or scaling.type != "yarn" or scaling.mscale == scaling.mscale_all_dim:
        return angle.cos(), angle.sin()
    size = yarn_amplitude(scaling.factor, scaling.mscale) / yarn_amplitude(scaling.factor, scaling.mscale_all_dim)
    return angle.cos() * size, angle.sin() * size


def score_scale(config: ModelConfig) -> float:
    """What the products of queries and keys are multiplied by: 1/√(head width), and YaRN's temperature."""
    scale, scaling = config.head_width**-0.5, config.rope_scaling
    if config.attention == "mla" and scaling is not None and scaling.type == "yarn" and scaling.mscale_all_dim:
        scale *= yarn_amplitude(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


class MultiHeadLatentAttention(nn.Module):
    """MLA (V3 equations 1–11): keys and values come from one small latent, the only thing decoding caches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c, heads, head_width = config, config.num_attention_heads, config.head_width
        self.config, self.scale = config, score_scale(config)
        if c.q_lora_rank is None:
            self.q_proj = Linear(c.hidden_size, heads * head_width)
        else:
            self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, LATENT_EPS)
            self.q_b_proj = Linear(c.q_lora_rank, heads * head_width)
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, LATENT_EPS)
        self.kv_b_proj = Linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.o_proj = Linear(heads * c.v_head_dim, c.hidden_size)

    def project(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B,S,H,N+R), the normalised latent (B,S,C) and the shared key (B,S,R), neither yet rotated."""
        c = self.config
        if c.q_lora_rank is None:
            q = self.q_proj(x_BSD)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD)))
        latent_BSC, key_BSR = self.kv_a_proj_with_mqa(x_BSD).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        return q.unflatten(-1, (c.num_attention_heads, -1)), self.kv_a_layernorm(latent_BSC), key_BSR

    def forward(self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], first_BS: Tensor | None) -> Tensor:
        """Training and prefill: keys and values are expanded from the latent."""
        q_BSHQ, latent_BSC, key_BSR = self.project(x_BSD)
        kv_BSHX = self.kv_b_proj(latent_BSC).unflatten(-1, (self.config.num_attention_heads, -1))
        out_BSHW = latent_attention(q_BSHQ, kv_BSHX, key_BSR, rotary, self.scale, first_BS=first_BS)
        return self.o_proj(out_BSHW.flatten(2))

    def reading(self) -> Tensor:
        """The matrices that read x as one, (Q + C + R, D): of queries or their latents, of latents and shared keys."""
        first = self.q_proj if self.config.q_lora_rank is None else self.q_a_proj
        return torch.cat((first.weight, self.kv_a_proj_with_mqa.weight))

    def absorbed(
        self, x_BSD: Tensor, reading_XD: Tensor, rotary: tuple[Tensor, Tensor], cache_BPC: Tensor, start_B: Tensor,
        reach: int, table_BJ: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Decoding: `kv_b_proj` is absorbed into queries and outputs, and nothing is expanded (V2 section 2.1.2).

        Scores and values are taken in the cache, C + R numbers a token, where the tokens of row b are put at the places
        from `start_B[b]` on, all below `reach`; of places behind them nothing is read. A table names a row's pages.
        """
        c = self.config
        assert cache_BPC.shape[-1] == c.kv_lora_rank + c.qk_rope_head_dim
        query, kv_BSY = linear(x_BSD, reading_XD).tensor_split([len(reading_XD) - cache_BPC.shape[-1]], -1)
        if c.q_lora_rank is not None:
            query = linear(self.q_a_layernorm(query), self.q_b_proj.weight)
        out_BSX = mla_decode(
            query.unflatten(-1, (c.num_attention_heads, -1)), kv_BSY, cache_BPC, start_B, reach, rotary,
            self.kv_a_layernorm.weight, LATENT_EPS, self.kv_b_proj.weight.unflatten(0, (c.num_attention_heads, -1)),
            self.scale, table_BJ,
        )  # fmt: skip
        return linear(out_BSX, self.o_proj.weight)


class GroupedQueryAttention(nn.Module):
    """Attention of Llama and Qwen: several query heads share a head of keys and values (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c, width = config, config.head_width
        self.config, self.scale, self.groups = c, score_scale(c), c.num_key_value_heads or c.num_attention_heads
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * width, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, self.groups * width, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, self.groups * width, bias=c.qkv_bias)
        self.o_proj = Linear(c.num_attention_heads * width, c.hidden_size)
        self.q_norm = RMSNorm(width, c.rms_norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(width, c.rms_norm_eps) if c.qk_norm else None

    def project(self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B,S,H,R), rotated keys and values (B,S,G,R)."""
        width = self.config.head_width
        q_BSHR, k_BSGR, v_BSGR = (
            project(x_BSD).unflatten(-1, (-1, width)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHR, k_BSGR = self.q_norm(q_BSHR), self.k_norm(k_BSGR)
        cos, sin = (part[:, :, None] for part in rotary)
        q_BSHR, k_BSGR = (rotate_halves(x, cos, sin).to(v_BSGR.dtype) for x in (q_BSHR, k_BSGR))
        return q_BSHR, k_BSGR, v_BSGR

    def forward(self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], first_BS: Tensor | None) -> Tensor:
        return self.o_proj(attention(*self.project(x_BSD, rotary), self.scale, first_BS=first_BS).flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)); gate and up lie in one matrix, gate first."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(width, 2 * hidden)
        self.down_proj = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class Gate(nn.Module):
    """Affinities, biased and group-limited choice, unbiased gates (V3 equations 12–16; V2 section 2.2.1: softmax)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.choice = Choice(
            config.num_experts_per_tok, config.scoring_func, config.n_group, config.topk_group,
            normalised=config.norm_topk_prob, scale=config.routed_scaling_factor,
        )  # fmt: skip
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        self.e_score_correction_bias: Tensor

    def forward(self, x_TD: Tensor) -> Routes:
        """Chosen experts, their gate values and all affinities, in float32, loads, and rows by expert."""
        return route(x_TD.float(), self.weight.float(), self.e_score_correction_bias, self.choice)


class Experts(nn.Module):
    """The routed experts as two stacks of matrices, (E, 2F, D) gate-and-up and (E, D, F) down."""

    product: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, hidden = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * hidden, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.product = moe_mlp

    def forward(self, x_TD: Tensor, to: Routes) -> Tensor:
        stacks = self.gate_up_proj, self.down_proj
        return self.product(x_TD, to.expert_TK, to.gate_TK, *stacks, to.load_E, to.order_M)


class MixtureOfExperts(nn.Module):
    """DeepSeekMoE with shared experts and bias balancing; no token is dropped (V3 section 2.1.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = Gate(config)
        self.experts = Experts(config)
        self.shared_experts = (
            SwiGLU(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
            if config.n_shared_experts
            else None
        )

    def forward(self, x_BSD: Tensor, routing: Routing | None) -> Tensor:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        routes = self.gate(x_TD)
        out_TD = self.experts(x_TD, routes)
        if self.shared_experts is not None:
            out_TD = out_TD + self.shared_experts(x_TD)
        if routing is not None:
            routing.load_LE.append(routes.load_E)
            if self.training and self.config.balance_loss_alpha:
                routing.balance_loss.append(self.balance_loss(routes.score_TE, routes.expert_TK, x_BSD.shape[0]))
        return out_TD.view_as(x_BSD)

    def balance_loss(self, score_TE: Tensor, expert_TK: Tensor, sequences: int) -> Tensor:
        """The sequence-wise balance loss α Σᵢ fᵢ Pᵢ, mean over sequences (V3 equation 17)."""
        f_BE, p_BE = self.balance_factors(score_TE, expert_TK, sequences)
        return self.config.balance_loss_alpha * (f_BE * p_BE).sum(-1).mean()

    def balance_factors(self, score_TE: Tensor, expert_TK: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
        """fᵢ and Pᵢ of each sequence: means over its positions, (B, E) each (V3 equations 18–20)."""
        experts, chosen = self.config.n_routed_experts, self.config.num_experts_per_tok
        expert_BT = expert_TK.view(sequences, -1)
        none_BE = expert_BT.new_zeros(sequences, experts)
        count_BE = none_BE.scatter_add(1, expert_BT, torch.ones_like(expert_BT))  # a GPU's bincount waits for the host
        length = expert_BT.shape[1] // chosen
        f_BE = count_BE.float() * (experts / (chosen * length))
        share_TE = score_TE / (score_TE.sum(-1, keepdim=True) + 1e-20)
        return f_BE, share_TE.view(sequences, length, experts).mean(1)

    @torch.no_grad()
    def update_bias(self, load_E: Tensor, scale: float = 1.0) -> None:
        """Overloaded experts −γ, underloaded +γ, after a step's load over all ranks (V3 section 2.1.2).

        γ is `bias_update_speed` times `scale`.
        """
        load = load_E.float()
        self.gate.e_score_correction_bias += self.config.bias_update_speed * scale * (load.mean() - load).sign()


class Block(nn.Module):
    """Attention, then a dense FFN or a mixture of experts, each behind its norm and beside the residual."""

    def __init__(self, config: ModelConfig, dense: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        attention = MultiHeadLatentAttention if config.attention == "mla" else GroupedQueryAttention
        self.self_attn = attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size) if dense else MixtureOfExperts(config)

    def feed_forward(self, x_BSD: Tensor, routing: Routing | None) -> Tensor:
        normed = self.post_attention_layernorm(x_BSD)
        return x_BSD + (self.mlp(normed, routing) if isinstance(self.mlp, MixtureOfExperts) else self.mlp(normed))

    def forward(
        self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], first_BS: Tensor | None, routing: Routing | None
    ) -> Tensor:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), rotary, first_BS)
        return self.feed_forward(x_BSD, routing)


class MultiTokenPrediction(nn.Module):
    """Module k: token t+1+k from module k−1's hidden state at t and the embedding of token t+k (V3 section 2.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.block = Block(config, dense=config.first_k_dense_replace >= config.num_hidden_layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_BSD: Tensor,
        next_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        first_BS: Tensor | None,
        routing: Routing | None,
    ) -> Tensor:
        """The block's output behind `norm`, which the head and the next module take (equations 21 to 23).

        The paper leaves open on which side of the norm the modules are joined; the released weights are run behind it,
        as `hidden_BSD` of the first module is behind the model's final norm.
        """
        return self.norm(self.block(self.joined(hidden_BSD, next_BSD), rotary, first_BS, routing))

    def joined(self, hidden_BSD: Tensor, next_BSD: Tensor) -> Tensor:
        """The block's input (equation 21), the beginning of a residual stream and in that one's dtype."""
        return self.eh_proj(torch.cat((self.enorm(next_BSD), self.hnorm(hidden_BSD)), -1)).to(hidden_BSD.dtype)


def token_behind(target_BS: Tensor) -> Tensor:
    """Targets one token further ahead; −100 at a sequence's last position and where the nearer target is left out."""
    behind_BS = F.pad(target_BS[:, 1:], (0, 1), value=-100)
    return behind_BS.masked_fill(target_BS < 0, -100)


class Transformer(nn.Module):
    """The whole model. Parameter names are those of Hugging Face's DeepseekV3 where the layouts agree."""

    head_loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        # `initialise` draws them. nn.Embedding would too, and on the device "meta" load all of torch.compile for it.
        numbers = torch.empty(vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(numbers, freeze=False)
        self.layers = nn.ModuleList(
            Block(config, dense=i < config.first_k_dense_replace) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, vocab_size)
        if config.tie_word_embeddings:
            assert isinstance(self.embed_tokens.weight, nn.Parameter)
            self.lm_head.weight = self.embed_tokens.weight
        self.mtp = nn.ModuleList(MultiTokenPrediction(config) for _ in range(config.num_nextn_predict_layers))
        self.head_loss = linear_cross_entropy_mean

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Normal weights of `initializer_range`, in the order of the names; norms are one, biases zero."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in sorted(self.named_parameters()):
            if parameter.ndim > 1:
                draw = torch.empty(parameter.shape).normal_(0, self.config.initializer_range, generator=generator)
                parameter.copy_(draw)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            assert parameter.isfinite().all(), name

    def mixtures(self) -> list[MixtureOfExperts]:
        """The MoE blocks in the order in which `Routing` lists them; those of the MTP modules are last."""
        blocks = [*self.layers, *(module.block for module in self.mtp)]
        return [b.mlp for b in blocks if isinstance(b, Block) and isinstance(b.mlp, MixtureOfExperts)]

    def hidden(self, batch: Batch, routing: Routing | None = None) -> Tensor:
        """The last block's output before the final norm, (B, S, D)."""
        x_BSD = self.embed_tokens(batch.token_BS)
        rotary = rotary_angles(self.config, batch.position_BS)
        for layer in self.layers:
            x_BSD = layer(x_BSD, rotary, batch.first_BS, routing)
        return x_BSD

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, S, V)."""
        return self.lm_head(self.norm(self.hidden(batch)))

    def losses(
        self,
        batch: Batch,
        target_BS: Tensor,
        next_target_BS: Tensor | None,
        weight_BS: Tensor,
        routing: Routing,
    ) -> tuple[Tensor, list[Tensor]]:
        """Mean cross-entropy of token t+1; and where `next_target_BS` is given, that of each MTP module.

        A target of -100 is left out; `weight_BS` weighs positions (0 leaves one out) and the mean is over the
        weights. Module k embeds its predecessor's target (module 1: `target_BS`, token t+1), -100 standing for a
        token that nobody reads, and predicts the token behind it (V3 equations 21–25). Where `batch` is a part of
        longer sequences, `next_target_BS` may go on behind it, to give modules behind the first their targets.
        """
        hidden_BSD = self.norm(self.hidden(batch, routing))
        main = self._loss(hidden_BSD, target_BS, weight_BS)
        ahead: list[Tensor] = []
        if next_target_BS is None:
            return main, ahead
        rotary, length = rotary_angles(self.config, batch.position_BS), weight_BS.shape[1]
        for module in self.mtp:
            assert isinstance(module, MultiTokenPrediction)
            next_BSD = self.embed_tokens(target_BS[:, :length].clamp_min(0))
            hidden_BSD = module(hidden_BSD, next_BSD, rotary, batch.first_BS, routing)
            ahead.append(self._loss(hidden_BSD, next_target_BS[:, :length], weight_BS))
            target_BS, next_target_BS = next_target_BS, token_behind(next_target_BS)
        return main, ahead

    def _loss(self, x_BSD: Tensor, target_BS: Tensor, weight_BS: Tensor) -> Tensor:
        target_T = target_BS.reshape(-1)
        weight_T = weight_BS.reshape(-1) * (target_T >= 0)
        weight_T = weight_T / weight_T.sum().clamp_min(1e-9)
        return self.head_loss(x_BSD.flatten(0, 1), self.lm_head.weight, target_T, weight_T)
