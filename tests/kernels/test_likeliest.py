"""The likeliest token and its log-probability, against float64, on both paths of a CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.kernels.likeliest import likeliest

pytestmark = pytest.mark.usefixtures("cpu_path")


@given(rows=st.integers(1, 5), columns=st.integers(1, 200), spread=st.sampled_from([0.1, 5.0, 100.0]))
@settings(max_examples=60, deadline=None)
def test_against_float64(rows: int, columns: int, spread: float) -> None:
    logits = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(columns)) * spread
    token, log_p = likeliest(logits)
    assert torch.equal(token, logits.argmax(-1))
    wanted = logits.double().log_softmax(-1).gather(-1, token[..., None])[..., 0]
    # float32 exponentials and their sum; torch's own also rounds the difference of two numbers of the logits' size
    torch.testing.assert_close(log_p.double(), wanted, atol=1e-6 + 2**-23 * 3 * spread, rtol=1e-5)


def test_the_first_of_equals_what_is_left_out_and_what_is_no_number() -> None:
    low, nan = -torch.inf, torch.nan
    rows = [[1.0, 3.0, 3.0, low], [low, low, 2.0, low], [1.0, nan, 5.0, nan], [low] * 4, [1.0, -low, 2.0, -low]]
    logits = torch.tensor([row * 9 for row in rows])
    token, log_p = likeliest(logits)
    assert token.tolist() == [1, 2, 1, 0, 1]
    assert log_p[:2].tolist() == pytest.approx(logits[:2].double().log_softmax(-1).max(-1).values.tolist(), abs=1e-6)
    assert log_p[2:].isnan().all()


def test_many_rows_in_several_threads() -> None:
    logits = torch.randn(300, 500, generator=torch.Generator().manual_seed(0))
    token, log_p = likeliest(logits)
    assert all(map(torch.equal, likeliest(logits), (token, log_p)))  # two runs give equal bits
    one = [likeliest(row) for row in logits]
    assert token.tolist() == [int(t) for t, _ in one]
    torch.testing.assert_close(log_p, torch.stack([p for _, p in one]), atol=1e-6, rtol=0)


def test_nothing_to_choose_from_is_refused() -> None:
    with pytest.raises(ValueError, match="likeliest: shape"):
        likeliest(torch.zeros(3, 0))
