"""Speculative decoding with the MTP module as the drafter (V3 section 5.4.3; Leviathan et al. 2023, arXiv 2211.17192).

A step reads two tokens: the last one and a draft of the next. The model's own distribution at the last token accepts
the draft or replaces it, so that what is said has the model's distribution, whatever the drafter's; where it accepts,
the second token's logits give one more. Greedy decoding says the very tokens that it says without drafts.

Every draw is a hash of (a sample's seed, the place of the token in it, what the draw is for), so that a sample does not
depend on its batch mates. Legend: as in `transformer.py`; B responses, A of them not over yet, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gristmill.model.generate import COMPACT_SHARE, Sample, Sampling, inverse_cdf, laid_out, probabilities, uniform
from gristmill.model.transformer import LatentCache, Transformer

DRAFT, ACCEPT = 1 << 40, 1 << 41  # what a draw is for, beside its place


@dataclass
class Acceptance:
    """How often a draft was taken, of those whose place was still to be filled."""

    drafted: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass
class _State:
    """Responses so far; of each, `tokens_BT` up to `length_B`, the last of which the caches have not seen."""

    sampling: Sampling
    eos: int
    tokens_BT: Tensor
    log_p_BT: Tensor
    length_B: Tensor
    done_B: Tensor

    def add(self, alive_A: Tensor, token_A: Tensor, logits_AV: Tensor, wanted_A: Tensor | None = None) -> None:
        """A further token of these responses, where it is wanted and the response is not over."""
        speaks_A = ~self.done_B[alive_A] if wanted_A is None else wanted_A & ~self.done_B[alive_A]
        rows, token = alive_A[speaks_A], token_A[speaks_A]
        # at the sampling temperature, no token left out
        log_p = (logits_AV[speaks_A].float() / (self.sampling.temperature or 1.0)).log_softmax(-1)
        at = self.length_B[rows]
        self.tokens_BT[rows, at] = token
        self.log_p_BT[rows, at] = log_p.gather(1, token[:, None])[:, 0]
        self.length_B[rows] += 1
        self.done_B[rows] = (token == self.eos) | (self.length_B[rows] == self.sampling.max_new_tokens)

    def samples(self) -> list[Sample]:
        return [
            Sample(t[:n], p[:n], ended=t[n - 1] == self.eos)
            for t, p, n in zip(self.tokens_BT.tolist(), self.log_p_BT.tolist(), self.length_B.tolist(), strict=True)
        ]


@torch.no_grad()
def speculate(
    model: Transformer, prompts: list[list[int]], seeds: list[int], sampling: Sampling, *, eos: int, pad: int
) -> tuple[list[Sample], Acceptance]:
    """A response to each prompt, as `sample` gives them, and how many drafts were taken.

    Raises:
        ValueError: the model has no MTP module, or a prompt and its response pass the position limit.
    """
    if not len(model.mtp):
        raise ValueError("the model has no MTP module to draft with: load it with its module, or use sample")
    model.eval()
    token_BS, position_BS = laid_out(model, prompts, sampling, pad)
    count, longest = token_BS.shape
    room = longest + 2 * sampling.max_new_tokens  # a step fills two places and says one token at least
    cache = LatentCache(model.config, count, room, model.lm_head.weight)
    drafter = LatentCache(model.config, count, room, model.lm_head.weight, layers=1)
    seed_A, alive_A = torch.tensor(seeds, device=token_BS.device), torch.arange(count, device=token_BS.device)
    state = _State(
        sampling,
        eos,
        tokens_BT=torch.full((count, sampling.max_new_tokens), eos, device=seed_A.device),
        log_p_BT=torch.zeros(count, sampling.max_new_tokens, device=seed_A.device),
        length_B=torch.zeros_like(seed_A),
        done_B=torch.zeros_like(seed_A, dtype=torch.bool),
    )
    hidden_BSD = model.advance(token_BS, position_BS, cache)
    logits_BV = model.lm_head(model.norm(hidden_BSD[:, -1]))
    last_A = inverse_cdf(probabilities(logits_BV, sampling), uniform(seed_A, 0))
    state.add(alive_A, last_A, logits_BV)
    next_BS = torch.cat((token_BS[:, 1:], last_A[:, None]), 1)
    drafted_AD = model.advance_mtp(hidden_BSD, next_BS, position_BS, drafter)[:, -1]
    position_A, found = position_BS[:, -1] + 1, Acceptance()
    while not state.done_B.all():
        draft_AV = probabilities(model.lm_head(drafted_AD), sampling)
        draft_A = inverse_cdf(draft_AV, uniform(seed_A, state.length_B[alive_A] + DRAFT))
        pair_A2 = torch.stack((position_A, position_A + 1), 1)
        hidden_A2D = model.advance(torch.stack((last_A, draft_A), 1), pair_A2, cache)
        logits_A2V = model.lm_head(model.norm(hidden_A2D))
        p_AV = probabilities(logits_A2V[:, 0], sampling)
        accepted_A = _accepts(p_AV, draft_AV, draft_A, uniform(seed_A, state.length_B[alive_A] + ACCEPT))
        speaking_A = ~state.done_B[alive_A]
        found.drafted += int(speaking_A.sum())
        found.accepted += int((accepted_A & speaking_A).sum())
        own_A = inverse_cdf(_left_over(p_AV, draft_AV), uniform(seed_A, state.length_B[alive_A]))
        first_A = torch.where(accepted_A, draft_A, own_A)
        state.add(alive_A, first_A, logits_A2V[:, 0])
        second_A = inverse_cdf(probabilities(logits_A2V[:, 1], sampling), uniform(seed_A, state.length_B[alive_A]))
        state.add(alive_A, second_A, logits_A2V[:, 1], wanted_A=accepted_A)
        # A draft that was replaced is seen by nobody from now on, in either cache.
        pair_A2[:, 1].masked_fill_(~accepted_A, -1)
        cache.position_BS[:, cache.filled - 1] = pair_A2[:, 1]
        made_A2D = model.advance_mtp(hidden_A2D, torch.stack((first_A, second_A), 1), pair_A2, drafter)
        drafted_AD = torch.where(accepted_A[:, None], made_A2D[:, 1], made_A2D[:, 0])
        last_A = torch.where(accepted_A, second_A, first_A)
        position_A = position_A + 1 + accepted_A
        kept = (~state.done_B[alive_A]).nonzero()[:, 0]
        if 0 < len(kept) < COMPACT_SHARE * len(alive_A):
            cache.select(kept)
            drafter.select(kept)
            alive_A, seed_A, last_A, position_A, drafted_AD = (
                x[kept] for x in (alive_A, seed_A, last_A, position_A, drafted_AD)
            )
    return state.samples(), found


def _accepts(p_AV: Tensor, draft_AV: Tensor, draft_A: Tensor, u_A: Tensor) -> Tensor:
    """Whether u < p/q at the draft: algorithm 1."""
    p_A, q_A = (x.gather(1, draft_A[:, None])[:, 0].double() for x in (p_AV, draft_AV))
    return u_A * q_A < p_A


def _left_over(p_AV: Tensor, draft_AV: Tensor) -> Tensor:
    """What a replaced draft is drawn from, max(p − q, 0); p where nothing is left, which no replaced draft meets."""
    left_AV = (p_AV - draft_AV).clamp_min(0)
    return torch.where(left_AV.sum(-1, keepdim=True) > 0, left_AV, p_AV)
