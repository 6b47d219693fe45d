"""What does not fit is refused by every operation and named: each tensor on another device, of another dtype or shape.

On a CPU, where a wrong one that went on to compiled code would be read beside its memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gristmill.kernels.cross_entropy import (
    linear_cross_entropy_mean,
    linear_log_probs,
    linear_log_probs_and_entropy,
)
from gristmill.kernels.decoder_layers import DecoderLayers, LayerWeights, MtpWeights, Shape, joined
from gristmill.kernels.fp8_gemm import (
    fp8_feed_forward,
    fp8_gemm,
    fp8_grouped_gemm,
    fp8_linear,
    fp8_weight_gradient,
    quantise_blocks,
    quantise_columns,
    quantise_rows,
    swiglu_quantise,
)
from gristmill.kernels.grouped_gemm import grouped_gemm
from gristmill.kernels.likeliest import likeliest
from gristmill.kernels.linear import linear
from gristmill.kernels.mla_attention import attention, latent_attention
from gristmill.kernels.mla_decode import mla_decode
from gristmill.kernels.moe_mlp import moe_mlp
from gristmill.kernels.norm_rope import add_rms_norm, rms_norm, rotate, rotate_halves
from gristmill.kernels.optim import AdamW, Origin, adamw, orthogonalised, round_stochastically
from gristmill.kernels.router import Choice, route
from gristmill.kernels.swiglu import swiglu

E4M3 = torch.float8_e4m3fn
SHAPE = Shape(
    width=4, heads=2, plain=2, turning=2, value=3, latent=5, query_rank=0, experts=0, choice=Choice(1), eps=1e-6,
    latent_eps=1e-6, scale=0.5,
)  # fmt: skip


class Case(NamedTuple):
    """An operation, and tensors that fit by the names of its arguments.

    `shown` are the names in messages that are others; of the tensors in `wide` any last dimension is right, and of
    those in `deep` any further dimension.
    """

    call: Callable[..., Any]
    tensors: dict[str, Tensor]
    shown: dict[str, str] = {}  # noqa: RUF012
    wide: tuple[str, ...] = ()
    deep: tuple[str, ...] = ()


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def whole(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def with_angles(operation: Callable[..., Any], **given: Any) -> Callable[..., Any]:
    """Of an operation that takes cosines and sines as a pair."""
    return lambda cosines, sines, **tensors: operation(rotary=(cosines, sines), **given, **tensors)


def lists(operation: Callable[..., Any], **given: Any) -> Callable[..., Any]:
    """Of an operation that takes lists of tensors."""
    return lambda **tensors: operation(**{name: [t.clone()] for name, t in tensors.items()}, **given)


def through(**tensors: Tensor) -> Any:
    n = SHAPE
    layer = LayerWeights(
        draw(n.width), draw(n.heads * (n.plain + n.turning) + n.latent + n.turning, n.width), None, None,
        draw(n.latent), draw(n.heads, n.plain + n.value, n.latent), draw(n.width, n.heads * n.value), draw(n.width),
        draw(2 * 6, n.width), draw(n.width, 6),
    )  # fmt: skip
    turn = draw(9, n.turning // 2).cos(), draw(9, n.turning // 2).sin()
    return DecoderLayers([layer], n, turn, (draw(n.width), draw(7, n.width))).through(**tensors)


def begun(hidden_BSD: Tensor, embedding_BSD: Tensor, norm_D: Tensor, **weights: Tensor) -> Tensor:
    return joined(hidden_BSD, embedding_BSD, norm_D, MtpWeights(**weights), 1e-6)


EXPERT = whole(0, 1, 2, 0, 1, 2, 0, 2).view(4, 2)
HEADS = {"q_BSHN": draw(2, 3, 4, 4), "k_BSGN": draw(2, 3, 2, 4), "v_BSGW": draw(2, 3, 2, 5)}
LATENTS = {
    "q_BSHQ": draw(2, 3, 4, 6), "kv_BSHX": draw(2, 3, 4, 9), "key_BSR": draw(2, 3, 2),
    "cosines": draw(2, 3, 1), "sines": draw(2, 3, 1),
}  # fmt: skip
FIRST, MASK = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, 3, dtype=torch.bool)
DECODED = {
    "q_BSHQ": draw(2, 1, 3, 6), "kv_BSY": draw(2, 1, 7), "cache_BPC": draw(2, 4, 7), "start_B": whole(0, 3),
    "cosines": draw(2, 1, 1), "sines": draw(2, 1, 1), "norm_C": draw(5), "up_HXC": draw(3, 7, 5),
}  # fmt: skip
TARGETED = {"x_TD": draw(3, 4), "w_VD": draw(6, 4), "target_T": whole(0, 5, 2)}
SCALED = {"x_NK": draw(2, 256).to(E4M3), "x_scale_NC": draw(2, 2)}
SIDES = {
    "grad_MP": draw(128, 256).to(E4M3), "grad_scale_MQ": draw(128, 2), "x_KP": draw(128, 256).to(E4M3),
    "x_scale_KQ": draw(128, 2), "ends_E": whole(1, 2),
}  # fmt: skip
OF_SCALES = {"x_scale_NC": "scales of x_NK", "w_scale_BC": "scales of w_MK", "w_scale_EBC": "scales of w_EMK"}
ONE_ORIGIN = [Origin(0)]
CASES = {
    "linear": Case(
        linear, {"x": draw(2, 3, 4), "w_MK": draw(5, 4), "bias_M": draw(5)}, deep=("x",)
    ),
    "route": Case(
        partial(route, how=Choice(2)), {"x_TD": draw(4, 3), "weight_ED": draw(5, 3), "bias_E": draw(5)}
    ),
    "rms_norm": Case(partial(rms_norm, eps=1e-6), {"x": draw(2, 4), "weight_D": draw(4)}, deep=("x",)),
    "add_rms_norm": Case(partial(add_rms_norm, eps=1e-6), {"x": draw(2, 4), "y": draw(2, 4), "weight_D": draw(4)}),
    "rotate": Case(rotate, {"x": draw(2, 3, 4), "cos": draw(2, 1, 2), "sin": draw(2, 1, 2)}),
    "rotate_halves": Case(rotate_halves, {"x": draw(2, 3, 4), "cos": draw(2, 3, 2), "sin": draw(2, 3, 2)}),
    "swiglu": Case(swiglu, {"gate_up": draw(2, 6)}, deep=("gate_up",)),
    "likeliest": Case(likeliest, {"logits": draw(2, 6)}, wide=("logits",), deep=("logits",)),
    "orthogonalised": Case(
        orthogonalised, {"matrices": draw(3, 4)}, {"matrices": "orthogonalised"}, ("matrices",), ("matrices",)
    ),
    "grouped_gemm": Case(grouped_gemm, {"x_NK": draw(4, 3), "w_EMK": draw(2, 5, 3), "ends_E": whole(1, 4)}),
    "moe_mlp": Case(
        moe_mlp,
        {
            "x_TD": draw(4, 5), "expert_TK": EXPERT, "gate_TK": draw(4, 2), "gate_up_E2FD": draw(3, 8, 5),
            "down_EDF": draw(3, 5, 4), "load_E": EXPERT.flatten().bincount(),
            "order_M": EXPERT.flatten().argsort(stable=True),
        },
    ),
    "attention": Case(partial(attention, scale=0.5), {**HEADS, "mask_BSS": MASK}, wide=("v_BSGW",)),
    "attention, packed": Case(partial(attention, scale=0.5), {**HEADS, "first_BS": FIRST}, wide=("v_BSGW",)),
    "latent_attention": Case(
        with_angles(latent_attention, scale=0.5), {**LATENTS, "mask_BSS": MASK}, wide=("q_BSHQ", "kv_BSHX")
    ),
    "latent_attention, packed": Case(
        with_angles(latent_attention, scale=0.5), {**LATENTS, "first_BS": FIRST}, wide=("q_BSHQ", "kv_BSHX")
    ),
    "mla_decode": Case(with_angles(mla_decode, reach=4, eps=1e-6, scale=0.5), DECODED, wide=("q_BSHQ",)),
    "mla_decode, paged": Case(
        with_angles(mla_decode, reach=4, eps=1e-6, scale=0.5),
        {**DECODED, "cache_BPC": draw(3, 4, 7), "table_BJ": whole(2, 0).view(2, 1)}, wide=("q_BSHQ", "table_BJ"),
    ),
    "linear_cross_entropy_mean": Case(linear_cross_entropy_mean, {**TARGETED, "weight_T": draw(3)}),
    "linear_log_probs": Case(linear_log_probs, TARGETED),
    "linear_log_probs_and_entropy": Case(linear_log_probs_and_entropy, TARGETED),
    "quantise_rows": Case(quantise_rows, {"x_NK": draw(2, 256)}),
    "quantise_columns": Case(quantise_columns, {"x_NK": draw(2, 256), "ends_E": whole(1, 2)}),
    "quantise_blocks": Case(quantise_blocks, {"w_EMK": draw(2, 128, 256)}),
    "swiglu_quantise": Case(swiglu_quantise, {"x_NG": draw(2, 256)}),
    "fp8_gemm": Case(
        fp8_gemm, {**SCALED, "w_MK": draw(128, 256).to(E4M3), "w_scale_BC": draw(1, 2)}, OF_SCALES
    ),
    "fp8_grouped_gemm": Case(
        fp8_grouped_gemm,
        {**SCALED, "w_EMK": draw(2, 128, 256).to(E4M3), "w_scale_EBC": draw(2, 1, 2), "ends_E": whole(0, 2)}, OF_SCALES,
    ),
    "fp8_weight_gradient": Case(
        fp8_weight_gradient, SIDES,
        {"grad_scale_MQ": "scales of grad_MP", "x_scale_KQ": "scales of x_KP"}, wide=("ends_E",),
    ),
    "fp8_linear": Case(fp8_linear, {"x_NK": draw(2, 100), "w_MK": draw(130, 100)}),
    "fp8_feed_forward": Case(
        fp8_feed_forward,
        {"x_MD": draw(3, 5), "gate_up_EGD": draw(2, 8, 5), "down_EDF": draw(2, 5, 4), "ends_E": whole(1, 3)},
    ),
    "adamw": Case(
        lists(adamw, how=AdamW(1e-3, 1)),
        {"parameters": draw(3), "gradients": draw(3), "exp_avg": draw(3), "exp_avg_sq": draw(3).abs()},
    ),
    "round_stochastically": Case(
        lists(round_stochastically, seed=1, step=1, origins=ONE_ORIGIN),
        {"exact": draw(3), "rounded": draw(3, dtype=torch.bfloat16)},
    ),
    "DecoderLayers.through": Case(
        through,
        {
            "x_BSD": draw(2, 1, 4), "start_B": whole(0, 5), "cache_LBPC": draw(1, 2, 6, 7), "asked_B": whole(0, 0),
        },
    ),
    "DecoderLayers.through, paged": Case(
        through,
        {
            "x_BSD": draw(2, 1, 4), "start_B": whole(0, 5), "cache_LBPC": draw(1, 3, 6, 7),
            "table_BJ": whole(2, 0).view(2, 1),
        },
        wide=("table_BJ",),
    ),
    "joined": Case(
        begun,
        {
            "hidden_BSD": draw(2, 1, 4), "embedding_BSD": draw(2, 1, 4), "norm_D": draw(4), "hidden_norm_D": draw(4),
            "embedding_norm_D": draw(4), "join_DX": draw(4, 8),
        },
    ),
}  # fmt: skip
COMPILED = ("DecoderLayers.through", "DecoderLayers.through, paged", "joined")
COMPILES = any(map(shutil.which, ("c++", "g++", "clang++")))


def each(*, wide: bool = True, deep: bool = True) -> Iterator[Any]:
    """Each tensor of each case; without those that fit in any width, or with any further dimensions."""
    for operation, case in CASES.items():
        for name in case.tensors:
            if (wide or name not in case.wide) and (deep or name not in case.deep):
                yield pytest.param(operation, name, id=f"{operation}: {name}")


def refused(operation: str, name: str, wrong: Tensor, error: Any) -> str:
    """What is said of a call with one wrong tensor, which names the operation."""
    case = CASES[operation]
    tensors = {other: t.clone() for other, t in case.tensors.items()} | {name: wrong}
    with pytest.raises(error) as raised:
        case.call(**tensors)
    return str(raised.value)


def named(operation: str, *names: str) -> list[str]:
    return [CASES[operation].shown.get(name, name) for name in names]


@pytest.mark.parametrize("operation", CASES)
def test_what_is_changed_below_fits_as_it_is(operation: str) -> None:
    if operation in COMPILED and not COMPILES:
        pytest.skip("there is no C++ compiler")
    CASES[operation].call(**{name: t.clone() for name, t in CASES[operation].tensors.items()})


@pytest.mark.parametrize(("operation", "name"), each())
def test_a_tensor_on_another_device(operation: str, name: str) -> None:
    """It is named; of the first argument, which the others are held against, the device is."""
    case = CASES[operation]
    others = [other for other in case.tensors if other != name]
    if not others:
        pytest.skip("there is none beside it")
    said = refused(operation, name, case.tensors[name].to("meta"), (ValueError, TypeError))
    assert "meta" in said
    first = next(iter(case.tensors))
    assert any(shown in said for shown in named(operation, name, *(others if name == first else ())))


@pytest.mark.parametrize(("operation", "name"), each())
def test_a_tensor_of_another_dtype(operation: str, name: str) -> None:
    tensor = CASES[operation].tensors[name]
    floating = tensor.dtype.is_floating_point and tensor.dtype != E4M3
    said = refused(operation, name, tensor.to(torch.int64 if floating else torch.float32), TypeError)
    assert str(torch.int64 if floating else torch.float32) in said
    first = next(iter(CASES[operation].tensors))
    others = CASES[operation].tensors if name == first else ()
    assert any(shown in said for shown in named(operation, name, *others))


@pytest.mark.parametrize(("operation", "name"), each(deep=False))
def test_a_tensor_of_another_rank(operation: str, name: str) -> None:
    tensor = CASES[operation].tensors[name]
    for wrong in (tensor[None], tensor[0]):
        said = refused(operation, name, wrong.clone(), ValueError)
        first = next(iter(CASES[operation].tensors))
        others = CASES[operation].tensors if name == first else ()
        assert any(shown in said for shown in named(operation, name, *others)), said


@pytest.mark.parametrize(("operation", "name"), each(wide=False))
def test_a_tensor_of_another_width(operation: str, name: str) -> None:
    """Sizes that do not agree are named by one of the two."""
    tensor = CASES[operation].tensors[name]
    wrong = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1).to(tensor.dtype)
    said = refused(operation, name, wrong, ValueError)
    assert any(shown in said for shown in named(operation, *CASES[operation].tensors)), said


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"affinity": "tanh"}, "Choice: affinity is 'tanh'; wanted 'sigmoid' or 'softmax'"),
        ({"groups": 0}, "Choice: groups is 0; wanted 1 or more"),
        ({"groups_allowed": 0}, "Choice: groups_allowed is 0; wanted 1 or more"),
        ({"chosen": 0}, "Choice: chosen is 0; wanted 1 or more"),
    ],
)
def test_a_choice_that_is_none(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Choice(**{"chosen": 2, **how})


@pytest.mark.parametrize(
    ("operation", "change", "message"),
    [
        ("rotate", {"cos": draw(3, 1, 2), "sin": draw(3, 1, 2)}, r"shape of cos is \(3, 1, 2\); wanted dimensions that"),
        ("linear_cross_entropy_mean", {"weight_T": draw(3, 1)}, r"shape of weight_T is \(3, 1\); wanted \(3,\)"),
        ("fp8_weight_gradient", {"ends_E": whole(2, 1)}, r"ends_E is \[2, 1\]; wanted ascending ends"),
        ("fp8_feed_forward", {"ends_E": whole(1, 2)}, "fp8_feed_forward: last of ends_E is 2; wanted the 3 rows of x_MD"),
        ("quantise_columns", {"ends_E": whole()}, "quantise_columns: groups is 0; wanted some, for 2 rows"),
        ("DecoderLayers.through, paged", {"table_BJ": whole(2).view(1, 1)}, "rows of table_BJ is 1; wanted 2"),
        ("joined", {"join_DX": draw(8, 4).t()}, r"joined: join_DX is \(1, 4\); wanted contiguous"),
    ],
)  # fmt: skip
def test_what_went_on_unseen(operation: str, change: dict[str, Tensor], message: str) -> None:
    change = {name: t.long() if not t.numel() else t for name, t in change.items()}
    with pytest.raises(ValueError, match=message):
        CASES[operation].call(**{name: t.clone() for name, t in CASES[operation].tensors.items()} | change)


def test_targets_of_fewer_bits() -> None:
    x, w, target = TARGETED.values()
    for dtype in (torch.int32, torch.int16):
        narrow = target.to(dtype)
        assert linear_log_probs(x, w, narrow).equal(linear_log_probs(x, w, target))
        assert linear_cross_entropy_mean(x, w, narrow, draw(3)).equal(linear_cross_entropy_mean(x, w, target, draw(3)))
