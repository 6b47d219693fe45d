"""Times of the kernels against their peers on equal inputs: `python -P -m gristmill.kernels.bench [--device cpu|cuda]`.

Medians of several runs, the sides in turn in one process. A peer is torch's own operation, and where they are installed
Liger-Kernel's and the experts of `transformers`. In brackets is the share of what the device reaches in a large square
product of that dtype, as measured first; memory is the most beyond the inputs (on a GPU: torch counts none of a CPU).
On a CPU bfloat16 is that of operands: weights and results stay float32, which torch's side has its autocast for.
Short kernels of a GPU are captured as graphs, and where memory sets the pace the share is also of a large copy's bytes.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import platform
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gristmill.kernels.cross_entropy import linear_cross_entropy_mean
from gristmill.kernels.fp8_gemm import bench_rows
from gristmill.kernels.grouped_gemm import grouped_gemm
from gristmill.kernels.grouped_gemm.cpu import GroupedGemm
from gristmill.kernels.linear import linear
from gristmill.kernels.mla_attention import attention as whole_attention
from gristmill.kernels.mla_attention import latent_attention
from gristmill.kernels.mla_attention.sdpa import sdpa_attention, sdpa_latent_attention
from gristmill.kernels.mla_decode.bench_rows import cached_attention
from gristmill.kernels.moe_mlp import moe_mlp
from gristmill.kernels.norm_rope import add_rms_norm, rms_norm, rotate
from gristmill.kernels.norm_rope.reference import rotate_reference
from gristmill.kernels.optim.bench_rows import newton_schulz, optim
from gristmill.kernels.router import Choice, route
from gristmill.kernels.swiglu import swiglu
from gristmill.kernels.timing import (
    Case,
    Work,
    bandwidth,
    both_ways,
    memory,
    seconds,
    seconds_of_device,
    without_gradients,
)
from gristmill.kernels.tune import SEARCHES, tune

ROUNDED = ("linear", "moe_mlp", "grouped_gemm")  # what takes its operands in bfloat16 on a CPU
SHARE_GOAL = 0.8  # of a large copy's bytes a second, for norm and rotation


def routed(tokens: int, experts: int, active: int) -> Tensor:
    """What each token chooses evenly at random, (T, K)."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(tokens, experts, generator=generator).topk(active, 1).indices


def grouped(
    device: str, dtype: torch.dtype, experts: int, tokens: int, active: int, inner: int, outer: int
) -> Iterator[Case]:
    """Against torch's own grouped product, on a CPU also against a product a group, and on a GPU against the product of
    as many rows with one matrix."""
    kept, rounded = stored(device, dtype), stored(device, dtype) != dtype
    rows, one_by_one = tokens * active, GroupedGemm.apply
    ends = routed(tokens, experts, active).flatten().bincount(minlength=experts).cumsum(0).to(device)
    x = torch.randn(rows, inner, device=device, dtype=kept)
    w = torch.empty(experts, outer, inner, device=device, dtype=kept).normal_(0, inner**-0.5)
    offsets, flops = ends.to(torch.int32), 2 * rows * inner * outer
    shape = f"{experts} × {outer}×{inner}, {tokens} tokens × {active}"

    def theirs(a: Tensor, b: Tensor) -> Tensor:
        return F.grouped_mm(a.to(dtype), b.to(dtype).transpose(-2, -1), offs=offsets).to(kept)

    goal = 1.2 if device == "cuda" else None
    peer = "torch.nn.functional.grouped_mm"
    if device == "cuda":
        peers = {
            peer: (without_gradients(lambda: theirs(x, w)), goal),
            "one dense product": (without_gradients(lambda: x @ w[0].t()), 0.85),
        }
        ours = without_gradients(lambda: grouped_gemm(x, w, ends))
        yield Case("grouped_gemm forward", shape, flops, ours, peers)
    both = both_ways(lambda a, b: grouped_gemm(a, b, ends, rounded=rounded), x, w)
    peers = {peer: (both_ways(theirs, x, w), goal)}
    if device == "cpu" and not rounded:
        peers["torch.mm, group by group"] = (both_ways(lambda a, b: one_by_one(a, b, ends, False), x, w), None)
    yield Case("grouped_gemm", shape, 3 * flops, both, peers)


