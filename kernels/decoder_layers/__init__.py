"""A few new tokens through blocks of the transformer in one call: what decoding does between an embedding and logits.

Of one or two tokens the products take less time than the starting of the operations that make up a layer. On a CPU in
float32 `cpu.cpp` therefore runs all layers, with latent attention over a cache and a dense FFN or experts, and the head
behind them. There is no other path: where `runs` says no, the caller starts the layers' operations one by one.
reference.py is the same in plain torch. What a token gives does not depend, to the bit, on those beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gristmill.kernels.compiled import needed
from gristmill.kernels.dispatch import chosen, require, require_device, require_ranks
from gristmill.kernels.linear import LEAST_ROWS
from gristmill.kernels.router import Choice

__all__ = ["DecoderLayers", "LayerWeights", "MtpWeights", "Shape", "runs"]
SOURCE = "decoder_layers/cpu.cpp"


@dataclass(frozen=True)
class LayerWeights:
    """A block's weights, float32: its latent attention, and one FFN (no gate) or routed and perhaps shared experts.

    Matrices are (out, in); Q is the latent of the queries, where they have one.
    """

    attention_norm_D: Tensor
    first_XD: Tensor  # queries or their latents, and below them the latents of keys and values and the shared key
    query_norm_Q: Tensor | None
    query_up_XQ: Tensor | None
    latent_norm_C: Tensor
    up_HXC: Tensor  # what makes keys and values of a latent, (H, N + W, C), keys first
    out_DX: Tensor
    ffn_norm_D: Tensor
    gate_up: Tensor  # (2F, D), or of all experts, (E, 2F, D)
    down: Tensor  # (D, F), or of all experts, (E, D, F)
    gate_ED: Tensor | None = None
    bias_E: Tensor | None = None
    shared_gate_up: Tensor | None = None
    shared_down: Tensor | None = None


@dataclass(frozen=True)
class MtpWeights:
    """What an MTP module has before its block."""

    hidden_norm_D: Tensor
    embedding_norm_D: Tensor
    join_DX: Tensor  # (D, 2 D), of the embedding first


@dataclass(frozen=True)
class Shape:
    """The numbers that all layers share.

    Attributes:
        plain: width of a head without rotation; turning: with it; value: of its values.
        query_rank: width of the queries' latent, 0 where they have none.
        experts: routed ones, 0 where no layer has any.
        scale: what the products of queries and keys are multiplied by.
    """

    width: int
    heads: int
    plain: int
    turning: int
    value: int
    latent: int
    query_rank: int
    experts: int
    choice: Choice
    eps: float
    latent_eps: float
    scale: float

    def integers(self) -> list[int]:
        """As the source has them."""
        c = self.choice
        attention = [self.width, self.heads, self.plain, self.turning, self.value, self.latent, self.query_rank]
        return [*attention, self.experts, c.chosen, c.groups, c.groups_allowed, c.affinity == "sigmoid", c.normalised]


def runs(x: Tensor, tokens: int) -> bool:
    """Whether so many tokens go through all layers in one call, given a tensor of their kind; the choice is counted."""
    return chosen("decoder_layers", x, SOURCE if 0 < tokens < LEAST_ROWS else None, triton=None) == "compiled"


class DecoderLayers:
    """Layers and a head whose weights' places were taken down once: changed in place they are seen, replaced not.

    Raises:
        TypeError: a weight is not float32 on a CPU.
        ValueError: a weight's numbers do not lie one behind the other, or its size is not what the shape says.
    """

    def __init__(
        self, layers: Sequence[LayerWeights], shape: Shape, turn_SR: tuple[Tensor, Tensor], head: tuple[Tensor, Tensor]
    ) -> None:
        """With the cosines and sines of all positions, (S, R/2) each; a head is its norm, (D,), and matrix, (V, D)."""
        self.layers, self.shape, self.turn_SR, self.head = list(layers), shape, turn_SR, head
        for number, layer in enumerate(layers):
            _check(layer, shape, f"layer {number}")
        for name, tensor, width in (
            ("cosines", turn_SR[0], shape.turning // 2), ("sines", turn_SR[1], shape.turning // 2),
            ("norm", head[0], shape.width), ("head", head[1], shape.width),
        ):  # fmt: skip
            require(tensor.shape[-1] == width, ValueError, f"decoder_layers: width of {name}", tensor.shape[-1], width)
            _check_tensor(tensor, name)
        self._table = torch.tensor([_row(layer) for layer in layers], dtype=torch.int64, device="cpu")
        self._sizes = torch.tensor(shape.integers(), dtype=torch.int64, device="cpu")
        self._numbers = tuple(map(float, (shape.eps, shape.latent_eps, shape.scale, shape.choice.scale)))

    def through(
        self, x_BSD: Tensor, start_B: Tensor, cache_LBPC: Tensor, asked_B: Tensor | None = None, *,
        table_BJ: Tensor | None = None, logits: bool = True,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """What the last layer gives of new tokens, (B, S, D), and their logits, (B, S, V), where these are wanted.

        Args:
            x_BSD: the tokens' embeddings, or what else the first layer reads.
            start_B: the place of each row's first token in its slot, int64.
            cache_LBPC: the layers' slots, (L, B, P, C + R), written at the tokens' places; with a table, pages of P
                places, as many as there are for all rows.
            table_BJ: the page of each P places of a row, in order, int64, (B, J), the same of all layers; what stands
                behind a row's last token is not looked at.
            asked_B: which one of its tokens each row is asked for, int64, where there is one layer; the others only
                leave in the cache what it keeps of them, and the results are (B, 1, D) and (B, 1, V).

        Raises:
            TypeError: x or the cache is not float32, or places or pages are not int64.
            ValueError: shapes do not fit, a tensor is not on the CPU, a place is not within the slots or past the
                angles, a token that is asked for is not among its row's, a row's page is none of the cache.
        """
        if (x_BSD.ndim, cache_LBPC.ndim) != (3, 4):
            require_ranks("decoder_layers", x_BSD=(x_BSD, 3), cache_LBPC=(cache_LBPC, 4))
        (batch, length, width), n = x_BSD.shape, self.shape
        (layers, slots, places, cached), (layer_stride, slot, *inside) = cache_LBPC.shape, cache_LBPC.stride()
        if table_BJ is not None:
            require_ranks("decoder_layers", table_BJ=(table_BJ, 2))
            require(len(table_BJ) == batch, ValueError, "decoder_layers: rows of table_BJ", len(table_BJ), batch)
        rows, most = (slots, places) if table_BJ is None else (batch, table_BJ.shape[1] * places)
        fits = (layers, rows, cached, width) == (len(self.layers), batch, n.latent + n.turning, n.width)
        fits = fits and inside == [cached, 1] and start_B.shape == (batch,)
        fits = fits and (asked_B is None or (layers == 1 and asked_B.shape == (batch,)))
        if not fits:
            got = tuple(x_BSD.shape), tuple(start_B.shape), tuple(cache_LBPC.shape), cache_LBPC.stride()
            wanted = f"x_BSD, start_B, cache_LBPC and, of one layer, asked_B of {len(self.layers)} of {n}"
            raise ValueError(f"decoder_layers: x, start and cache are {got}; wanted {wanted}")
        for name, tensor in (("start_B", start_B), ("asked_B", asked_B), ("table_BJ", table_BJ)):
            if tensor is not None and tensor.dtype != torch.int64:
                raise TypeError(f"decoder_layers: places of {name} are {tensor.dtype}; wanted {torch.int64}")
        if not x_BSD.dtype == cache_LBPC.dtype == torch.float32:
            got = f"x is {x_BSD.dtype}, the cache {cache_LBPC.dtype}"
            raise TypeError(f"decoder_layers: {got}; wanted x_BSD and cache_LBPC in {torch.float32}")
        require_device(
            "decoder_layers", "the weights", self.head[0], x_BSD=x_BSD, start_B=start_B, cache_LBPC=cache_LBPC,
            asked_B=asked_B, table_BJ=table_BJ,
        )  # fmt: skip
        answers = length if asked_B is None else 1
        out_BSD = x_BSD = x_BSD.clone(memory_format=torch.contiguous_format)  # the source overwrites it
        if asked_B is not None:
            out_BSD = x_BSD.new_empty(batch, 1, width)
        norm_D, head_VD = self.head
        logits_BSV = x_BSD.new_empty(batch, answers, len(head_VD)) if logits else None
        table = (None, 0, 0, 0) if table_BJ is None else (table_BJ.contiguous(), table_BJ.shape[1], places, slots)
        failed = needed(SOURCE)(
            "layers", x_BSD, self._table, layers, self._sizes, *self._numbers, start_B.contiguous(), batch, length,
            *self.turn_SR, cache_LBPC, layer_stride, slot, *table, min(most, len(self.turn_SR[0])),
            asked_B.contiguous() if asked_B is not None else None, out_BSD, norm_D, head_VD if logits else None,
            logits_BSV, len(head_VD),
        )  # fmt: skip
        if failed:
            got = f"{start_B.tolist()} of {length} tokens, {None if asked_B is None else asked_B.tolist()} asked for"
            pages = "" if table_BJ is None else f", in pages {table_BJ.tolist()} of {slots}"
            raise ValueError(
                f"decoder_layers: places are {got}{pages}; wanted them within {most} and the rotary angles"
            )
        return out_BSD, logits_BSV


def joined(hidden_BSD: Tensor, embedding_BSD: Tensor, norm_D: Tensor, weights: MtpWeights, eps: float) -> Tensor:
    """What an MTP module's block reads (V3 equation 21), of states before the final norm, whose weight is norm_D.

    Raises:
        TypeError: a tensor is not float32 on a CPU.
        ValueError: shapes do not fit, or a weight's numbers do not lie one behind the other.
    """
    shape = embedding_BSD.shape
    if hidden_BSD.shape != shape:
        got = tuple(hidden_BSD.shape)
        raise ValueError(f"joined: shape of hidden_BSD is {got}; wanted that of embedding_BSD, {tuple(shape)}")
    wanted = (shape[-1], 2 * shape[-1])
    require(weights.join_DX.shape == wanted, ValueError, "joined: shape of join_DX", weights.join_DX.shape, wanted)
    given = (norm_D, weights.hidden_norm_D, weights.embedding_norm_D, weights.join_DX)
    for name, norm in zip(("norm_D", "hidden_norm_D", "embedding_norm_D"), given[:3], strict=True):
        require(norm.shape == shape[-1:], ValueError, f"joined: shape of {name}", norm.shape, shape[-1:])
        _check_tensor(norm, name, "joined")
    _check_tensor(weights.join_DX, "join_DX", "joined")
    for name, states in (("hidden_BSD", hidden_BSD), ("embedding_BSD", embedding_BSD)):
        _check_kind(states, name, "joined")
    out_BSD, rows = hidden_BSD.new_empty(shape), hidden_BSD.numel() // shape[-1]
    needed(SOURCE)(
        "join", hidden_BSD.contiguous(), embedding_BSD.contiguous(), *given, out_BSD, rows, shape[-1], float(eps)
    )
    return out_BSD


def _row(layer: LayerWeights) -> list[int]:
    """A layer of the table: its weights' addresses, and the hidden widths of its FFN and of the shared experts."""
    weights = [getattr(layer, field.name) for field in fields(layer)]
    places = [0 if weight is None else weight.data_ptr() for weight in weights]
    return [*places, layer.down.shape[-1], 0 if layer.shared_down is None else layer.shared_down.shape[-1]]


