"""Stochastic rounding of moments: its random numbers against Random123's own, every path against the specification to the
bit, and what it is for; on the GPU where there is one, else on the CPU, and the Triton code under its interpreter."""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from gristmill import kernels
from gristmill.kernels.optim import AdamW, Origin, adamw, round_stochastically
from gristmill.kernels.optim.rounding import philox, round_reference, words

INTERPRETED = os.environ.get("GRISTMILL_KERNELS") == "gpu"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
ON_TRITON = INTERPRETED or DEVICE == "cuda"
SEED, STEP, START = 2**62 + 12_345, 77, Origin(0)
MOMENTS = ("exp_avg", "exp_avg_sq")


def bits(rounded: Tensor) -> Tensor:
    return rounded.cpu().view(torch.int16)


def rounded_of(exact: Tensor, origin: Origin = START, seed: int = SEED, step: int = STEP) -> Tensor:
    kept = torch.empty_like(exact, dtype=torch.bfloat16)
    round_stochastically([exact], [kept], seed, step, [origin])
    return kept


@pytest.mark.parametrize(
    ("counter", "key", "wanted"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_random_numbers_are_those_of_random123(
    counter: tuple[int, int, int, int], key: tuple[int, int], wanted: tuple[int, ...]
) -> None:
    """Its own known answers (kat_vectors) for philox4x32-10."""
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in philox((c0, c1, c2, c3), key)) == wanted


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("first", [0, 4, 3, 2**34 - 17, 5 * 2**32 + 2])
@pytest.mark.parametrize("count", [0, 1, 63, 1024, 20_003])
def test_every_path_rounds_as_the_specification_to_the_bit(first: int, count: int) -> None:
    """All kinds of floats, as bits come: subnormal ones, infinities, and what is no number; over the counter's carry."""
    drawn = torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(count))
    exact = drawn.to(torch.int32).view(torch.float32).to(DEVICE)
    wanted = torch.empty(count, dtype=torch.bfloat16)
    round_reference([exact.cpu()], [wanted], SEED, STEP, [Origin(9, first)])
    assert bits(rounded_of(exact, Origin(9, first))).equal(bits(wanted))


@pytest.mark.usefixtures("cpu_path")
def test_what_is_special_stays_what_it_is() -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, math.inf, -math.inf] * 50, device=DEVICE)
    assert bits(rounded_of(exact)).equal(bits(exact.to(torch.bfloat16)))  # bfloat16 numbers are kept as they are
    assert rounded_of(torch.full((300,), math.nan, device=DEVICE)).isnan().all()


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("value", [1.0 + 2**-9, -3.0 - 2**-10, 1e-40, 0.1])
def test_the_mean_of_what_it_gives_is_the_number(value: float) -> None:
    count = 1 << 16
    exact = torch.full((count,), value, device=DEVICE)
    kept = rounded_of(exact).double()
    below, above = (float(edge) for edge in (kept.min(), kept.max()))
    number = float(exact[0])
    assert below < number < above
    up = (number - below) / (above - below)
    # A mean of independent draws, five of its standard deviations: passed by a right rounding but once in two million
    allowed = 5 * (above - below) * (up * (1 - up) / count) ** 0.5
    assert abs(float(kept.mean()) - number) < allowed


@pytest.mark.usefixtures("cpu_path")
def test_small_changes_add_up_as_they_do_not_where_they_are_rounded_to_nearest() -> None:
    """An average of 1 that moves towards 0 by a thousandth a step: a quarter of what bfloat16 tells apart."""
    ends, steps = {}, 30 if INTERPRETED else 100
    for name, seed in {"nearest": None, "stochastic": 5}.items():
        m = torch.ones(4096, device=DEVICE, dtype=torch.bfloat16)
        p, g, v = torch.zeros(4096, device=DEVICE), torch.zeros(4096, device=DEVICE), torch.zeros_like(m)
        for step in range(1, steps + 1):
            how = AdamW(rate=0.0, step=step, beta1=0.999, seed=seed)
            adamw([p], [g], [m], [v], how, [Origin(0)])
        ends[name] = float(m.double().mean())
    assert INTERPRETED or ends["nearest"] == 1.0  # the interpreter cuts off
    # Each of the roundings has a variance of at most (2⁻⁸ / 2)², and 4,096 numbers are averaged
    assert abs(ends["stochastic"] - 0.999**steps) < 5 * (steps / 4096) ** 0.5 * 2**-9 < 0.1 * (1 - 0.999**steps)


