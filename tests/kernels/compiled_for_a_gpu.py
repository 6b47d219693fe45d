"""The GPU's code, compiled for one that is not here: what an interpreter takes and a compiler does not, and what it holds.

test_gpu_code.py runs it in a process of its own, since tensors without numbers stand for a GPU's from then on
(bench/gpu_code.py).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from gristmill.kernels.bench import OPERATIONS
from gristmill.kernels.cross_entropy import (
    linear_cross_entropy_mean,
    linear_log_probs,
    linear_log_probs_and_entropy,
)
from gristmill.kernels.fp8_gemm import fp8_feed_forward, fp8_linear, quantise_columns, quantise_rows
from gristmill.kernels.grouped_gemm import grouped_gemm
from gristmill.kernels.mla_attention import attention, latent_attention
from gristmill.kernels.mla_decode import mla_decode
from gristmill.kernels.moe_mlp import moe_mlp
from gristmill.kernels.norm_rope import add_rms_norm, rms_norm, rotate, rotate_halves
from gristmill.kernels.optim import AdamW, Origin, adamw, round_stochastically
from gristmill.kernels.router import Choice, route
from gristmill.kernels.swiglu import swiglu
from gristmill.kernels.tune import SEARCHED, search_of
from gristmill.model.config import ModelConfig
from gristmill.model.training.activations import kept
from gristmill.model.training.config import LayoutConfig, OptimizerConfig
from gristmill.model.training.expert_parallel import ShardedExperts, shard_experts
from gristmill.model.training.layout import Layout
from gristmill.model.training.memory import training_memory
from gristmill.model.training.precision import apply_precision
from gristmill.model.training.recomputation import recompute_blocks
from gristmill.model.transformer import Batch, Routing, Transformer
from tests.model.benches import bench

KERNELS = Path(__file__).parents[2] / "kernels"
SPILLED = {"gradient_of_keys": 96, "_attend": 480, "_product": 32}
"""Bytes of a thread's own memory that a kernel may take, others none; of the last where plain loads are float32."""
MOST_HELD = 60 << 30  # bytes, of an H100's 80 GB
Row = dict[str, Any]


@pytest.fixture(scope="module")
def code() -> ModuleType:
    return bench("gpu_code")


@pytest.fixture(scope="module")
def compiled(code: ModuleType) -> list[Row]:
    return code.pretend()


@pytest.mark.filterwarnings("ignore")
def test_every_case_of_the_benchmark_compiles(code: ModuleType, compiled: list[Row]) -> None:
    """At full size: without a look at a number, within a multiprocessor's shared memory, and nearly without spills."""
    found = code.look_at(list(OPERATIONS), compiled)
    _check(code, found.kernels)
    _check_that_products_wait_for_nothing(code, found.kernels)
    on_tensor_cores = {row["kernel"] for row in found.kernels if row["wgmma"]}
    assert {"_product", "_weight_gradient", "forward", "gradient_of_queries", "gradient_of_keys"} <= on_tensor_cores
    assert all(row["tma"] for row in found.kernels if row["kernel"] in ("_product", "forward"))


def _check(code: ModuleType, found: list[Row]) -> None:
    assert all(row["shared"] <= code.MOST_SHARED for row in found)
    spilled = [code.said(row) for row in found if row["spilled"] > SPILLED.get(row["kernel"], 0)]
    assert not spilled, "\n".join(spilled)


def _check_that_products_wait_for_nothing(code: ModuleType, found: list[Row]) -> None:
    """Beyond odd sizes, whose numbers no engine copies."""
    waiting = [code.said(row) for row in found if row["waits"]]
    assert not waiting, "\n".join(waiting)


def both_ways(function: Callable[..., Any], *leaves: Tensor) -> None:
    leaves = tuple(leaf.requires_grad_() for leaf in leaves)
    made = function(*leaves)
    outs = made if isinstance(made, tuple) else (made,)
    torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype)


def whole(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int64)


def products(dtype: torch.dtype) -> None:
    """Of sizes that the copy engine takes, and of odd ones."""
    for inner, outer in ((64, 128), (33, 17)):
        x, w, ends = draw(300, inner, dtype=dtype), draw(5, outer, inner, dtype=dtype), whole(5)
        both_ways(lambda a, b, e=ends: grouped_gemm(a, b, e), x, w)


