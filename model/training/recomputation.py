"""Activation checkpointing: a block's activations are dropped after the forward pass and computed again.

It is laid around the blocks from outside. `full` keeps a block's input alone; `selective` keeps the results of
attention too, and those of torch's matrix products (a GPU's in float32 and bfloat16, outside of the experts), as
Korthikanti et al. 2022 (arXiv 2205.05198) propose. Our own products, of the experts, in FP8 and on CPUs, are computed
again with what is cheap (norms, rotation, SwiGLU). The numbers are those of a run without it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from gristmill.model.transformer import Block, Routing, Transformer

KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.gristmill.attention_compiled.default,  # on a CPU in float32: kernels/mla_attention
    torch.ops.gristmill.attention_in_triton.default,  # on a GPU in 16 bits
}


def recompute_blocks(model: Transformer, how: Literal["selective", "full"]) -> None:
    """Let every block of the model, those of the MTP modules too, compute its activations twice."""
    blocks = [*model.layers, *(module.block for module in model.mtp)]
    for block in blocks:
        assert isinstance(block, Block)
        block.forward = partial(_recomputed, type(block).forward.__get__(block), how)  # type: ignore[method-assign]


def _recomputed(
    forward: Any,
    how: str,
    x_BSD: Tensor,
    rotary: tuple[Tensor, Tensor],
    first_BS: Tensor | None,
    routing: Routing | None,
) -> Tensor:
    def run(x_BSD: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        own = Routing()  # the second pass decides again, and is not counted
        return forward(x_BSD, rotary, first_BS, own), own.load_LE, own.balance_loss

    contexts = partial(create_selective_checkpoint_contexts, _policy) if how == "selective" else noop_context_fn
    out_BSD, load_LE, balance_loss = checkpoint(run, x_BSD, use_reentrant=False, context_fn=contexts)
    if routing is not None:
        routing.load_LE += load_LE
        routing.balance_loss += balance_loss
    return out_BSD


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
