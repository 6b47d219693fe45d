"""What is timed of attention over a cache: a step of decoding, without gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.mla_decode import mla_decode
from gristmill.kernels.mla_decode.reference import mla_decode_reference
from gristmill.kernels.norm_rope.reference import rotate_reference
from gristmill.kernels.timing import Case, Goal, without_gradients

PAGE = 64  # places
LONG = 4096  # places from which on a CPU has a goal
ABSORBED, NOT_ABSORBED = "absorbed, in torch", "not absorbed"


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """On a GPU with the heads of the 16B and of the 671B model."""
    sizes = [(1, 192, 8, 16, 16, 32, 64), (32, 192, 8, 16, 16, 32, 64), (1, 4096, 8, 16, 16, 32, 64)]
    if device == "cuda":
        sizes = [(64, 4096, 16, 128, 64, 128, 512), (16, 4096, 128, 128, 64, 128, 512)]
    for size in sizes:
        yield from _at(device, dtype, *size)


def _at(
    device: str, dtype: torch.dtype, batch: int, places: int, heads: int, plain: int, turning: int, value: int,
    latent: int,
) -> Iterator[Case]:  # fmt: skip
    """A new token a row, at the last place, against the same in torch and against keys and values of all places."""

    def draw(*shape: int) -> Tensor:
        return torch.empty(*shape, device=device, dtype=dtype).normal_(0, shape[-1] ** -0.5)

    angle, start = torch.rand(batch, 1, turning // 2, device=device), torch.full((batch,), places - 1, device=device)
    new = draw(batch, 1, heads, plain + turning), draw(batch, 1, latent + turning)
    given = (*new, draw(batch, places, latent + turning), start, places, (angle.cos(), angle.sin()))
    given = (*given, draw(latent), 1e-6, draw(heads, plain + value, latent), (plain + turning) ** -0.5)
    flops = 2 * batch * heads * (places * (2 * latent + turning) + latent * (plain + value))
    goals = (Goal("speed", 3.0, (NOT_ABSORBED,)),) if device == "cpu" and places >= LONG else ()
    peers = {
        ABSORBED: without_gradients(mla_decode_reference, *given),
        NOT_ABSORBED: without_gradients(_not_absorbed, *given),
    }
    ours, shape, read = without_gradients(mla_decode, *given), f"{batch} × {places}, {heads} heads", given[2].nbytes
    goals = (*goals, *_share_of_copy(device, heads))
    yield Case("mla_decode", shape, flops, ours, peers, goals, bytes=read, captured=True)
    if places % PAGE == 0:
        pages = torch.randperm(batch * places // PAGE, device=device)  # in no order
        paged = (*given[:2], given[2].view(-1, PAGE, latent + turning), *given[3:], pages.view(batch, -1))
        peers, shape = {"a slot a row": ours}, f"{shape}, {PAGE} a page"
        paged = without_gradients(mla_decode, *paged)
        yield Case("mla_decode, paged", shape, flops, paged, peers, bytes=read, captured=True)
    if device == "cuda":
        yield _cache_alone(given, draw(heads, batch, latent), draw(batch, heads, turning))


def _share_of_copy(device: str, heads: int) -> tuple[Goal, ...]:
    """With more heads, products take as long as reading."""
    return (Goal("share of copy", 0.7),) if device == "cuda" and heads <= 16 else ()


def _cache_alone(given: tuple[Any, ...], q_HTC: Tensor, turned_THR: Tensor) -> Case:
    """The part that reads the cache, without what is new and the products around it."""
    from gristmill.kernels.mla_decode.gpu import attend

    cache_BPC, start_B, reach, scale = given[2], given[3], given[4], given[9]
    heads, batch, latent = q_HTC.shape
    query_BHC = torch.cat((q_HTC.transpose(0, 1), turned_THR), -1)

    def in_torch() -> Tensor:
        weight_BHP = (torch.bmm(query_BHC, cache_BPC.mT) * scale).float().softmax(-1).to(cache_BPC.dtype)
        return torch.bmm(weight_BHP, cache_BPC[..., :latent])

    return Case(
        "mla_decode, cache",
        f"{batch} × {reach}, {heads} heads",
        2 * batch * heads * reach * (cache_BPC.shape[2] + latent),
        lambda: attend(q_HTC, turned_THR, cache_BPC, start_B, reach, scale),
        {ABSORBED: in_torch},
        _share_of_copy("cuda", heads),
        bytes=cache_BPC.nbytes,
        captured=True,
    )


def _not_absorbed(
    q_BSHQ: Tensor, kv_BSY: Tensor, cache_BPC: Tensor, start_B: Tensor, reach: int, rotary: tuple[Tensor, Tensor],
    norm_C: Tensor, eps: float, up_HXC: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """`mla_decode` of one token a row, which sees all places, by torch's attention over keys and values held whole."""
    (heads, wide), latent, (cos, sin) = q_BSHQ.shape[2:], len(norm_C), rotary
    plain = wide - kv_BSY.shape[2] + latent
    new_BSC = F.rms_norm(kv_BSY[..., :latent], norm_C.shape, norm_C, eps)
    cache_BPC[:, -1:] = torch.cat((new_BSC, rotate_reference(kv_BSY[..., latent:], cos, sin).to(new_BSC.dtype)), -1)
    made_BPHX = F.linear(cache_BPC[..., :latent], up_HXC.flatten(0, 1)).unflatten(-1, (heads, -1))
    shared_BPHR = cache_BPC[:, :, None, latent:].expand(-1, -1, heads, -1)
    k_BPHQ, v_BPHW = torch.cat((made_BPHX[..., :plain], shared_BPHR), -1), made_BPHX[..., plain:]
    turned = rotate_reference(q_BSHQ[..., plain:], cos[:, :, None], sin[:, :, None]).to(q_BSHQ.dtype)
    q, k, v = (t.transpose(1, 2) for t in (torch.cat((q_BSHQ[..., :plain], turned), -1), k_BPHQ, v_BPHW))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).flatten(2)
