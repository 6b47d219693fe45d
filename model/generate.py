"""Sampling from the model: batched, cached in the latent, each sample seeded by itself.

The draw of sample i at its t-th token is a hash of (seed i, t), so a sample's randomness does not depend on who else
is in the batch, nor on how often the batch was made smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gristmill.model.transformer import LatentCache, Transformer

COMPACT_SHARE = 0.75  # the batch is made smaller when fewer than this share of its rows still speak


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: temperature 0 takes the likeliest.

    Attributes:
        top_p: keeps the nucleus, the likeliest tokens that reach this share of the weight together.
        top_k: keeps so many of the likeliest; 0 keeps all.
        min_p: keeps tokens with at least this share of the likeliest one's weight.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or not 0 <= self.min_p < 1:
            raise ValueError(
                f"temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k}, min_p {self.min_p}: wanted "
                "a temperature of 0 or more, a top_p in (0, 1], a top_k of 0 or more and a min_p in [0, 1)"
            )

    @property
    def cuts(self) -> bool:
        """Whether some tokens are left out."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclass(frozen=True)
class Sample:
    """A response: its tokens (the end token included where it came) and their log-probabilities under the sampler."""

    tokens: list[int]
    log_probs: list[float]
    ended: bool


def uniform(seed_B: Tensor, step: int | Tensor) -> Tensor:
    """Numbers in [0, 1), float64, a hash of (seed, step): SplitMix64 (Steele et al. 2014) in wrapping int64.

    The step is one for all or (B,), int64.
    """
    golden = 0x9E3779B97F4A7C15
    z = seed_B + (_signed((step + 1) * golden) if isinstance(step, int) else (step + 1) * _signed(golden))
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shift(z, 31)
    return _shift(z, 11).double() * 2.0**-53


def _signed(value: int) -> int:
    """The 64-bit two's complement of a Python integer."""
    return (value + 2**63) % 2**64 - 2**63


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def choose(logits_BV: Tensor, sampling: Sampling, u_B: Tensor) -> tuple[Tensor, Tensor]:
    """A token a row, and its log-probability at the sampling temperature before any token is left out."""
    if sampling.temperature == 0:
        log_p_BV = logits_BV.float().log_softmax(-1)
        token_B = log_p_BV.argmax(-1)
        return token_B, log_p_BV.gather(1, token_B[:, None])[:, 0]
    log_p_BV = (logits_BV.float() / sampling.temperature).log_softmax(-1)
    if sampling.cuts:
        p_BV, order_BV = _cut(log_p_BV.exp(), sampling)
        token_B = order_BV.gather(1, inverse_cdf(p_BV, u_B)[:, None])[:, 0]
    else:
        token_B = inverse_cdf(log_p_BV.exp(), u_B)
    return token_B, log_p_BV.gather(1, token_B[:, None])[:, 0]


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that `choose` draws from, (B, V) float32."""
    if sampling.temperature == 0:
        return torch.zeros_like(logits_BV, dtype=torch.float32).scatter_(1, logits_BV.argmax(-1, keepdim=True), 1.0)
    p_BV = (logits_BV.float() / sampling.temperature).softmax(-1)
    if not sampling.cuts:
        return p_BV
    kept_BV, order_BV = _cut(p_BV, sampling)
    return torch.zeros_like(p_BV).scatter_(1, order_BV, kept_BV / kept_BV.sum(-1, keepdim=True))


def _cut(p_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities from the largest on, 0 where a token is left out, and the tokens that they are of."""
    p_BV, order_BV = torch.sort(p_BV, stable=True, dim=-1, descending=True)
    left_out = torch.zeros_like(p_BV, dtype=torch.bool)
    if sampling.top_p < 1:
        left_out |= p_BV.cumsum(-1) - p_BV >= sampling.top_p
    if sampling.top_k:
        left_out[:, sampling.top_k :] = True
    if sampling.min_p:
        left_out |= p_BV < sampling.min_p * p_BV[:, :1]
    return p_BV.masked_fill(left_out, 0), order_BV


def inverse_cdf(p_BV: Tensor, u_B: Tensor) -> Tensor:
    """The token at which each row's weights, summed up, pass its number in [0, 1); no token without weight."""
    total_BV = p_BV.cumsum(-1)
    target_B = u_B.to(total_BV.dtype) * total_BV[:, -1]
    place = torch.searchsorted(total_BV, target_B[:, None], right=True)[:, 0]
    last = (p_BV > 0).int().cumsum(-1).argmax(-1)  # rounding may point past the last token that has any weight
    return torch.minimum(place, last)


@torch.no_grad()
def sample(
    model: Transformer,
    prompts: list[list[int]],
    seeds: list[int],
    sampling: Sampling,
    *,
    eos: int,
    pad: int,
    copies: int = 1,
) -> list[Sample]:
    """`copies` responses to each prompt, prompt by prompt; the prompt is read once for all its copies.

    Args:
        seeds: one for each response, `len(prompts) * copies` in all.

    Raises:
        ValueError: the longest prompt and response pass the model's position limit.
    """
    model.eval()
    token_BS, position_BS = laid_out(model, prompts, sampling, pad)
    count, longest = token_BS.shape
    cache = LatentCache(model.config, count, longest + sampling.max_new_tokens, model.lm_head.weight)
    logits_BV = model.decode(token_BS, position_BS, cache)
    rows = torch.arange(count, device=token_BS.device).repeat_interleave(copies)
    cache.select(rows)
    return _continue(
        model,
        cache,
        logits_BV[rows],
        position_BS[rows, -1],
        torch.tensor(seeds, device=token_BS.device),
        sampling,
        eos,
    )