def exact_case(counts: list[int]) -> dict[str, list[Tensor]]:
    """Tensors for an update with β₁ = β₂ = ½ whose unrounded moments are the same on every path: small whole numbers,
    and their halves and squares."""
    generator = torch.Generator().manual_seed(3)

    def whole(most: int) -> list[Tensor]:
        return [torch.randint(-most, most, (count,), generator=generator).float().to(DEVICE) for count in counts]

    first, second = whole(256), [t.abs() for t in whole(256)]
    moments = {name: [t.bfloat16() for t in each] for name, each in zip(MOMENTS, (first, second), strict=True)}
    return {"parameters": whole(9), "gradients": [t + 1 for t in whole(1024)], **moments}


def updated(given: dict[str, list[Tensor]], origins: list[Origin], seed: int | None = SEED) -> dict[str, list[Tensor]]:
    given = {name: [t.clone() for t in tensors] for name, tensors in given.items()}
    adamw(*given.values(), AdamW(rate=1e-2, step=STEP, beta1=0.5, beta2=0.5, seed=seed), origins)  # type: ignore[arg-type]
    return given


@pytest.mark.usefixtures("cpu_path")
def test_moments_of_an_update_are_rounded_alike_on_every_path() -> None:
    counts = [1, 300, 5_000, 17_000]
    given, origins = exact_case(counts), [Origin(0), Origin(2**32 - 1, 7), Origin(2, 2**35), Origin(3, 6)]
    ours = updated(given, origins)
    for i, (count, origin) in enumerate(zip(counts, origins, strict=True)):
        word = words(count, SEED, STEP, origin, torch.device("cpu"))
        gradient = given["gradients"][i].cpu()
        for name, half, added in zip(MOMENTS, (word & 0xFFFF, word >> 16), (gradient, gradient**2), strict=True):
            exact = 0.5 * given[name][i].cpu().float() + 0.5 * added
            lower = exact.view(torch.int32).bitwise_and(-65536).view(torch.float32)
            cut = exact.view(torch.int32).long() & 0xFFFF
            step = torch.where(cut + half >= 65536, 65536, 0).to(torch.int32)
            wanted = (lower.view(torch.int32) + step).view(torch.float32).bfloat16()
            assert bits(ours[name][i]).equal(bits(wanted))
            assert count < 300 or not bits(wanted).equal(bits(exact.bfloat16()))
    plain = updated(given, [], seed=None)
    assert all(map(torch.equal, ours["parameters"], plain["parameters"]))  # these see moments before they are rounded


@pytest.mark.usefixtures("cpu_path")
def test_parts_are_rounded_as_the_whole_in_any_grouping_of_calls() -> None:
    whole = exact_case([9_001])
    ours = updated(whole, [Origin(4)])
    edges = [0, 1, 4_099, 4_100, 9_001]
    places = list(itertools.pairwise(edges))
    cut = {name: [tensors[0][a:b] for a, b in places] for name, tensors in whole.items()}
    together = updated(cut, [Origin(4, a) for a, _ in places])
    for name in MOMENTS:
        assert bits(torch.cat(together[name])).equal(bits(ours[name][0]))
        for i, (a, _) in enumerate(places):
            alone = updated({n: [each[i]] for n, each in cut.items()}, [Origin(4, a)])
            assert bits(alone[name][0]).equal(bits(together[name][i]))


def test_threads_change_no_bit() -> None:
    given, before = exact_case([50_000, 3]), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(updated(given, [Origin(0), Origin(1)]))
    finally:
        torch.set_num_threads(before)
    for name in MOMENTS:
        assert all(bits(torch.cat(each[name])).equal(bits(torch.cat(found[0][name]))) for each in found)


