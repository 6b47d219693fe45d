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

from gristmill.model.continuous_batching import COMPACT_SHARE, check_length
from gristmill.model.decoding import Decoder, padded_prompts
from gristmill.model.generate import Sample
from gristmill.model.sampling import Sampling, inverse_cdf, log_probability, probabilities, uniform
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
    """Whether each draft was accepted, the token in its place, and the one behind it, which holds if it was."""

    accepted_B: Tensor
    token_B2: Tensor


def _greedy(logits_B2V: Tensor, draft_B: Tensor) -> _Verdict:
    token_B2 = logits_B2V.argmax(-1)
    return _Verdict(token_B2[:, 0] == draft_B, token_B2)


def _sampled(
    logits_B2V: Tensor, draft_B: Tensor, draft_BV: Tensor, sampling: Sampling, seed_B: Tensor, place_B: Tensor
) -> _Verdict:
    """Algorithm 1 of Leviathan et al.: the draft where u < p/q, otherwise a draw from max(p − q, 0)."""
    own_BV, behind_BV = (probabilities(logits_BV, sampling) for logits_BV in logits_B2V.unbind(1))
    p_B, q_B = (x_BV.gather(1, draft_B[:, None])[:, 0].double() for x_BV in (own_BV, draft_BV))
    accepted_B = uniform(seed_B, place_B + ACCEPT) * q_B < p_B
    left_BV = (own_BV - draft_BV).clamp_min_(0)
    # nothing is left where p = q, which no replaced draft meets
    left_BV = torch.where(left_BV.sum(-1, keepdim=True) > 0, left_BV, own_BV)
    first_B = torch.where(accepted_B, draft_B, inverse_cdf(left_BV, uniform(seed_B, place_B)))
    second_B = inverse_cdf(behind_BV, uniform(seed_B, place_B + 1))
    return _Verdict(accepted_B, torch.stack((first_B, second_B), 1))


class _Batch:
    """Responses that are decoded together: row b has said `place_B` tokens, the last of which no cache has seen yet."""

    def __init__(
        self, decoder: Decoder, prompts: list[list[int]], seeds: list[int], sampling: Sampling, pad: int
    ) -> None:
        self.decoder, self.sampling = decoder, sampling
        self.own = list(range(len(prompts)))  # which response a row is
        token_BS, self.position_B = padded_prompts(prompts, pad, decoder.device)
        self.seed_B, start_B = torch.tensor(seeds, device=decoder.device), torch.zeros_like(self.position_B)
        room = token_BS.shape[1] + sampling.max_new_tokens
        self.cache, self.drafter = decoder.cache(len(prompts), room), decoder.cache(len(prompts), room, layers=1)
        end_B, row_B = self.position_B - 1, torch.arange(len(prompts), device=decoder.device)
        parts = list(decoder.portions(token_BS.shape[1], self.cache))
        hidden_BSD = torch.cat([decoder.advance(token_BS[:, p], start_B + p.start, self.cache) for p in parts], 1)
        self.logits_BV = decoder.logits(hidden_BSD[row_B, end_B])
        self.last_B, self.place_B = self._first(), torch.ones_like(start_B)
        next_BS = token_BS.roll(-1, 1).scatter(1, end_B[:, None], self.last_B[:, None])
        made = [decoder.drafts(hidden_BSD[:, p], next_BS[:, p], start_B + p.start, self.drafter) for p in parts]
        self.drafted_BD = torch.cat(made, 1)[row_B, end_B]

    def _first(self) -> Tensor:
        if self.sampling.temperature == 0:
            return self.logits_BV.argmax(-1)
        return inverse_cdf(probabilities(self.logits_BV, self.sampling), uniform(self.seed_B, 0))

    def begun(self) -> tuple[list[list[int]], list[list[float]]]:
        """The first token of each row, and its log-probability."""
        log_p_B = _log_p(self.logits_BV, self.last_B, self.sampling)
        return self.last_B[:, None].tolist(), log_p_B[:, None].tolist()

    def step(self) -> tuple[list[list[int]], list[list[float]], list[bool]]:
        """Two tokens of each row and their log-probabilities, and whether the draft was taken, so that both hold."""
        draft_BV, draft_B = self._draft()
        hidden_B2D = self.decoder.advance(torch.stack((self.last_B, draft_B), 1), self.position_B, self.cache)
        logits_B2V = self.decoder.logits(hidden_B2D)
        if draft_BV is None:
            verdict = _greedy(logits_B2V, draft_B)
        else:
            verdict = _sampled(logits_B2V, draft_B, draft_BV, self.sampling, self.seed_B, self.place_B)
        made_B2D = self.decoder.drafts(hidden_B2D, verdict.token_B2, self.position_B, self.drafter)
        self.taken_B = verdict.accepted_B.long()
        row_B = torch.arange(len(self.taken_B), device=self.taken_B.device)
        self.drafted_BD, self.last_B = made_B2D[row_B, self.taken_B], verdict.token_B2[row_B, self.taken_B]
        log_p_B2 = _log_p(logits_B2V, verdict.token_B2, self.sampling)
        return verdict.token_B2.tolist(), log_p_B2.tolist(), verdict.accepted_B.tolist()

    def _draft(self) -> tuple[Tensor | None, Tensor]:
        """A token for each row, and what it was drawn from; greedy, it was not drawn."""
        logits_BV = self.decoder.model.lm_head(self.drafted_BD)
        if self.sampling.temperature == 0:
            return None, logits_BV.argmax(-1)
        draft_BV = probabilities(logits_BV, self.sampling)
        return draft_BV, inverse_cdf(draft_BV, uniform(self.seed_B, self.place_B + DRAFT))

    def move_on(self, over: list[bool]) -> None:
        """Behind the step's tokens, whose draft's traces the next step writes over where it was not taken.

        A row whose response is over stays where it is, until there are enough of them to leave them out.
        """
        moved_B = (1 + self.taken_B) * ~torch.tensor(over, device=self.taken_B.device)
        self.position_B, self.place_B = self.position_B + moved_B, self.place_B + moved_B
        left = [row for row, is_over in enumerate(over) if not is_over]
        if not 0 < len(left) < COMPACT_SHARE * len(over):
            return
        kept = torch.tensor(left, device=self.taken_B.device)
        self.cache.keep(kept)
        self.drafter.keep(kept)
        self.own = [self.own[row] for row in left]
        self.seed_B, self.last_B, self.drafted_BD = self.seed_B[kept], self.last_B[kept], self.drafted_BD[kept]
        self.position_B, self.place_B = self.position_B[kept], self.place_B[kept]


def _log_p(logits: Tensor, token: Tensor, sampling: Sampling) -> Tensor:
    """At the sampling temperature, no token left out."""
    return log_probability(logits.float() / (sampling.temperature or 1.0), token)


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