def experts(dtype: torch.dtype) -> None:
    for width, hidden in ((128, 64), (40, 24)):
        leaves = draw(50, width, dtype=dtype), draw(50, 3), draw(6, 2 * hidden, width, dtype=dtype)
        down = draw(6, width, hidden, dtype=dtype)
        for order in (None, whole(150)):
            both_ways(lambda x, g, u, d, o=order: moe_mlp(x, whole(50, 3), g, u, d, whole(6), o), *leaves, down)


def in_fp8(dtype: torch.dtype) -> None:
    both_ways(fp8_linear, draw(200, 128, dtype=dtype), draw(256, 128))
    both_ways(fp8_linear, draw(200, 100, dtype=dtype), draw(72, 100))
    if dtype == torch.bfloat16:
        leaves = draw(300, 128, dtype=dtype), draw(4, 256, 128, dtype=dtype), draw(4, 128, 128, dtype=dtype)
        both_ways(lambda x, u, d: fp8_feed_forward(x, u, d, whole(4)), *leaves)
    quantise_rows(draw(256, 200, dtype=dtype).t().contiguous())
    quantise_columns(draw(200, 256, dtype=dtype), whole(3))


def heads(dtype: torch.dtype) -> None:
    """Under a causal mask, documents, and a mask; of shared keys and odd lengths; the benchmark has MLA's without one."""
    mask, first = torch.zeros(2, 100, 100, dtype=torch.bool), whole(2, 100)
    for more, groups, width in (({}, 2, 48), ({"first_BS": first}, 4, 64), ({"mask_BSS": mask}, 2, 48)):
        q, k = draw(2, 100, 4, width, dtype=dtype), draw(2, 100, groups, width, dtype=dtype)
        both_ways(lambda q, k, v, m=more: attention(q, k, v, 0.1, **m), q, k, draw(2, 100, groups, 32, dtype=dtype))
    rotary = draw(2, 100, 8), draw(2, 100, 8)
    of = draw(2, 100, 4, 48, dtype=dtype), draw(2, 100, 4, 64, dtype=dtype), draw(2, 100, 16, dtype=dtype)
    both_ways(lambda q, kv, key: latent_attention(q, kv, key, rotary, 0.1, mask_BSS=mask), *of)


def decoding(dtype: torch.dtype) -> None:
    for heads, tokens in ((4, 1), (128, 1), (16, 3)):
        for table in (None, torch.zeros(2, 8, dtype=torch.int32)):
            cache = draw(*((2, 256) if table is None else (20, 32)), 80, dtype=dtype)
            mla_decode(
                draw(2, tokens, heads, 48, dtype=dtype), draw(2, tokens, 80, dtype=dtype), cache, whole(2), 256,
                (draw(2, tokens, 8), draw(2, tokens, 8)), draw(64, dtype=dtype), 1e-6, draw(heads, 64, 64, dtype=dtype),
                0.1, table, with_log=True,
            )  # fmt: skip


def head(dtype: torch.dtype) -> None:
    x, w, target = draw(70, 64, dtype=dtype), draw(1000, 64, dtype=dtype), whole(70)
    for z_loss in (0.0, 1e-4):
        both_ways(lambda a, b, z=z_loss: linear_cross_entropy_mean(a, b, target, draw(70), z_loss=z), x, w)
    both_ways(lambda a, b: linear_log_probs(a, b, target, 0.7), x, w)
    both_ways(lambda a, b: linear_log_probs_and_entropy(a, b, target, 0.7)[0], x, w)


def gate(_: torch.dtype) -> None:
    for affinity in ("sigmoid", "softmax"):
        for groups, allowed in ((1, 1), (4, 2)):
            how = Choice(3, groups=groups, groups_allowed=allowed, affinity=affinity)
            both_ways(lambda x, w, h=how: route(x, w, draw(24), h)[1:3], draw(90, 64), draw(24, 64))