def _check(layer: LayerWeights, n: Shape, where: str) -> None:
    """Every weight is of the size that the source reads."""
    query, hidden = n.heads * (n.plain + n.turning), layer.down.shape[-1]
    experts = () if layer.gate_ED is None else (n.experts,)
    shared = 0 if layer.shared_down is None else layer.shared_down.shape[-1]
    wanted: dict[str, tuple[int, ...] | None] = {
        "attention_norm_D": (n.width,),
        "first_XD": ((n.query_rank or query) + n.latent + n.turning, n.width),
        "query_norm_Q": (n.query_rank,) if n.query_rank else None,
        "query_up_XQ": (query, n.query_rank) if n.query_rank else None,
        "latent_norm_C": (n.latent,),
        "up_HXC": (n.heads, n.plain + n.value, n.latent),
        "out_DX": (n.width, n.heads * n.value),
        "ffn_norm_D": (n.width,),
        "gate_up": (*experts, 2 * hidden, n.width),
        "down": (*experts, n.width, hidden),
        "gate_ED": (n.experts, n.width) if experts else None,
        "bias_E": (n.experts,) if experts else None,
        "shared_gate_up": (2 * shared, n.width) if shared and experts else None,
        "shared_down": (n.width, shared) if shared and experts else None,
    }
    for name, shape in wanted.items():
        weight = getattr(layer, name)
        got = None if weight is None else tuple(weight.shape)
        require(got == shape, ValueError, f"decoder_layers: shape of {name} of {where}", got, shape)
        if weight is not None:
            _check_tensor(weight, f"{name} of {where}")


def _check_tensor(tensor: Tensor, name: str, operation: str = "decoder_layers") -> None:
    _check_kind(tensor, name, operation)
    require(tensor.is_contiguous(), ValueError, f"{operation}: {name}", tensor.stride(), "contiguous")


def _check_kind(tensor: Tensor, name: str, operation: str) -> None:
    kind = tensor.dtype, tensor.device.type
    require(kind == (torch.float32, "cpu"), TypeError, f"{operation}: {name}", kind, (torch.float32, "cpu"))
