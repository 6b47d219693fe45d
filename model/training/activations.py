"""What blocks hold of a forward pass for the backward one, as arithmetic: by what our operations save, path by path.

A product in 16 or 8 bits keeps its operand so, each its own copy; in float32 it keeps what it was given. Norms, the
residual stream and the gate are float32 throughout (precision.py). The experts keep what their first product gave, and
neither their rows nor what comes after it (kernels/moe_mlp); in FP8 these are operations of their own, which do.
"""

from __future__ import annotations

from dataclasses import dataclass

from gristmill.model.config import ModelConfig
from gristmill.model.training.config import LayoutConfig, Precision

FLOAT, INDEX = 4, 8  # bytes
FILLED = 1.25  # rows of FP8's transposed operand, each expert's filled up to whole blocks of 128, over the rows


@dataclass(frozen=True)
class Kept:
    """Bytes a token that a block holds beside its input.

    Attributes:
        attended: what attention gave.
        products: results of products outside of the experts.
        last: results of such products that nothing needs behind them, which selective recomputing keeps all the same.
        rest: all else.
        passing: what its backward pass makes and lets go, at most.
    """

    attended: float
    products: float
    last: float
    rest: float
    passing: float = 0

    @property
    def all(self) -> float:
        """Without recomputing."""
        return self.attended + self.products + self.rest

    def kept_selectively(self, precision: Precision, device: str) -> float:
        """Of products torch's own alone: those of a GPU in float32 and bfloat16 (recomputation.py)."""
        return self.attended + (self.products + self.last if device == "cuda" and precision != "fp8" else 0)


def activations(
    model: ModelConfig, tokens: int, layout: LayoutConfig, precision: Precision, device: str, mtp_modules: int
) -> int:
    """Bytes that the blocks keep; where they are computed again, of one block all the same."""
    dense, width = model.first_k_dense_replace, model.hidden_size
    apart = layout.expert_parallel > 1
    of_dense, of_sparse = (kept(model, is_dense, precision, device, apart=apart) for is_dense in (True, False))
    blocks = [*[of_dense] * dense, *[of_sparse] * (model.num_hidden_layers - dense)]
    blocks += [blocks[-1]] * mtp_modules
    inputs = FLOAT * width * (len(blocks) + 3 * mtp_modules) + _operand(precision, device) * 2 * width * mtp_modules
    largest = max(block.all for block in blocks)
    if layout.recompute == "full":
        held = largest
    elif layout.recompute == "selective":
        held = sum(block.kept_selectively(precision, device) for block in blocks) + largest
    else:
        held = sum(block.all for block in blocks)
    return int(tokens * (inputs + held + max(block.passing for block in blocks)))


def result_bytes(precision: Precision, device: str) -> int:
    """Of a number that a product gives; in FP8 that is bfloat16 on every device, on a CPU else float32."""
    return 2 if precision == "fp8" or (precision == "bfloat16" and device == "cuda") else FLOAT


def _operand(precision: Precision, device: str) -> int:
    """Of a number of its operand that a product keeps."""
    return 1 if precision == "fp8" else result_bytes(precision, device)


def kept(model: ModelConfig, dense: bool, precision: Precision, device: str, *, apart: bool = False) -> Kept:
    """Of one block, with a dense FFN or with experts, which may be shared out over ranks."""
    attention = _of_attention(model, precision, device)
    ffn = _of_dense(model, precision, device) if dense else _of_experts(model, precision, device, apart)
    residual = FLOAT * model.hidden_size  # behind attention, before the second norm
    rest = attention.rest + ffn.rest + residual
    return Kept(attention.attended, attention.products + ffn.products, attention.last + ffn.last, rest, ffn.passing)


def _of_attention(model: ModelConfig, precision: Precision, device: str) -> Kept:
    result, operand = result_bytes(precision, device), _operand(precision, device)
    width, heads, head, copies = model.hidden_size, model.num_attention_heads, model.head_width, result < FLOAT
    values = heads * (model.v_head_dim if model.attention == "mla" else head)
    logs = FLOAT * heads
    of_last = operand * values if precision == "fp8" else 0  # else the result of attention itself
    last = result * width
    if model.attention == "gqa":
        groups = model.num_key_value_heads or heads
        inputs = operand * width * (3 if copies else 1)
        normed = FLOAT * (heads + groups) * head if model.qk_norm else 0
        projected = result * (heads + 2 * groups) * head
        return Kept(result * values + logs, projected, last, inputs + normed + of_last)
    latent, turning = model.kv_lora_rank + (model.q_lora_rank or 0), model.qk_rope_head_dim
    inputs = operand * width * (2 if copies else 1)
    latents = (FLOAT + operand) * latent  # before and behind their norms
    whole = device == "cuda" and not copies  # torch's own attention keeps queries and keys as it multiplies them
    keys = head if whole else model.qk_nope_head_dim
    turned = (result * (heads + 1) + 2 * FLOAT) * turning if copies else (2 * FLOAT) * turning
    projected = result * (heads * (head + keys) + values)
    return Kept(result * values + logs, projected, last, inputs + latents + turned + of_last)


def _of_dense(model: ModelConfig, precision: Precision, device: str) -> Kept:
    result, operand = result_bytes(precision, device), _operand(precision, device)
    hidden, width = model.intermediate_size, model.hidden_size
    return Kept(0, result * 2 * hidden, result * width, operand * (hidden + width), result * (3 * hidden + width))


def _of_experts(model: ModelConfig, precision: Precision, device: str, apart: bool) -> Kept:
    result, operand = result_bytes(precision, device), _operand(precision, device)
    chosen, hidden, width = model.num_experts_per_tok, model.moe_intermediate_size, model.hidden_size
    shared, copies = model.n_shared_experts * hidden, result < FLOAT
    gate = FLOAT * (width + 2 * model.n_routed_experts) + chosen * (2 * INDEX + FLOAT)  # its input, in float32
    rows = operand * width if copies else 0
    if precision == "fp8":  # the rows' operand, the results that gates weigh, and where rows came from
        rows = chosen * (FILLED * operand * width + result * width + INDEX)
    if apart and precision != "fp8":  # what arrived in place of the tokens, and came back (expert_parallel.py)
        rows = chosen * (operand + result) * width
    rows += 3 * INDEX * chosen if apart else 0  # where rows lie on both sides
    of_shared = (operand * width if copies else 0) + operand * shared if shared else 0
    rest = gate + rows + of_shared + result * 2 * chosen * hidden
    # The gradient's rows, and what is activated; slopes lie over what was kept
    passing = result * chosen * (hidden + width) + (2 * FLOAT * chosen * width if apart else 0)
    if precision == "fp8":  # slopes, the rows of x's gradient, and both sides' operands
        passing += chosen * (result * (2 * hidden + width) + FILLED * operand * (2 * hidden + width))
    return Kept(0, result * 2 * shared, result * width if shared else 0, rest, passing)