def between(dtype: torch.dtype) -> None:
    for width in (128, 100):
        both_ways(lambda x, w: rms_norm(x, w, 1e-6), draw(70, width, dtype=dtype), draw(width, dtype=dtype))
        leaves = draw(70, width, dtype=dtype), draw(70, width, dtype=dtype), draw(width, dtype=dtype)
        both_ways(lambda x, y, w: add_rms_norm(x, y, w, 1e-6), *leaves)
        both_ways(swiglu, draw(70, 2 * width, dtype=dtype))
        for turn in (rotate, rotate_halves):
            angles = draw(2, 35, 1, width // 2), draw(2, 35, 1, width // 2)
            both_ways(lambda x, a=angles, t=turn: t(x, *a), draw(2, 35, 3, width, dtype=dtype))


def updates(dtype: torch.dtype) -> None:
    shapes = [(100, 100), (33,)]
    p, g = ([draw(*shape) for shape in shapes] for _ in range(2))
    m, v = ([draw(*shape, dtype=dtype) for shape in shapes] for _ in range(2))
    origins = [Origin(i) for i in range(len(shapes))]
    for seed in (None, 0, 2**40):
        if seed is None or dtype == torch.bfloat16:
            adamw(p, g, m, v, AdamW(rate=0.1, step=3, seed=seed), origins)
    if dtype == torch.bfloat16:
        round_stochastically(p, m, 0, 3, origins)


CALLS = [products, experts, in_fp8, heads, decoding, head, gate, between, updates]


def call(calls: Callable[[torch.dtype], None], dtype: torch.dtype, code: ModuleType) -> None:
    with code.without_numbers() as mode:
        mode.preparing = False
        calls(dtype)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("calls", CALLS, ids=lambda calls: calls.__name__)
def test_small_and_odd_shapes_compile(
    calls: Callable[[torch.dtype], None], dtype: str, code: ModuleType, compiled: list[Row]
) -> None:
    """Whatever is not in the benchmark: plain loads, float32, masks, documents, entropies, pages, logarithms."""
    compiled.clear()
    call(calls, getattr(torch, dtype), code)
    _check(code, compiled)


@pytest.mark.filterwarnings("ignore")
def test_nothing_is_left_out(code: ModuleType, compiled: list[Row]) -> None:
    """Every kernel that the sources launch is launched above."""
    code.look_at(list(OPERATIONS), compiled)
    for calls in CALLS:
        call(calls, torch.bfloat16, code)
    wanted = {}
    for path in sorted(KERNELS.glob("*/gpu.py")):
        module = importlib.import_module(f"gristmill.kernels.{path.parent.name}.gpu")
        for name in set(re.findall(r"\b(\w+)\[(?:\(|grid)", path.read_text(encoding="utf-8"))):
            if isinstance(kernel := getattr(module, name, None), JITFunction):
                wanted[f"{path.parent.name}.{name}"] = kernel
    assert len(wanted) >= 30
    assert [name for name, kernel in wanted.items() if kernel not in code.launched] == []


WIDTHS: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 10_944, "moe_intermediate_size": 1408, "num_hidden_layers": 4,
    "num_attention_heads": 16, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "first_k_dense_replace": 1, "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2,
    "max_position_embeddings": 4096,
}  # fmt: skip
"""Of the 16B model of DeepSeek-V2's paper; few of its blocks."""
GROUPED = {"attention": "gqa", "num_key_value_heads": 2, "qk_norm": True, "first_k_dense_replace": 4}


class Exchanged(torch.autograd.Function):
    """Rows as they come from other ranks that have as many."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.clone()


class TwoRanks:
    """Stands for a group of processes."""

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 0


@pytest.fixture
def balanced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks that share out experts, and send each other as many rows as they keep."""

    def counts(self: ShardedExperts, load_E: Tensor) -> tuple[Tensor, list[int], list[int]]:
        rows = 4 * 4096 * WIDTHS["num_experts_per_tok"] // 2
        return load_E.view(2, -1), [rows, rows], [rows, rows]

    monkeypatch.setattr("gristmill.model.training.expert_parallel.exchange_rows", lambda x, *_: Exchanged.apply(x))
    monkeypatch.setattr(ShardedExperts, "_counts", counts)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("balanced")
