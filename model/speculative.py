"""Speculative decoding with the MTP module as the drafter (V3 section 5.4.3; Leviathan et al. 2023, arXiv 2211.17192).

A step reads two tokens: the last one and a draft of the next. The model's own distribution at the last token accepts
the draft or replaces it, so that what is said has the model's distribution, whatever the drafter's; where it accepts,
the second token's logits give one more. Greedy decoding says the very tokens that it says without drafts.

Every draw is a hash of (a sample's seed, the place of the token in it, what the draw is for), so that a sample does not
depend on its batch mates. Legend: as in `transformer.py`; B responses that are not over yet, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gristmill.kernels.likeliest import likeliest
from gristmill.model.continuous_batching import COMPACT_SHARE, check_length
from gristmill.model.decoding import Decoder, padded_prompts
from gristmill.model.generate import Sample
from gristmill.model.sampling import Sampling, choose, inverse_cdf, log_probability, probabilities, uniform
from gristmill.model.transformer import Transformer

DRAFT, ACCEPT = 1 << 40, 1 << 41  # what a draw is for, beside its place


@dataclass
class Acceptance:
    """How often a draft was taken, of those whose place was still to be filled."""

    drafted: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass(frozen=True)
class _Verdict:
    """Whether each draft was accepted; the token in its place, and the one behind it, which holds if it was."""

    accepted_B: Tensor
    token_B2: Tensor
    log_p_B2: Tensor


def _greedy(logits_B2V: Tensor, draft_B: Tensor) -> _Verdict:
    token_B2, log_p_B2 = likeliest(logits_B2V)
    return _Verdict(token_B2[:, 0] == draft_B, token_B2, log_p_B2)


def _sampled(logits_B2V: Tensor, draft_B: Tensor, draft_BV: Tensor, sampling: Sampling, draw_B3: Tensor) -> _Verdict:
    """Algorithm 1 of Leviathan et al.: the draft where u < p/q, otherwise a draw from max(p − q, 0).

    The draws are those of acceptance, of the draft's place and of the one behind it.
    """
    weight_B2V = probabilities(logits_B2V.flatten(0, 1), sampling).view(logits_B2V.shape)
    own_BV = weight_B2V[:, 0]
    p_B, q_B = (x_BV.gather(1, draft_B[:, None])[:, 0].double() for x_BV in (own_BV, draft_BV))
    accepted_B = draw_B3[:, 0] * q_B < p_B
    left_BV = (own_BV - draft_BV).clamp_min_(0)
    # nothing is left where p = q, which no replaced draft meets
    left_BV = torch.where(left_BV.sum(-1, keepdim=True) > 0, left_BV, own_BV)
    weight_B2V = torch.stack((left_BV, weight_B2V[:, 1]), 1)
    token_B2 = inverse_cdf(weight_B2V.flatten(0, 1), draw_B3[:, 1:].flatten()).view(-1, 2)
    token_B2[:, 0] = torch.where(accepted_B, draft_B, token_B2[:, 0])
    return _Verdict(accepted_B, token_B2, log_probability(logits_B2V.float() / sampling.temperature, token_B2))


class _Batch:
    """Responses that are decoded together: row b has said `place_B` tokens, the last of which no cache has seen yet."""

    def __init__(
        self, decoder: Decoder, prompts: list[list[int]], seeds: list[int], sampling: Sampling, pad: int
    ) -> None:
        self.decoder, self.sampling = decoder, sampling
        self.purpose_4 = torch.tensor([DRAFT, ACCEPT, 0, 1], device=decoder.device)
        self.own = list(range(len(prompts)))  # which response a row is
        token_BS, self.position_B = padded_prompts(prompts, pad, decoder.device)
        self.seed_B, start_B = torch.tensor(seeds, device=decoder.device), torch.zeros_like(self.position_B)
        room = token_BS.shape[1] + sampling.max_new_tokens
        self.cache, self.drafter = decoder.cache(len(prompts), room), decoder.cache(len(prompts), room, layers=1)
        end_B, row_B = self.position_B - 1, torch.arange(len(prompts), device=decoder.device)
        parts = list(decoder.portions(token_BS.shape[1], self.cache))
        hidden_BSD = torch.cat([decoder.advance(token_BS[:, p], start_B + p.start, self.cache) for p in parts], 1)
        logits_BV = decoder.logits(hidden_BSD[row_B, end_B])
        self.last_B, self.log_p_B = choose(logits_BV, sampling, self.seed_B, start_B)
        self.place_B = torch.ones_like(start_B)
        next_BS = token_BS.roll(-1, 1).scatter(1, end_B[:, None], self.last_B[:, None])
        self.draft_BV = torch.empty_like(logits_BV)
        for p in parts:
            asked_B = (end_B - p.start).clamp(0, p.stop - p.start - 1)
            draft_BV = decoder.draft(hidden_BSD[:, p], next_BS[:, p], start_B + p.start, asked_B, self.drafter)
            self.draft_BV = torch.where(((end_B >= p.start) & (end_B < p.stop))[:, None], draft_BV, self.draft_BV)

    def begun(self) -> tuple[list[list[int]], list[list[float]]]:
        """The first token of each row, and its log-probability."""
        return self.last_B[:, None].tolist(), self.log_p_B[:, None].tolist()

    def step(self) -> tuple[list[list[int]], list[list[float]], list[bool]]:
        """Two tokens of each row and their log-probabilities, and whether the draft was taken, so that both hold."""
        draft_BV, draft_B, draw_B3 = self._draft()
        token_B2 = torch.stack((self.last_B, draft_B), 1)
        hidden_B2D, logits_B2V = self.decoder.step(token_B2, self.position_B, self.cache)
        if draft_BV is None or draw_B3 is None:
            verdict = _greedy(logits_B2V, draft_B)
        else:
            verdict = _sampled(logits_B2V, draft_B, draft_BV, self.sampling, draw_B3)
        self.taken_B = verdict.accepted_B.long()
        self.draft_BV = self.decoder.draft(hidden_B2D, verdict.token_B2, self.position_B, self.taken_B, self.drafter)
        self.last_B = verdict.token_B2.gather(1, self.taken_B[:, None])[:, 0]
        return verdict.token_B2.tolist(), verdict.log_p_B2.tolist(), verdict.accepted_B.tolist()

    def _draft(self) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """A token for each row, what it was drawn from, and the draws behind it; greedy, there is none to draw."""
        if self.sampling.temperature == 0:
            return None, self.draft_BV.argmax(-1), None
        draft_BV = probabilities(self.draft_BV, self.sampling)
        draw_B4 = uniform(self.seed_B[:, None], self.place_B[:, None] + self.purpose_4)
        return draft_BV, inverse_cdf(draft_BV, draw_B4[:, 0]), draw_B4[:, 1:]

    def move_on(self, over: list[bool]) -> None:
        """Behind the step's tokens, whose draft's traces the next step writes over where it was not taken.

        A row whose response is over stays where it is, until there are enough of them to leave them out.
        """
        moved_B = 1 + self.taken_B
        if any(over):
            moved_B = moved_B * ~torch.tensor(over, device=self.taken_B.device)
        self.position_B, self.place_B = self.position_B + moved_B, self.place_B + moved_B
        left = [row for row, is_over in enumerate(over) if not is_over]
        if not 0 < len(left) < COMPACT_SHARE * len(over):
            return
        kept = torch.tensor(left, device=self.taken_B.device)
        self.cache.keep(kept)
        self.drafter.keep(kept)
        self.own = [self.own[row] for row in left]
        self.seed_B, self.last_B, self.draft_BV = self.seed_B[kept], self.last_B[kept], self.draft_BV[kept]
        self.position_B, self.place_B = self.position_B[kept], self.place_B[kept]


@torch.no_grad()
def speculate(
    model: Transformer, prompts: list[list[int]], seeds: list[int], sampling: Sampling, *, eos: int, pad: int
) -> tuple[list[Sample], Acceptance]:
    """A response to each prompt, as `sample` gives them, and how many drafts were taken.

    Raises:
        ValueError: the model has no MTP module, a prompt is empty, or it and its response pass the position limit.
    """
    if not len(model.mtp):
        raise ValueError("the model has no MTP module to draft with: load it with its module, or use sample")
    if not all(prompts):
        raise ValueError("a prompt is empty: give it a token to begin with")
    check_length(model.config, max(map(len, prompts), default=0) + sampling.max_new_tokens)
    batch = _Batch(Decoder(model), prompts, seeds, sampling, pad)
    samples, found = [Sample() for _ in prompts], Acceptance()

    def add(own: int, token: int, log_prob: float) -> bool:
        """A further token of a response that is not over; whether it is now."""
        response = samples[own]
        response.tokens.append(token)
        response.log_probs.append(log_prob)
        response.end = "eos" if token == eos else "length"
        return token == eos or len(response.tokens) == sampling.max_new_tokens

    done = [add(own, t, p) for own, ([t], [p]) in enumerate(zip(*batch.begun(), strict=True))]
    while not all(done):
        for own, pair, log_probs, accepted in zip(batch.own, *batch.step(), strict=True):
            if done[own]:
                continue
            found.drafted += 1
            found.accepted += accepted
            done[own] = add(own, pair[0], log_probs[0])
            if accepted and not done[own]:
                done[own] = add(own, pair[1], log_probs[1])
        batch.move_on([done[own] for own in batch.own])
    return samples, found
