"""Experts and sequences over ranks against one rank, on gloo; `parallel_ranks.py` is what the ranks do."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from gristmill.kernels.compiled import compiled
from gristmill.kernels.mla_attention.native import SOURCE
from gristmill.model.config import ModelConfig
from gristmill.model.training.layout import Layout, expert_bytes, sequence_bytes
from gristmill.model.training.sequence_parallel import (
    split_sequence,
)
from gristmill.model.transformer import (
    MixtureOfExperts,
    Routing,
    token_behind,
)
from tests.model import parallel_ranks as ranks_of
from tests.model.parallel_ranks import (
    ATTENTIONS,
    CASES,
    GQA,
    LENGTH,
    LONG,
    ROUNDED,
    SEQUENCES,
    SMALL,
    TRAINED,
    Case,
    attended,
    attention,
    attention_inputs,
    balanced,
    choices_of,
    expert_inputs,
    long_step,
    loss_of,
    scores,
    through,
    train,
    whole_batch,
    whole_experts,
)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return started(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return started(4, tmp_path_factory.mktemp("four"))


def started(ranks: int, folder: Path) -> Path:
    """Run all that is done on so many ranks, each of one thread."""
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-P", ranks_of.__file__, str(ranks), str(folder)]
    ran = subprocess.run(command, env=alone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    assert ran.returncode == 0, ran.stdout.decode()[-4000:]
    return folder


def results(folder: Path, name: str, ranks: int) -> list[dict[str, Tensor]]:
    return [load_file(folder / f"{name}-{rank}.safetensors") for rank in range(ranks)]


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_one_rank(name: str, request: pytest.FixtureRequest) -> None:
    case = CASES[name]
    found = results(request.getfixturevalue("two" if case.ranks == 2 else "four"), name, case.ranks)
    model, routing = case.transformer(), Routing()
    with choices_of(model) as choices:
        loss = loss_of(model, whole_batch(case), routing)
    loss.backward()
    # float32, losses of some dozens of terms of order one: a few ulp; gradients: sums of up to 64 positions, of which
    # each went through a dozen products of length up to 64, in another order, so about a hundred ulp of the largest.
    assert all(torch.allclose(f["loss"], loss.detach(), rtol=2e-6) for f in found)
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        gradient = assembled([f"gradient/{key}", f"range/{key}"], parameter, found, case)
        difference = (gradient - parameter.grad).abs().max()
        assert difference <= 1e-5 * parameter.grad.abs().max() + 1e-9, (key, float(difference))
    for i, choice in enumerate(choices):
        assert torch.equal(in_order([f[f"choice/{i}"] for f in found], case), choice.view(SEQUENCES, LENGTH, -1))
        assert torch.equal(torch.stack([f[f"load/{i}"] for f in found]).sum(0), routing.load_LE[i])
    balance = torch.stack([f["balance"] for f in found]).mean()
    assert torch.allclose(balance, torch.stack(routing.balance_loss).sum().detach(), rtol=2e-6)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over that of `theirs`."""
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("name", ROUNDED)
def test_a_rounded_step_is_near_that_of_one_rank(name: str, two: Path) -> None:
    """A gradient of one rank is off float32's by some forty errors of random sign, six times one of them in bfloat16
    and, whose tiles are scaled by their largest, half of that in fp8 (test_precision.py). Ranks round at the same
    places, but sums over them once more, and tiles of other rows and heads; so they are off each other by no more. What
    is wrong (a scale, a transposition, another head's numbers) is off by the whole gradient."""
    case = ROUNDED[name]
    found, model, routing = results(two, name, 2), case.transformer(), Routing()
    loss = loss_of(model, whole_batch(case), routing)
    loss.backward()
    rounding, many = {"bfloat16": (2.0**-9, 6), "fp8": (2.0**-4, 3)}[case.precision]
    assert all(float(f["loss"]) == pytest.approx(float(loss.detach()), rel=rounding / 10) for f in found)
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        gradient = assembled([f"gradient/{key}", f"range/{key}"], parameter, found, case)
        assert gradient.dtype == torch.float32, key
        apart = float((gradient - parameter.grad).norm() / parameter.grad.norm())
        assert apart <= many * rounding, (key, apart)


