"""Which implementation runs, what is said of a fallback, and when numbers are looked at."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from gristmill import kernels
from gristmill.kernels import dispatch
from gristmill.kernels.cross_entropy import linear_cross_entropy_mean, linear_log_probs
from gristmill.kernels.fp8_gemm import (
    fp8_feed_forward,
    fp8_grouped_gemm,
    fp8_weight_gradient,
    quantise_columns,
    quantise_rows,
)
from gristmill.kernels.grouped_gemm import grouped_gemm
from gristmill.kernels.likeliest import likeliest
from gristmill.kernels.linear import linear
from gristmill.kernels.mla_attention import attention, latent_attention
from gristmill.kernels.mla_decode import mla_decode
from gristmill.kernels.moe_mlp import moe_mlp
from gristmill.kernels.norm_rope import WIDEST, add_rms_norm, rms_norm, rotate
from gristmill.kernels.optim import AdamW, Origin, adamw, orthogonalised, round_stochastically
from gristmill.kernels.router import Choice, route
from gristmill.kernels.swiglu import swiglu

pytestmark = pytest.mark.skipif(os.environ.get("GRISTMILL_KERNELS") is not None, reason="of a choice without a switch")
BFLOAT16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def said_by(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "gristmill.kernels"]


@pytest.fixture
def _unsaid(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As if nothing had been said yet."""
    monkeypatch.setattr(dispatch, "_said", set())
    caplog.set_level(logging.WARNING, "gristmill.kernels")


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of this CPU are taken for those of a GPU; what has no code in Triton for them runs in torch here too."""
    monkeypatch.setattr(dispatch, "_for_gpu", lambda x: True)


@pytest.mark.usefixtures("_unsaid")
def test_a_device_without_an_implementation_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.ones(2, 4, device="meta")
    before = kernels.report().get("swiglu", {}).get("reference", 0)
    for _ in range(2):
        assert swiglu(x).shape == (2, 2)
    assert kernels.report()["swiglu"]["reference"] == before + 2
    assert said_by(caplog) == ["swiglu has no implementation for device meta: the reference runs"]


OF_A_CPU: dict[str, tuple[Callable[[], Any], str]] = {
    "linear": (lambda: linear(draw(96, 4, dtype=BFLOAT16), draw(5, 4, dtype=BFLOAT16)), "float32 and a contiguous w_MK"),
    "linear of strides": (lambda: linear(draw(96, 4), draw(4, 5).t()), "float32 and a contiguous w_MK"),
    "router": (
        lambda: route(draw(3, 4), draw(4, 5).t(), draw(5), Choice(2)), "float32, and on a CPU a contiguous weight_ED"
    ),
    "swiglu": (lambda: swiglu(draw(3, 4, dtype=BFLOAT16)), "float32"),
    "rms_norm": (lambda: rms_norm(draw(3, 4).double(), draw(4).double(), 0.0), "float32"),
    "rotate": (lambda: rotate(draw(3, 4), draw(3, 2).double(), draw(3, 2).double()), "angles in float32"),
    "attention": (lambda: attention(*(draw(1, 2, 2, 8, dtype=BFLOAT16) for _ in range(3)), 0.5), "float32"),
    "likeliest": (lambda: likeliest(draw(3, 4, dtype=BFLOAT16)), "float32"),
    "orthogonalised": (lambda: orthogonalised(draw(3, 4).double()), "float32"),
    "adamw": (lambda: adamw(*([draw(4, 3).abs().t()] for _ in range(4)), AdamW(1e-3, 1)), "contiguous on one device"),
    "mla_decode": (lambda: decode(draw(2, 4, 14)[..., ::2]), "operands whose numbers lie side by side"),
}  # fmt: skip


def decode(cache: Tensor, dtype: torch.dtype = torch.float32, start: Tensor | None = None, **more: Any) -> Tensor:
    """Two rows of one token each, with latents of five numbers."""
    on, sizes = cache.device, ((2, 1, 3, 6), (2, 1, 7), (5,), (3, 7, 5))
    q, kv, norm, up = (torch.ones(size, dtype=dtype, device=on) for size in sizes)
    angle = torch.ones(2, 1, 1, device=on)
    start = torch.arange(0, 6, 3, device=on) if start is None else start
    return mla_decode(q, kv, cache.to(dtype), start, 4, (angle, angle), norm, 1e-6, up, 0.5, **more)


@pytest.mark.usefixtures("_unsaid")
@pytest.mark.skipif(dispatch.compiled("linear/cpu.cpp") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("name", OF_A_CPU)
def test_a_fallback_on_a_cpu_is_said_once_with_its_reason(name: str, caplog: pytest.LogCaptureFixture) -> None:
    call, reason = OF_A_CPU[name]
    call()
    call()
    (said,) = said_by(caplog)
    assert said.startswith(f"{name.split()[0]} runs in torch's own operations on cpu, here of torch.")
    assert reason in said.split(": code of ours takes ")[1]


@pytest.mark.usefixtures("_unsaid")
def test_each_reason_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Operation by operation, and of one operation dtype and layout, whatever the dtype is."""
    for dtype in (BFLOAT16, torch.float64):
        route(draw(3, 4, dtype=dtype), draw(5, 4, dtype=dtype), draw(5), Choice(2))
        route(draw(3, 4, dtype=dtype), draw(4, 5, dtype=dtype).t(), draw(5), Choice(2))
        swiglu(draw(3, 4, dtype=dtype))
    assert len(said_by(caplog)) == 3


