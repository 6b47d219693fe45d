"""DeepSeek's FP8 checkpoints: E4M3 weights with one float32 scale for each block of 128 × 128 (V3 section 3.3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
LARGEST = 448.0  # of E4M3
SCALES = "_scale_inv"  # behind the name of a weight: the tensor of its scales


def quantised(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 values (O, I) and scales (⌈O/128⌉, ⌈I/128⌉): the weight is about value · scale of its block.

    The scale makes the largest value of a block 448; a block of zeros has scale 1.
    """
    rows, columns = weight_OI.shape
    padded = F.pad(weight_OI.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK)
    scale = blocks.abs().amax((1, 3)) / LARGEST
    scale = torch.where(scale == 0, 1.0, scale)
    values = (blocks / scale[:, None, :, None]).view_as(padded)[:rows, :columns]
    return values.to(torch.float8_e4m3fn), scale


def dequantised(value_OI: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (O, I) that values and scales stand for.

    Raises:
        ValueError: the scales are not one for each block.
    """
    rows, columns = value_OI.shape
    expected = (-(-rows // BLOCK), -(-columns // BLOCK))
    if tuple(scale.shape) != expected:
        raise ValueError(f"scales of shape {tuple(scale.shape)} for a weight of {(rows, columns)}: {expected} expected")
    made = torch.empty(value_OI.shape, dtype=dtype)
    for block, scale_I in enumerate(scale):  # a row of blocks at a time: all in float32 takes much
        own = slice(block * BLOCK, (block + 1) * BLOCK)
        made[own] = value_OI[own].float() * scale_I.repeat_interleave(BLOCK)[:columns]
    return made


def is_quantised(name: str) -> bool:
    """Whether DeepSeek's releases hold this weight in FP8: the blocks' matrices, but no gate, norm or embedding."""
    inside = ".self_attn." in name or ".mlp." in name
    return inside and name.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight"))
