"""Operations of torch.library over the passes that run without a graph, for graphs that torch.compile captures.

Neither C++ nor Triton code of ours, nor what reads the ends of groups, can be traced. So into a graph goes one node,
`torch.ops.gristmill.rms_norm` and the like, which runs the public function, and whose gradient is a node of its own,
`rms_norm_backward`, over the backward pass of the same `torch.autograd.Function`. Each folder's library.py says what
its results look like and what a Function's backward pass is given. Without a graph nothing of this runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

_ours = torch.library.Library("gristmill", "FRAGMENT")  # whose operations last as long as it does


class Context:
    """Stands in for the context that autograd gives to a Function's backward pass."""

    def __init__(self, *saved: Tensor | None, needs: Sequence[bool] = (), **numbers: Any) -> None:
        self.saved_tensors, self.needs_input_grad = saved, needs
        vars(self).update(numbers)


def operation(fake: Callable[..., Any], mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], OpOverload]:
    """Make of a function the operation of its name: `fake` gives the results' shapes, dtypes and layout alone.

    What it mutates of its arguments is named in `mutates`.
    """

    def define(body: Callable[..., Any]) -> OpOverload:
        return _defined(body.__name__, body, torch.library.infer_schema(body, mutates_args=mutates), fake, mutates)

    return define


def gradient(
    forward: OpOverload, *of: str, results: Sequence[int] = (0,), kept: Sequence[int] = (), absent: bool = False
) -> Callable[[Callable[..., Any]], OpOverload]:
    """Make of a function the operation that is the gradient of `forward` in the arguments named in `of`.

    It is given which of these are wanted, the gradients of `results` of `forward`, its results `kept`, and its
    arguments; it returns the gradients in the order of `of`, or none in the place of what is not wanted. Of a result
    that nothing was made of it is given zeros for a gradient, or None where that may be `absent`.
    """
    names = [argument.name for argument in forward._schema.arguments]
    places = [names.index(name) for name in of]

    def define(body: Callable[..., Any]) -> OpOverload:
        def run(needs: list[bool], *given: Any) -> list[Tensor]:
            made = body(needs, *given)
            return [grad.contiguous() for grad, need in zip(made, needs, strict=True) if need]

        def fake(needs: list[bool], *given: Any) -> list[Tensor]:
            inputs = [given[len(given) - len(names) + place] for place in places]
            return [x.new_empty(x.shape) for x, need in zip(inputs, needs, strict=True) if need]

        def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            ctx.mark_non_differentiable(*(o for i, o in enumerate(outputs) if i not in results))
            ctx.save_for_backward(*(outputs[i] for i in kept), *(x if isinstance(x, Tensor) else None for x in inputs))
            ctx.set_materialize_grads(not absent)
            ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]

        def gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            needs, saved = [ctx.needs_input_grad[place] for place in places], ctx.saved_tensors
            inputs = [x if other is None else other for x, other in zip(saved[len(kept) :], ctx.others, strict=True)]
            made = iter(backward(needs, *(grads[i] for i in results), *saved[: len(kept)], *inputs))
            by_place = {place: next(made) for place, need in zip(places, needs, strict=True) if need}
            return tuple(by_place.get(place) for place in range(len(names)))

        run.__signature__ = inspect.signature(body).replace(return_annotation=list[Tensor])
        backward = _defined(body.__name__, run, torch.library.infer_schema(run, mutates_args=()), fake)
        torch.library.register_autograd(forward, gradients, setup_context=keep)
        return backward

    return define


def _defined(
    name: str, body: Callable[..., Any], schema: str, fake: Callable[..., Any], mutates: Sequence[str] = ()
) -> OpOverload:
    body = torch.no_grad()(body)
    torch.library.custom_op(f"gristmill::{name}", body, mutates_args=mutates, schema=schema).register_fake(fake)
    return getattr(torch.ops.gristmill, name).default


def within_passes(name: str, body: Callable[..., Any], fake: Callable[..., Any]) -> OpOverload:
    """Make of a function the operation of this name, for a Function's passes: selective recomputation can keep it.

    Its first call does not load torch.compile, for two seconds, as that of an operation of `custom_op` does.
    """
    _ours.define(name + torch.library.infer_schema(body, mutates_args=()))
    _ours.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gristmill::{name}", fake, lib=_ours)
    return getattr(torch.ops.gristmill, name).default


def with_saved(function: Callable[..., Tensor], arguments: Sequence[Any], of: Sequence[int]) -> tuple[Tensor, Any]:
    """The result, and what a Function saved for the gradients in the arguments `of`; nothing where torch's code ran."""
    given = [x.detach().requires_grad_(i in of) if isinstance(x, Tensor) else x for i, x in enumerate(arguments)]
    with torch.enable_grad():
        result = function(*given)
    return result.detach().contiguous(), getattr(result.grad_fn, "saved_tensors", ())


def not_made(like: Tensor) -> Tensor:
    """Stands for what the compiled code would have kept, where the gradient is torch's. One made of it is infinite."""
    return torch.full_like(like, -torch.inf if like.is_floating_point() else 0)


def gradients_in_torch(function: Callable[..., Any], inputs: Sequence[Tensor], grads: Any) -> Sequence[Tensor]:
    """The gradients in the inputs of what torch's own code makes of them, which runs again for it.

    Inside an operation autograd records nothing, but this does.
    """
    return torch.func.vjp(function, *(x.detach() for x in inputs))[1](grads)


def graded(*tensors: Tensor) -> bool:
    """Whether gradients of one of these will be asked for."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