@pytest.mark.usefixtures("_unsaid")
def test_what_is_meant_to_be_torchs_is_no_fallback(caplog: pytest.LogCaptureFixture) -> None:
    """Few rows, nothing at all, the specification itself, and what was asked for."""
    linear(draw(3, 4, dtype=BFLOAT16), draw(5, 4, dtype=BFLOAT16))
    linear(draw(3, 4), draw(4, 5).t())
    swiglu(draw(0, 4, dtype=BFLOAT16))
    orthogonalised(draw(0, 4))
    quantise_rows(draw(2, 128))
    with kernels.use_reference():
        swiglu(draw(3, 4, dtype=BFLOAT16))
    assert not said_by(caplog)


WIDE = draw(1, 2 * WIDEST)
OF_A_GPU: dict[str, tuple[Callable[[], Any], str]] = {
    "router": (lambda: route(draw(3, 4, dtype=BFLOAT16), draw(5, 4, dtype=BFLOAT16), draw(5), Choice(2)), "float32"),
    "rms_norm": (lambda: rms_norm(WIDE, WIDE[0], 0.0), f"rows of at most {WIDEST} numbers"),
    "add_rms_norm": (lambda: add_rms_norm(draw(2, 4).double(), draw(2, 4), draw(4).double(), 0.0), "bfloat16"),
    "rotate": (lambda: rotate(WIDE, WIDE[:, ::2], WIDE[:, ::2]), f"rows of at most {WIDEST} numbers"),
    "swiglu": (lambda: swiglu(draw(3, 4).double()), "float32, bfloat16 and float16"),
    "attention": (lambda: attention(*(draw(1, 2, 2, 8) for _ in range(3)), 0.5), "16 bits on a Hopper GPU"),
    "latent_attention": (
        lambda: latent_attention(draw(1, 2, 2, 6), draw(1, 2, 2, 9), draw(1, 2, 2), (draw(1, 2, 1),) * 2, 0.5),
        "16 bits on a Hopper GPU",
    ),
    "mla_decode": (lambda: decode(draw(2, 4, 7)), "on a GPU 16 bits"),
    "adamw": (lambda: adamw(*([draw(4, 3).abs().t()] for _ in range(4)), AdamW(1e-3, 1)), "contiguous on one device"),
    "round_stochastically": (
        lambda: round_stochastically([draw(4, 3).t()], [draw(3, 4, dtype=BFLOAT16)], 1, 1, [Origin(0)]),
        "contiguous tensors on one device",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("_unsaid", "_as_on_a_gpu")
@pytest.mark.parametrize("name", OF_A_GPU)
def test_a_fallback_on_a_gpu_is_said_once_with_its_reason(name: str, caplog: pytest.LogCaptureFixture) -> None:
    call, reason = OF_A_GPU[name]
    before = kernels.report().get(name, {}).get("torch", 0)
    call()
    call()
    assert kernels.report()[name]["torch"] == before + 2
    (said,) = said_by(caplog)
    assert said.startswith(f"{name} runs in torch's own operations on cpu, here of torch.")
    assert reason in said.split(": code of ours takes ")[1]


@pytest.mark.usefixtures("_unsaid", "_as_on_a_gpu")
def test_what_has_no_code_in_triton_is_no_fallback(caplog: pytest.LogCaptureFixture) -> None:
    linear(draw(200, 4, dtype=BFLOAT16), draw(5, 4, dtype=BFLOAT16))
    linear(draw(200, 4), draw(4, 5).t())
    likeliest(draw(3, 4))
    orthogonalised(draw(3, 4))
    assert not said_by(caplog)


@pytest.mark.usefixtures("_unsaid")
def test_a_fallback_in_a_graph_is_said_as_it_is_captured(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    graph = torch.compile(swiglu, fullgraph=True, backend="eager")
    x = draw(3, 4).double()
    assert not said_by(caplog)
    for _ in range(2):
        assert graph(x).equal(swiglu(x))
    assert [line.split(":")[0] for line in said_by(caplog)] == [
        "swiglu runs in torch's own operations on cpu, here of torch.float64"
    ]


def test_the_switch_to_torch_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from gristmill.kernels import compiled

    monkeypatch.setattr(compiled, "TORCH_ALONE", True)
    compiled._torch_alone.cache_clear()
    for _ in range(2):
        swiglu(draw(3, 4))
        rms_norm(draw(3, 4), draw(4), 0.0)
    assert said_by(caplog) == ["nothing is compiled, for GRISTMILL_KERNELS=torch: slower paths in torch run"]


class Reached(Exception):
    """The choice of an implementation, behind the checks."""


def there(on: str, *shape: int) -> Tensor:
    return torch.ones(shape, device=on)


def routed(on: str, **change: Tensor) -> Tensor:
    expert = torch.arange(2, device=on)[:, None] + torch.arange(2, device=on)  # 0 and 1, 1 and 2
    order, load = torch.arange(4, device=on), 1 + torch.arange(3, device=on) % 2
    given = {"expert_TK": expert, "load_E": load, "order_M": order}
    stacks = there(on, 2, 5), there(on, 2, 2), there(on, 3, 8, 5), there(on, 3, 5, 4)
    x, gate, gate_up, down = stacks
    return moe_mlp(x, gate_TK=gate, gate_up_E2FD=gate_up, down_EDF=down, **{**given, **change})


def targeted(operation: Callable[..., Any], on: str, target: Tensor) -> Any:
    given = there(on, 3, 4), there(on, 6, 4), target
    return operation(*given, *([there(on, 3)] if operation is linear_cross_entropy_mean else []))


def grouped_in_fp8(on: str, ends: Tensor) -> Tensor:
    x, w = there(on, 2, 256).to(E4M3), there(on, 2, 128, 256).to(E4M3)
    return fp8_grouped_gemm(x, there(on, 2, 2), w, there(on, 2, 1, 2), ends)


def gradient_in_fp8(on: str, ends: Tensor) -> Tensor:
    side = there(on, 128, 128).to(E4M3), there(on, 128, 1)
    return fp8_weight_gradient(*side, *side, ends)


def fed_forward(on: str, ends: Tensor) -> Tensor:
    return fp8_feed_forward(there(on, 3, 5), there(on, 2, 8, 5), there(on, 2, 5, 4), ends)


def attended(on: str, first: Tensor) -> Tensor:
    return attention(*(there(on, 1, 2, 2, 8) for _ in range(3)), 0.5, first_BS=first)


WRONG: dict[str, tuple[Callable[[str, Tensor], Any], list[Any], str]] = {
    "grouped_gemm": (lambda on, ends: grouped_gemm(there(on, 4, 3), there(on, 2, 5, 3), ends), [3, 2], "ends_E"),
    "fp8_gemm: quantise_columns": (lambda on, ends: quantise_columns(there(on, 2, 128), ends), [1, 3], "ends_E"),
    "fp8_gemm: grouped": (grouped_in_fp8, [2, 1], "ends_E"),
    "fp8_gemm: weight gradient": (gradient_in_fp8, [1, 2], "tiles of grad_MP"),
    "fp8_gemm: feed forward": (fed_forward, [3, 2], "fp8_feed_forward: ends_E"),
    "cross_entropy": (lambda on, ids: targeted(linear_cross_entropy_mean, on, ids), [0, 6, 1], "largest of target_T"),
    "cross_entropy: log-probabilities": (lambda on, ids: targeted(linear_log_probs, on, ids), [0, -1, 1], "least of"),
    "moe_mlp: experts": (lambda on, e: routed(on, expert_TK=e), [[0, 3], [1, 2]], "range of expert_TK"),
    "moe_mlp: load": (lambda on, load: routed(on, load_E=load), [2, 1, 1], "load_E"),
    "moe_mlp: order": (lambda on, order: routed(on, order_M=order), [3, 2, 1, 0], "order_M"),
    "mla_attention": (attended, [[0, -1]], "the least of first_BS"),
    "mla_decode": (lambda on, start: decode(there(on, 2, 4, 7), BFLOAT16, start), [0, 4], "places"),
    "mla_decode: pages": (
        lambda on, table: decode(there(on, 3, 4, 7), BFLOAT16, table_BJ=table), [[2], [3]], "pages of table_BJ"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_numbers_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU always; on a GPU with the switch."""
    monkeypatch.setattr(dispatch, "CHECKED", True)
    call, wrong, message = WRONG[name]
    for on in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        with pytest.raises(ValueError, match=message):
            call(on, torch.tensor(wrong, device=on))


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_on_a_gpu_numbers_are_looked_at_with_the_switch_alone(
    name: str, checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that have no numbers, as a GPU's have none that the host knows: a look at one raises."""

    def reached(*_: Any, **__: Any) -> None:
        raise Reached

    folder = name.split(":")[0]
    end = "mla_decode.mla_decode_reference" if name == "mla_decode: pages" else f"{folder}.chosen"
    monkeypatch.setattr(f"gristmill.kernels.{end}", reached)
    monkeypatch.setattr(dispatch, "CHECKED", checked)
    monkeypatch.setattr(dispatch, "_on_host", lambda x: False)
    call, right, _ = WRONG[name]
    with FakeTensorMode():
        given = torch.zeros(torch.tensor(right).shape, dtype=torch.int64)
        with pytest.raises(DataDependentOutputException if checked else Reached):
            call("cpu", given)


def test_the_switch_is_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess
    import sys

    code = "from gristmill.kernels import dispatch; print(dispatch.CHECKED)"
    for value, wanted in (("1", "True"), ("0", "False"), ("", "False")):
        monkeypatch.setenv("GRISTMILL_KERNELS_CHECK", value)
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == wanted
