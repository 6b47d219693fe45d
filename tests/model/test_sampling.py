"""Which tokens a cut leaves, against a plain loop over one row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gristmill.model.sampling import Sampling, choose, probabilities

NEAR = 1e-5  # float32 shares of at most 40 tokens, summed up: nearer than that to a bound either side is right


def kept_by_loop(p: list[float], sampling: Sampling) -> set[int]:
    """One token after the other, from the likeliest on; of equal ones the first."""
    order = sorted(range(len(p)), key=lambda token: (-p[token], token))
    kept, before = set(), 0.0
    for rank, token in enumerate(order):
        assume(sampling.top_p == 1 or abs(before - sampling.top_p) > NEAR)
        assume(sampling.min_p == 0 or rank == 0 or abs(p[token] / p[order[0]] - sampling.min_p) > NEAR)
        in_nucleus = sampling.top_p == 1 or before < sampling.top_p
        among_likeliest = sampling.top_k == 0 or rank < sampling.top_k
        if in_nucleus and among_likeliest and p[token] >= sampling.min_p * p[order[0]]:
            kept.add(token)
        before += p[token]
    return kept


@settings(deadline=None)  # the first call of torch takes long
@given(
    logits=st.lists(st.integers(-40, 40), min_size=1, max_size=40),  # tenths: some are equal
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_p=st.sampled_from([0.3, 0.8, 0.95, 1.0]),
    top_k=st.integers(0, 45),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 0.9]),
)
def test_what_is_kept_is_what_a_loop_keeps_in_its_shares(
    logits: list[int], temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    sampling = Sampling(1, temperature, top_p, top_k, min_p)
    row_V = torch.tensor(logits).float() / 10
    p = (row_V.double() / temperature).softmax(-1)
    kept = sorted(kept_by_loop(p.tolist(), sampling))
    wanted = torch.zeros_like(p)
    wanted[kept] = p[kept] / p[kept].sum()
    # float32: a softmax and sums of at most 40 terms.
    torch.testing.assert_close(probabilities(row_V[None], sampling)[0], wanted.float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("cut", "kept"),
    [
        ({"top_k": 1}, {2}),
        ({"top_k": 3}, {2, 0, 4}),
        ({"min_p": 0.4}, {2, 0}),  # of 0.4: at least 0.16
        ({"min_p": 0.2}, {2, 0, 4, 1}),
        ({"min_p": 0.2, "top_k": 2}, {2, 0}),
        ({"top_p": 0.65, "top_k": 3}, {2, 0, 4}),  # 0.6 before the third, and 0.75 before the fourth
        ({"top_p": 0.55, "min_p": 0.1}, {2, 0}),
    ],
)
def test_samples_are_of_what_is_kept_alone(cut: dict[str, float], kept: set[int]) -> None:
    p_V = torch.tensor([0.2, 0.125, 0.4, 0.0625, 0.15, 0.0625])
    seed = torch.arange(3000)
    token, logp = choose(p_V.log().expand(3000, -1), Sampling(1, **cut), seed, torch.zeros_like(seed))  # type: ignore[arg-type]
    assert set(token.tolist()) == kept
    torch.testing.assert_close(logp, p_V[token].log(), rtol=1e-5, atol=1e-6)  # of the whole distribution, float32
    for each in kept:
        share, wanted = float((token == each).float().mean()), float(p_V[each] / p_V[sorted(kept)].sum())
        assert share == pytest.approx(wanted, abs=4.5 * (0.25 / 3000) ** 0.5)  # 4.5 deviations of a count