def assembled(keys: list[str], parameter: Tensor, found: list[dict[str, Tensor]], case: Case) -> Tensor:
    """A gradient from its pieces; every copy of a piece, and of a whole, is the same to the bit."""
    if ".experts." not in keys[0] or case.experts == 1:
        assert all(torch.equal(f[keys[0]], found[0][keys[0]]) for f in found)
        return found[0][keys[0]]
    whole = torch.full((parameter.numel(),), torch.nan)
    for rank, f in enumerate(found):
        start, stop = f[keys[1]].tolist()
        whole[start:stop] = f[keys[0]].reshape(-1)
        assert torch.equal(f[keys[0]], found[rank % case.experts][keys[0]])
    return whole.view_as(parameter)


def in_order(parts: list[Tensor], case: Case) -> Tensor:
    """What each rank found for its tokens, as (sequences, positions, …)."""
    size, count = case.sequence, SEQUENCES // case.layout.data_parallel
    rows = [part.view(count, LENGTH // size, -1) for part in parts]
    return torch.cat([torch.cat(rows[first : first + size], 1) for first in range(0, case.ranks, size)])


def test_the_steered_cases_are_what_they_are_called(two: Path) -> None:
    loads = {
        name: torch.stack([f[f"load/{0}"] for f in results(two, name, 2)]).sum(0)
        for name in ("experts-of-one-rank", "experts-idle")
    }
    assert (loads["experts-of-one-rank"][:2] == 0).all()
    assert (loads["experts-idle"][1:3] == 0).all()


@pytest.mark.parametrize("name", expert_inputs())
def test_experts_apart_compute_what_they_do_together(name: str, two: Path) -> None:
    x, choice, gate = expert_inputs()[name]
    found = results(two, "exact-experts", 2)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 2**-7)):
        # float64: sums of at most 48 terms of order ten. bfloat16: products and sums are those of one rank, rounded at
        # the same places, but a library may sum another number of rows in another order: one ulp of what is summed up.
        whole = through(whole_experts(dtype), x.to(dtype), choice, gate.to(dtype))
        for key, expected in whole.items():
            parts = torch.cat([f[f"{dtype}/{name}/{key}"] for f in found])
            torch.testing.assert_close(parts, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_over_parts_is_that_of_whole_sequences(name: str, masked: bool, two: Path) -> None:
    found = results(two, "exact-attention", 2)
    x, batch = attention_inputs(masked)
    for key, expected in attended(attention(name), x, batch).items():
        parts = [f[f"{name}/{masked}/{key}"] for f in found]
        whole = torch.cat(parts, 1) if key in ("out", "x") else parts[0] + parts[1]
        # float64, sums of at most 64 positions.
        torch.testing.assert_close(whole, expected, rtol=1e-11, atol=1e-12 * float(expected.abs().max()))


def test_the_balance_loss_is_that_of_whole_sequences(two: Path) -> None:
    found = results(two, "exact-attention", 2)
    score, choice = scores()
    expected = balanced(MixtureOfExperts(SMALL), score, choice)
    for f in found:
        torch.testing.assert_close(f["balance/out"], expected["out"], rtol=1e-12, atol=0.0)
    parts = [f["balance/x"].view(SEQUENCES, LENGTH // 2, -1) for f in found]
    whole = torch.cat(parts, 1).flatten(0, 1) / 2  # each rank has the loss once: the mean over ranks is the loss
    torch.testing.assert_close(whole, expected["x"], rtol=1e-11, atol=1e-14)


def test_a_long_sequence_of_documents_makes_nothing_of_all_pairs_of_positions(two: Path) -> None:
    if compiled(SOURCE) is None:
        pytest.skip("torch's own attention takes a mask")
    found, whole = results(two, "long", 2), long_step(None)
    for one in (*found, whole):
        assert 0 < int(one.pop("largest")) < LONG**2 / 8  # bytes of a mask of bits; rows of experts have 3/4 of that
    # float32, sums of thousands of terms in another order: a few ulp of the loss, some hundred of the largest gradient.
    loss = (found[0].pop("loss") + found[1].pop("loss")) / 2
    assert torch.allclose(loss, whole.pop("loss"), rtol=2e-6)
    for key, gradient in whole.items():
        difference = (found[0][key] - gradient).abs().max()
        assert difference <= 3e-5 * gradient.abs().max() + 1e-9, (key, float(difference))


@pytest.mark.parametrize("name", TRAINED)
def test_twenty_steps_are_those_of_one_rank(name: str, two: Path) -> None:
    found, case = results(two, f"trained-{name}", 2), CASES[name]
    model = case.transformer()
    losses = train(model, case, lambda batch: batch, None)
    assert losses[-1] < losses[0] - 1
    # float32, sums in another order: a few ulp a step, which twenty steps of Muon and AdamW hardly let grow.
    torch.testing.assert_close(found[0]["loss"], losses, rtol=1e-5, atol=0.0)
    for key in found[0]:
        if ".experts." not in key or case.experts == 1:
            assert torch.equal(found[0][key], found[1][key]), key


def test_bytes_sent_are_those_stated(two: Path) -> None:
    found = results(two, "bytes", 2)
    for name, more in (
        ("mla", {}),
        ("gqa", {**GQA, "num_key_value_heads": 2}),
        ("one", {**GQA, "num_key_value_heads": 1}),
    ):
        config = ModelConfig.model_validate({**SMALL.model_dump(), **more, "num_experts_per_tok": 4})
        tokens = SEQUENCES * LENGTH // 2
        stated = [each(config, Layout(2, 2, 2), tokens, 4) for each in (expert_bytes, sequence_bytes)]
        assert [int(f[name]) for f in found] == [sum(stated)] * 2


@given(cut=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 2**16), share=st.floats(0.1, 3))
def test_parts_of_a_batch_weigh_what_the_whole_does(cut: int, seed: int, share: float) -> None:
    """The mean over parts of their means, times their shares, is the mean over all positions times the share."""
    generator = torch.Generator().manual_seed(seed)
    batch = whole_batch(Case(2))
    weight = torch.rand(SEQUENCES, LENGTH, generator=generator) * (torch.rand(LENGTH, generator=generator) > 0.5)
    batch = replace(batch, weight_BS=weight, share=share, next_share=share / 2)
    loss_BS = torch.rand(SEQUENCES, LENGTH, generator=generator, dtype=torch.float64)

    def mean(weight: Tensor, loss: Tensor, target: Tensor) -> Tensor:
        counted = weight.double() * (target >= 0)
        return (counted * loss).sum() / counted.sum().clamp_min(1e-9)

    parts, size = [split_sequence(batch, rank, cut) for rank in range(cut)], LENGTH // cut
    for name, whole_share in (("target_BS", "share"), ("next_target_BS", "next_share")):
        means = [
            mean(p.weight_BS, loss_BS[:, i * size : (i + 1) * size], getattr(p, name)[:, :size])
            * getattr(p, whole_share)
            for i, p in enumerate(parts)
        ]
        expected = mean(weight, loss_BS, getattr(batch, name)) * getattr(batch, whole_share)
        torch.testing.assert_close(torch.stack(means).mean(), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.cat([p.inputs.token_BS for p in parts], 1), batch.inputs.token_BS)
    assert all(p.inputs.first_BS is batch.inputs.first_BS for p in parts)


@pytest.mark.parametrize("cut", [2, 4, 16])
def test_parts_know_the_targets_of_every_module(cut: int) -> None:
    """Also of modules that predict what lies two parts further on."""
    whole, size = whole_batch(Case(2)), LENGTH // cut
    parts = [split_sequence(whole, rank, cut) for rank in range(cut)]
    expected, found = whole.next_target_BS, [p.next_target_BS for p in parts]
    for _ in range(4):
        assert expected is not None
        assert torch.equal(torch.cat([f[:, :size] for f in found if f is not None], 1), expected)
        expected, found = token_behind(expected), [token_behind(f) for f in found if f is not None]


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence_length 16 does not divide among 3 ranks"):
        split_sequence(whole_batch(Case(2)), 0, 3)