def stored(device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of tensors: on a CPU bfloat16 is that of a product's operands alone."""
    return torch.float32 if device == "cpu" else dtype


def cast_by_torch(function: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    """It under autocast of a CPU; a result in float32, as the other side's is."""

    def under(*arguments: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return function(*arguments).float()

    return under


def experts_mlp(
    device: str, dtype: torch.dtype, experts: int, tokens: int, active: int, width: int, hidden: int
) -> Iterator[Case]:
    """Against the experts of `transformers`, each of whose implementations is a peer."""
    expert = routed(tokens, experts, active).to(device)
    load = expert.flatten().bincount(minlength=experts)
    kept, rounded = stored(device, dtype), stored(device, dtype) != dtype
    x = torch.randn(tokens, width, device=device, dtype=kept)
    gate = torch.rand(tokens, active, device=device)
    gate_up = torch.empty(experts, 2 * hidden, width, device=device, dtype=kept).normal_(0, width**-0.5)
    down = torch.empty(experts, width, hidden, device=device, dtype=kept).normal_(0, hidden**-0.5)
    peers: dict[str, tuple[Work, float | None]] = {}
    if importlib.util.find_spec("transformers"):
        for name in ("grouped_mm", "eager"):
            theirs = partial(_transformers_experts(name, width, hidden, experts), expert)
            theirs = cast_by_torch(theirs, dtype) if rounded else theirs
            peers[f"transformers {name}"] = (both_ways(theirs, x, gate, gate_up, down), 1.3)
    yield Case(
        "moe_mlp",
        f"{experts} × {width}×{hidden}, {tokens} tokens × {active}",
        3 * 6 * tokens * active * width * hidden,
        both_ways(lambda a, g, u, d: moe_mlp(a, expert, g, u, d, load, rounded=rounded), x, gate, gate_up, down),
        peers,
    )


def _transformers_experts(implementation: str, width: int, hidden: int, experts: int) -> Callable[..., Tensor]:
    """DeepSeek-V3's experts there, as a function of (expert, x, gate, gate_up, down)."""
    config = importlib.import_module("transformers").DeepseekV3Config(
        hidden_size=width, moe_intermediate_size=hidden, n_routed_experts=experts
    )
    config._experts_implementation = implementation
    theirs = importlib.import_module("transformers.models.deepseek_v3.modeling_deepseek_v3").DeepseekV3Experts
    with torch.device("meta"):
        module = theirs(config)

    def function(expert: Tensor, x: Tensor, gate: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        matrices = {"gate_up_proj": gate_up, "down_proj": down}
        return torch.func.functional_call(module, matrices, (x, expert, gate.to(x.dtype)))

    return function


def cross_entropy(device: str, dtype: torch.dtype, rows: int, width: int, vocab: int) -> Iterator[Case]:
    """Against the logits held whole with torch's cross-entropy, and Liger's chunks on a GPU."""
    x = torch.randn(rows, width, device=device, dtype=dtype)
    w = torch.empty(vocab, width, device=device, dtype=dtype).normal_(0, width**-0.5)
    target = torch.randint(0, vocab, (rows,), device=device)
    weight = torch.full((rows,), 1 / rows, device=device)
    whole = both_ways(lambda a, b: F.cross_entropy((a @ b.T).float(), target), x, w)
    peers: dict[str, tuple[Work, float | None]] = {"whole logits, F.cross_entropy": (whole, None)}
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        liger = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
        peers["Liger-Kernel"] = (both_ways(lambda a, b: liger(a, b, target), x, w), 1.0)
    size = x.element_size()
    yield Case(
        "cross_entropy",
        f"{rows} × {width} → {vocab}",
        6 * rows * width * vocab,
        both_ways(lambda a, b: linear_cross_entropy_mean(a, b, target, weight), x, w),
        peers,
        most_memory=(rows + vocab) * width * size + rows * vocab * size // 20,  # the gradients, and 5 % of the logits
    )


def between_products(device: str, dtype: torch.dtype, rows: int, width: int) -> Iterator[Case]:
    """Norm, rotation (8 heads of which half is turned) and activation, against torch's operations one by one."""
    x, weight = torch.randn(rows, width, device=device, dtype=dtype), torch.ones(width, device=device, dtype=dtype)
    turning, gate_up = x.view(rows, 8, -1)[..., width // 16 :], torch.randn(rows, 8 * width, device=device, dtype=dtype)
    angle = torch.rand(rows, 1, width // 32, device=device)
    cos, sin = angle.cos(), angle.sin()

    def activated(a: Tensor) -> Tensor:
        gate, up = a.chunk(2, -1)
        return F.silu(gate) * up

    def added(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        total = a + b
        return total, F.rms_norm(total, (width,), c, 1e-6)

    def case(op: str, size: int, flops: int, ours: Work, peer: str, theirs: Work, moved: int | None = None) -> Case:
        goal = SHARE_GOAL if moved else None
        peers: dict[str, tuple[Work, float | None]] = {peer: (theirs, None)}
        return Case(op, f"{rows} × {size}", flops, ours, peers, bytes=moved, least_share=goal, captured=True)

    seen = torch.ones_like(x) if device == "cuda" else None
    norm = both_ways(lambda a, b: rms_norm(a, b, 1e-6), x, weight, seen=seen)
    peer = both_ways(lambda a, b: F.rms_norm(a, (width,), b, 1e-6), x, weight, seen=seen)
    moved = 5 * x.nbytes  # x and the result; x, the result's gradient and its own
    yield case("rms_norm", width, 12 * x.numel(), norm, "torch.nn.functional.rms_norm", peer, moved)
    residual = torch.randn_like(x)
    norm = both_ways(lambda a, b, c: add_rms_norm(a, b, c, 1e-6), residual, x, weight, seen=seen)
    peer = both_ways(added, residual, x, weight, seen=seen)
    moved = 8 * x.nbytes  # both parts and both results; the sum, both results' gradients and that of the parts
    yield case("add_rms_norm", width, 14 * x.numel(), norm, "sum, torch.nn.functional.rms_norm", peer, moved)
    seen = torch.ones_like(turning, dtype=cos.dtype) if device == "cuda" else None
    turned = both_ways(lambda a: rotate(a, cos, sin), turning, seen=seen)
    peer = both_ways(lambda a: rotate_reference(a, cos, sin), turning, seen=seen)
    moved = 2 * turning.numel() * (x.element_size() + cos.element_size())  # the result has the angles' dtype
    moved += 4 * cos.nbytes
    yield case("rotate", width // 2, 6 * turning.numel(), turned, "slices and cat", peer, moved)
    seen = torch.ones_like(gate_up[..., : 4 * width]) if device == "cuda" else None
    ours, peer = both_ways(swiglu, gate_up, seen=seen), both_ways(activated, gate_up, seen=seen)
    moved = 4 * gate_up.nbytes  # gate and up; the result; both again, the result's gradient and theirs
    yield case("swiglu", 4 * width, 8 * gate_up.numel(), ours, "silu and product", peer, moved)


def attention(
    device: str, dtype: torch.dtype, batch: int, length: int, heads: int, width: int, turning: int, values: int
) -> Iterator[Case]:
    """Causal attention of MLA's projections against torch's own, with the copies that it needs; on a GPU also within
    documents, and at equal head widths, which flash attention takes."""
    shapes = ((heads, width + turning), (heads, width + values), (turning,))
    leaves = [torch.randn(batch, length, *shape, device=device, dtype=dtype) for shape in shapes]
    angle = torch.rand(batch, length, turning // 2, device=device)
    rotary, scale = (angle.cos(), angle.sin()), (width + turning) ** -0.5
    shape = f"{batch} × {length}, {heads} × {width}+{turning}/{values}"
    flops, peer = batch * heads * length * (length + 1), "rotate, cat, scaled_dot_product"

    def cases(
        op: str, shape: str, flops: int, leaves: list[Tensor], ours: Callable[..., Tensor],
        peer: str, theirs: Callable[..., Tensor], goal: float | None = None,
    ) -> Iterator[Case]:  # fmt: skip
        sides = without_gradients(partial(ours, *leaves)), without_gradients(partial(theirs, *leaves))
        yield Case(f"{op} forward", shape, flops, sides[0], {peer: (sides[1], goal)}, captured=True)
        seen = torch.randn(batch, length, heads, values, device=device, dtype=dtype) if device == "cuda" else None
        both = both_ways(ours, *leaves, seen=seen), both_ways(theirs, *leaves, seen=seen)
        yield Case(op, shape, 7 * flops // 2, both[0], {peer: (both[1], goal)}, captured=True)

    ours, theirs = (
        partial(latent_attention, rotary=rotary, scale=scale),
        partial(sdpa_latent_attention, rotary=rotary, scale=scale),
    )
    yield from cases("attention", shape, flops * (width + turning + values), leaves, ours, peer, theirs)
    if device == "cuda":
        document = torch.arange(length, device=device) // (length // 4)
        mask = (document[:, None] == document).tril().expand(batch, length, length)
        ours = partial(ours, first_BS=(document * (length // 4)).expand(batch, length))
        theirs = partial(theirs, mask_BSS=mask)
        yield from cases(
            "attention, documents", shape, flops // 4 * (width + turning + values), leaves, ours, peer, theirs
        )
        leaves = [torch.randn(batch, length, heads, width, device=device, dtype=dtype) for _ in range(3)]
        ours, op = partial(whole_attention, scale=scale), "attention, equal"
        shape, flops = f"{batch} × {length}, {heads} × {width}/{width}", 2 * flops * width
        theirs = partial(_flash_attention, scale=scale)
        yield from cases(op, shape, flops, leaves, ours, "torch, flash attention", theirs, 0.9)
        theirs = partial(sdpa_attention, scale=scale)
        yield from cases(op, shape, flops, leaves, ours, "torch, as it chooses", theirs)


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa_attention(q, k, v, scale)


def decoding(device: str, dtype: torch.dtype, batch: int, places: int, *model: int) -> Iterator[Case]:
    """What a step of decoding a new token a row has, without gradients: attention; experts and a product if given."""
    yield from cached_attention(device, dtype, batch, places, *model[:5])
    if len(model) == 5:
        return
    width, experts, hidden = model[5:]

    def draw(*shape: int) -> Tensor:
        return torch.empty(*shape, device=device, dtype=dtype).normal_(0, shape[-1] ** -0.5)

    def case(op: str, shape: str, flops: int, ours: Work, peers: dict[str, Work]) -> Case:
        return Case(
            op, shape, flops, without_gradients(ours), {k: (without_gradients(v), None) for k, v in peers.items()}
        )

    x, expert, gate = draw(batch, width), routed(batch, experts, 4).to(device), draw(batch, 4).abs()
    gate_up, down = draw(experts, 2 * hidden, width), draw(experts, width, hidden)
    ours = partial(moe_mlp, x, expert, gate, gate_up, down, expert.flatten().bincount(minlength=experts))
    peers: dict[str, Work] = {}
    if importlib.util.find_spec("transformers"):
        for name in ("grouped_mm", "eager"):
            theirs = _transformers_experts(name, width, hidden, experts)
            peers[f"transformers {name}"] = partial(theirs, expert, x, gate, gate_up, down)
    shape = f"{batch} tokens × 4, {experts} × {width}×{hidden}"
    yield case("moe_mlp, few rows", shape, 24 * batch * width * hidden, ours, peers)

    w, shape = draw(16 * width, width), f"{batch} × {width} → {16 * width}"
    peers = {"torch.nn.functional.linear": partial(F.linear, x, w)}
    yield case("linear, few rows", shape, 32 * batch * width**2, partial(linear, x, w), peers)


def linear_product(device: str, dtype: torch.dtype, rows: int, inner: int, outer: int) -> Iterator[Case]:
    """Against torch's own."""
    kept, rounded = stored(device, dtype), stored(device, dtype) != dtype
    x = torch.randn(rows, inner, device=device, dtype=kept)
    w = torch.empty(outer, inner, device=device, dtype=kept).normal_(0, inner**-0.5)
    theirs = cast_by_torch(F.linear, dtype) if rounded else F.linear
    peers: dict[str, tuple[Work, float | None]] = {"torch.nn.functional.linear": (both_ways(theirs, x, w), None)}
    ours = both_ways(partial(linear, rounded=rounded), x, w)
    yield Case("linear", f"{rows} × {inner} → {outer}", 6 * rows * inner * outer, ours, peers)


def router(
    device: str, _: torch.dtype, tokens: int, width: int, experts: int, active: int, groups: int, allowed: int
) -> Iterator[Case]:
    """Against the router of `transformers`, alone and with what its experts make of the choices, as ours does."""
    x, bias = torch.randn(tokens, width, device=device), torch.zeros(experts, device=device)
    weight = torch.empty(experts, width, device=device).normal_(0, width**-0.5)
    how = Choice(active, groups=groups, groups_allowed=allowed)
    peers: dict[str, tuple[Work, float | None]] = {}
    if importlib.util.find_spec("transformers"):
        config = importlib.import_module("transformers").DeepseekV3Config(
            hidden_size=width, n_routed_experts=experts, num_experts_per_tok=active, n_group=groups, topk_group=allowed,
            norm_topk_prob=True, routed_scaling_factor=1.0,
        )  # fmt: skip
        name = "transformers.models.deepseek_v3.modeling_deepseek_v3"
        module = importlib.import_module(name).DeepseekV3TopkRouter(config).to(device)

        def theirs(a: Tensor, b: Tensor, *, counted: bool = False) -> Tensor:
            _, gates, expert = torch.func.functional_call(module, {"weight": b}, (a,))
            if counted:  # as integrations/moe.py does for its grouped product
                sorted_, _ = torch.sort(expert.flatten())
                load = torch.histc(sorted_.float() if device == "cpu" else sorted_.int(), experts, 0, experts - 1)
                load.cumsum(0, dtype=torch.int32)
            return gates

        goal = 2.0 if device == "cpu" else None
        peers["transformers"] = (both_ways(theirs, x, weight), goal)
        peers["transformers, sorted"] = (both_ways(partial(theirs, counted=True), x, weight), goal)
    ours = both_ways(lambda a, b: route(a, b, bias, how)[1], x, weight)
    shape = f"{tokens} × {width}, {active} of {experts}, {groups} groups"
    yield Case("router", shape, 6 * tokens * width * experts, ours, peers)


def fp8(device: str, _: torch.dtype) -> Iterator[Case]:
    """FP8 against our own products in 16 bits; every shape at once."""
    for row in bench_rows.rows(device):
        yield Case(row.op, row.shape, row.flops, row.ours, {row.peer: (row.theirs, row.goal)})


def limit(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a large square product; on a CPU in bfloat16 the faster of torch's and ours."""
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    products: list[Work] = [lambda: a @ b]
    if stored(device, dtype) != dtype:
        x, w = a.float(), b.float()
        products.append(lambda: linear(x, w, rounded=True))
    return 2 * size**3 / min(seconds(products, device))


def measured(
    case: Case, device: str, dtype: torch.dtype, best: float, copied: float | None = None
) -> list[dict[str, Any]]:
    """A row of the table for each peer; `best` operations and `copied` bytes a second are the device's."""
    sides = [case.ours, *(work for work, _ in case.peers.values())]
    captured = case.captured and device == "cuda"
    ours, *theirs = seconds_of_device(sides) if captured else seconds(sides, device)
    held, name = memory(case.ours, device), str(dtype).removeprefix("torch.")
    common = {"op": case.op, "shape": case.shape, "dtype": name, "device": device, "seconds": ours}
    common |= {"tflops": case.flops / ours / 1e12, "share": case.flops / ours / best}
    if case.bytes is not None and copied is not None:
        share = case.bytes / ours / copied
        common |= {"bandwidth_share": share}
        if case.least_share is not None:
            common |= {"least_share": case.least_share, "bandwidth_met": share >= case.least_share}
    rows = []
    for (peer, (work, goal)), taken in zip(case.peers.items(), theirs, strict=True):
        row = {**common, "peer": peer, "peer_seconds": taken, "ratio": taken / ours}
        if goal is not None:
            row |= {"goal": goal, "met": taken / ours >= goal}
        if held is not None:
            row |= {"memory": held, "peer_memory": memory(work, device)}
        if held is not None and case.most_memory is not None:
            row |= {"most_memory": case.most_memory, "memory_met": held <= case.most_memory}
        rows.append(row)
    return rows


def said(row: dict[str, Any]) -> str:
    line = (
        f"{row['op']:<21} {row['shape']:<36} {row['dtype']:<8} {row['seconds'] * 1e3:8.3f} ms {row['tflops']:6.3g} "
        f"TFLOP/s ({row['share']:.2f})   {row['peer']}: {row['peer_seconds'] * 1e3:8.3f} ms   ratio {row['ratio']:.2f}"
    )
    if "goal" in row:
        line += f" (goal {row['goal']}: {'met' if row['met'] else 'missed'})"
    if "bandwidth_share" in row:
        line += f"   {row['bandwidth_share']:.2f} of a copy's bandwidth"
    if "least_share" in row:
        line += f" (goal {row['least_share']}: {'met' if row['bandwidth_met'] else 'missed'})"
    if "memory" in row:
        line += f"   {row['memory'] / 2**20:.0f} MiB against {row['peer_memory'] / 2**20:.0f}"
    if "most_memory" in row:
        line += f" (goal {row['most_memory'] / 2**20:.0f}: {'met' if row['memory_met'] else 'missed'})"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    operations = "linear between_products router optim newton_schulz grouped_gemm moe_mlp attention decoding"
    parser.add_argument("--op", choices=[*operations.split(), "cross_entropy", "fp8_gemm"])
    parser.add_argument("--tune", action="store_true", help="find the sizes of tiles on this GPU first, for tiles.json")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    asked = parser.parse_args()
    device = asked.device
    dtypes = [torch.bfloat16] if device == "cuda" else [torch.float32, torch.bfloat16]
    if asked.tune:
        if device != "cuda":
            parser.error("--tune is of GPUs: there are no tiles to choose on a CPU")
        tune([op for op in SEARCHES if asked.op in (None, op)], device)
    makers: dict[str, Callable[..., Iterator[Case]]] = {
        "grouped_gemm": grouped,
        "moe_mlp": experts_mlp,
        "attention": attention,
        "decoding": decoding,
        "cross_entropy": cross_entropy,
        "between_products": between_products,
        "linear": linear_product,
        "router": router,
        "optim": optim,
        "newton_schulz": newton_schulz,
        "fp8_gemm": fp8,
    }
    shapes: dict[str, list[tuple[int, ...]]] = {
        "grouped_gemm": [(8, 1024, 4, 128, 128), (32, 2048, 4, 256, 256), (64, 2048, 4, 512, 512)],
        "moe_mlp": [(32, 2048, 4, 256, 128), (64, 2048, 4, 512, 256), (32, 2048, 4, 1024, 512)],
        "attention": [(8, 256, 8, 16, 16, 32), (8, 256, 8, 32, 32, 64), (1, 1024, 4, 128, 64, 128)],
        "decoding": [*((rows, 192, 8, 16, 16, 32, 64, 256, 32, 128) for rows in (1, 32)), (1, 4096, 8, 16, 16, 32, 64)],
        "cross_entropy": [(2048, 128, 1024), (2048, 256, 8192), (2048, 256, 32_768)],
        "between_products": [(1, 256), (2048, 256)],
        "linear": [(2048, 256, 256), (2048, 512, 2048), (2048, 1024, 4096)],
        "router": [(2048, 256, 32, 4, 1, 1), (2048, 512, 64, 4, 8, 4)],
        "optim": [(320, 256)],
        "newton_schulz": [(32, 256, 256), (32, 512, 256), (1, 1024, 1024)],
        "fp8_gemm": [()],
    }
    if device == "cuda":
        shapes = {
            "grouped_gemm": [(256, tokens, 8, 7168, 2048) for tokens in (4096, 8192, 32_768)],
            "moe_mlp": [(64, 8192, 6, 2048, 1408)],  # of the 16B model
            "attention": [(2, 4096, 16, 128, 64, 128)],  # of the 16B model
            # of the 16B model, and the attention of the 671B model
            "decoding": [(64, 4096, 16, 128, 64, 128, 512, 2048, 64, 1408), (16, 4096, 128, 128, 64, 128, 512)],
            "cross_entropy": [(8192, 2048, 32_768), (16_384, 7168, 129_280)],
            "between_products": [(8192, 2048), (8192, 7168)],
            "linear": [(8192, 7168, 2048)],
            "router": [(8192, 7168, 256, 8, 8, 4)],
            "optim": [(320, 1024)],
            "newton_schulz": [],  # torch's own there
            "fp8_gemm": [()],
        }
    where = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(f"torch {torch.__version__}, {where}")
    copied = bandwidth(device) if device == "cuda" else None
    if copied is not None:
        print(f"a copy moves {copied / 1e12:.3g} TB/s, read and written")
    rows: list[dict[str, Any]] = []
    for dtype in dtypes:
        best = limit(device, dtype)
        print(f"a square product reaches {best / 1e12:.3g} TFLOP/s in {dtype}")
        for op in makers if asked.op is None else [asked.op]:
            if stored(device, dtype) != dtype and op not in ROUNDED:
                continue
            for shape in shapes[op]:
                for case in makers[op](device, dtype, *shape):
                    for row in measured(case, device, dtype, best, copied):
                        print(said(row), flush=True)
                        rows.append(row)
    if asked.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