def laid_out(model: Transformer, prompts: list[list[int]], sampling: Sampling, pad: int) -> tuple[Tensor, Tensor]:
    """Tokens and positions (B, S) of prompts that end together, on the model's device; -1 is the position of padding.

    Raises:
        ValueError: the longest prompt and response pass the model's position limit.
    """
    device = model.lm_head.weight.device
    longest = max(map(len, prompts))
    if longest + sampling.max_new_tokens > model.config.max_position_embeddings:
        raise ValueError(
            f"a prompt of {longest} tokens and {sampling.max_new_tokens} new ones pass the position limit "
            f"{model.config.max_position_embeddings}: lower max_new_tokens or raise max_position_embeddings"
        )
    token_BS = torch.full((len(prompts), longest), pad)
    for row, prompt in enumerate(prompts):
        token_BS[row, longest - len(prompt) :] = torch.tensor(prompt)
    start_B = torch.tensor([longest - len(p) for p in prompts])
    position_BS = (torch.arange(longest) - start_B[:, None]).clamp_min(-1).to(device)
    return token_BS.to(device), position_BS


def _continue(
    model: Transformer,
    cache: LatentCache,
    logits_BV: Tensor,
    position_B: Tensor,
    seed_B: Tensor,
    sampling: Sampling,
    eos: int,
) -> list[Sample]:
    count = len(seed_B)
    tokens = torch.full((count, sampling.max_new_tokens), eos, device=seed_B.device)
    log_probs = torch.zeros(count, sampling.max_new_tokens, device=seed_B.device)
    lengths = torch.zeros(count, dtype=torch.long, device=seed_B.device)
    alive = torch.arange(count, device=seed_B.device)  # which response each row of the batch is
    speaking = torch.ones(count, dtype=torch.bool, device=seed_B.device)
    for step in range(sampling.max_new_tokens):
        token_B, log_p_B = choose(logits_BV, sampling, uniform(seed_B[alive], step))
        spoke = alive[speaking]
        tokens[spoke, step], log_probs[spoke, step] = token_B[speaking], log_p_B[speaking]
        lengths[spoke] += 1
        speaking = speaking & (token_B != eos)
        left = int(speaking.sum())
        if not left or step + 1 == sampling.max_new_tokens:
            break
        position_B = position_B + 1
        if left < COMPACT_SHARE * len(alive):
            kept = speaking.nonzero()[:, 0]
            cache.select(kept)
            alive, token_B, position_B = alive[kept], token_B[kept], position_B[kept]
            speaking = torch.ones_like(alive, dtype=torch.bool)
        logits_BV = model.decode(token_B[:, None], position_B[:, None], cache)
    return [
        Sample(t[:n], p[:n], ended=bool(n) and t[n - 1] == eos)
        for t, p, n in zip(tokens.tolist(), log_probs.tolist(), lengths.tolist(), strict=True)
    ]


def thought_tokens(tokens: list[int], thought_end: int) -> int:
    """Tokens before the thought is closed; all of them where it never is."""
    return tokens.index(thought_end) if thought_end in tokens else len(tokens)


def stream_chat(
    folder: Path,
    tokenizer: Path,
    question: str,
    *,
    temperature: float = 0.6,
    top_p: float = 0.95,
    seed: int = 0,
    max_new_tokens: int = 256,
) -> Iterator[str]:
    """The response to `question`, piece by piece, from the model in `folder` (config.json, model.safetensors)."""
    from gristmill.model.chat import Chat
    from gristmill.model.training.models import load_model

    chat, model = Chat(tokenizer), load_model(folder, torch.device("cpu"), mtp=False).eval()
    prompt = chat.prompt(question)
    room = model.config.max_position_embeddings - len(prompt)
    if room < 1:
        raise ValueError(f"the question has {len(prompt)} tokens, past the position limit: ask a shorter one")
    sampling = Sampling(min(max_new_tokens, room), temperature, top_p)
    cache = LatentCache(model.config, 1, len(prompt) + sampling.max_new_tokens, model.lm_head.weight)
    logits_BV = model.decode(torch.tensor([prompt]), torch.arange(len(prompt))[None], cache)
    tokens: list[int] = []
    shown = ""
    for step in range(sampling.max_new_tokens):
        token = int(choose(logits_BV, sampling, uniform(torch.tensor([seed]), step))[0])
        if token == chat.eos:
            return
        tokens.append(token)
        text = chat.text(tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
        if step + 1 < sampling.max_new_tokens:
            logits_BV = model.decode(torch.tensor([[token]]), torch.tensor([[len(prompt) + step]]), cache)