@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
@pytest.mark.parametrize(
    ("recompute", "other", "expert_ranks"),
    [("none", {}, 1), ("selective", {}, 1), ("full", {}, 1), ("none", GROUPED, 1), ("none", {}, 2), ("full", {}, 2)],
)
def test_a_models_step_waits_for_nothing_and_holds_what_is_said(
    precision: Any, recompute: Any, other: dict[str, Any], expert_ranks: int, code: ModuleType, compiled: list[Row]
) -> None:
    """Both passes over 16,384 tokens, with documents, MTP and the balance loss.

    Said is the most of activations and all gradients, which are there together for no long time, so that it is above
    what is held; what is kept without recomputing was counted tensor by tensor, and is said to a tenth.
    """
    sequences, vocabulary = 4, 102_400
    layout = LayoutConfig(recompute=recompute, expert_parallel=expert_ranks)
    config = ModelConfig(**{**WIDTHS, **other})
    with code.without_numbers() as mode:
        model = Transformer(config, vocabulary).train()
        whole_model = sum(p.nbytes for p in model.parameters())
        apply_precision(model, precision)
        if expert_ranks > 1:
            shard_experts(model, TwoRanks())  # type: ignore[arg-type]
        if recompute != "none":
            recompute_blocks(model, recompute)
        token_BS, weight_BS = whole(sequences, 4096), draw(sequences, 4096)
        batch, routing = Batch(token_BS, token_BS, token_BS), Routing()
        mode.preparing = False
        with code.Held() as held:
            main, ahead = model.losses(batch, token_BS, token_BS, weight_BS, routing)
            before_backward = held.now
            torch.stack([main, *ahead, *routing.balance_loss]).sum().backward()
    said = training_memory(
        config, vocabulary, OptimizerConfig(), Layout.of(expert_ranks, layout), layout, tokens=token_BS.numel(),
        precision=precision, device="cuda", mtp_modules=1, averaged=False,
    )  # fmt: skip
    own = sum(p.nbytes for p in model.parameters())
    operands = said.weights - own
    assert own < whole_model if expert_ranks > 1 else own == whole_model
    assert held.most < said.activations + own + operands < 1.8 * held.most
    if recompute == "none":
        kinds = {True, config.first_k_dense_replace == config.num_hidden_layers}
        blocks = [kept(config, dense, precision, "cuda", apart=expert_ranks > 1) for dense in kinds]
        passing = int(max(block.passing for block in blocks) * token_BS.numel())
        assert before_backward < said.activations - passing + operands < 1.1 * before_backward


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("folder", SEARCHED)
def test_every_candidate_of_a_search_compiles(folder: str, code: ModuleType, compiled: list[Row]) -> None:
    """At DeepSeek's shapes, so that no time of a GPU goes into finding that one does not fit; nor do all of them into
    its memory, whose results lie in graphs beside each other while they are timed."""
    module = search_of(folder)
    with code.without_numbers() as mode, code.Held() as held:
        for search in module.searches("cpu", module.DEEPSEEK):
            mode.preparing, results = False, [search.results(search.usual)]
            for sizes in (search.usual, *search.others):
                compiled.clear()
                results.append(search.results(sizes))
                print("\n".join([f"{search.kernel} {sizes}", *(code.said(row) for row in compiled)]))
                assert all(row["shared"] <= code.MOST_SHARED for row in compiled)
                _check_that_products_wait_for_nothing(code, compiled)
            mode.preparing = True
        assert held.most < MOST_HELD


def test_a_look_at_a_number_is_an_error(code: ModuleType, compiled: list[Row]) -> None:
    from torch._subclasses.fake_tensor import DataDependentOutputException

    with code.without_numbers(), pytest.raises(DataDependentOutputException):
        draw(3).sum().item()


def test_what_is_held(code: ModuleType, compiled: list[Row]) -> None:
    """The most at a time: what is let go makes room, and what is given back counts until it is."""

    def work() -> Tensor:
        first = draw(1024)
        second = first + 1
        del first
        return second.view(32, 32) + draw(32, 32)

    with code.without_numbers():
        assert code.most_held(work) == 3 * 4096
        assert code.most_held(lambda: draw(1)) == code.BLOCK