@pytest.mark.usefixtures("cpu_path")
def test_seed_step_stream_and_place_each_give_other_bits_and_equal_ones_the_same() -> None:
    exact = torch.full((4096,), 1.0 + 2**-8, device=DEVICE)
    base = bits(rounded_of(exact))
    assert bits(rounded_of(exact)).equal(base)
    others = [
        rounded_of(exact, seed=SEED + 1),
        rounded_of(exact, seed=SEED - 2**40),
        rounded_of(exact, step=STEP + 1),
        rounded_of(exact, Origin(1)),
        rounded_of(exact, Origin(0, 4)),
        rounded_of(exact, Origin(0, 2**34)),
    ]
    for other in others:
        # Half the numbers change; a count of independent halves of 4,096 is within 2,048 ± 5 · 32
        assert abs(int((bits(other) != base).sum()) - 2048) < 160


def test_the_report_says_what_ran(cpu_path: str) -> None:
    here, before = "gpu" if ON_TRITON else cpu_path, kernels.report().get("round_stochastically", {})
    rounded_of(torch.zeros(3, device=DEVICE))
    assert kernels.report()["round_stochastically"][here] == before.get(here, 0) + 1
    turned = torch.zeros(3, 5, device=DEVICE).t()
    kept = torch.ones(5, 3, device=DEVICE, dtype=torch.bfloat16)
    round_stochastically([turned], [kept], SEED, STEP, [Origin(0)])
    assert not kept.any()
    there = "torch" if ON_TRITON else "cpu"
    assert kernels.report()["round_stochastically"][there] == before.get(there, 0) + (2 if there == here else 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"origins": []}, ValueError, "length of origins is 0; wanted 1"),
        ({"origins": None}, ValueError, "length of origins is None; wanted 1: a seed was given"),
        ({"gradients": [torch.zeros(4).double()]}, TypeError, r"dtype of gradients\[0\] is torch.float64; wanted"),
        ({"exp_avg": [torch.zeros(4)]}, TypeError, r"dtype of moments\[0\] is torch.float32; wanted torch.bfloat16"),
        ({"seed": 2**63}, ValueError, "seed is 9223372036854775808; wanted 0 to"),
        ({"seed": -1}, ValueError, "seed is -1; wanted 0 to"),
        ({"step": 2**32}, ValueError, "step is 4294967296; wanted 0 to"),
        ({"origins": [Origin(2**32)]}, ValueError, r"an origin is Origin\(stream=4294967296"),
        ({"origins": [Origin(0, -1)]}, ValueError, r"an origin is Origin\(stream=0, first=-1"),
    ],
)
def test_bad_arguments_of_an_update_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    half = torch.zeros(4, dtype=torch.bfloat16)
    given = {"parameters": [torch.zeros(4)], "gradients": [torch.zeros(4)], "exp_avg": [half], "exp_avg_sq": [half]}
    given |= {"seed": 1, "step": 1, "origins": [Origin(0)], **change}
    seed, step, origins = given.pop("seed"), given.pop("step"), given.pop("origins")
    with pytest.raises(error, match=message):
        adamw(*given.values(), AdamW(rate=1e-2, step=step, seed=seed), origins)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rounded": []}, ValueError, "length of rounded is 0; wanted 1"),
        ({"rounded": [torch.zeros(3, dtype=torch.bfloat16)]}, ValueError, r"shape and device of rounded\[0\]"),
        ({"rounded": [torch.zeros(4)]}, TypeError, r"dtype of rounded\[0\] is torch.float32; wanted torch.bfloat16"),
        ({"exact": [torch.zeros(4).half()]}, TypeError, r"dtype of exact\[0\] is torch.float16; wanted torch.float32"),
        ({"origins": []}, ValueError, "length of origins is 0; wanted 1"),
    ],
)
def test_bad_arguments_of_a_rounding_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"exact": [torch.zeros(4)], "rounded": [torch.zeros(4, dtype=torch.bfloat16)]}
    with pytest.raises(error, match=message):
        round_stochastically(**{**given, "seed": 1, "step": 1, "origins": [Origin(0)], **change})
