"""Tells whoever waits for this process that it compiles a kernel, which takes seconds in which it says nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_told: list[Callable[[], None]] = []


def announce() -> None:
    """A kernel is about to be compiled, or is now."""
    for call in _told:
        call()


def tell(call: Callable[[], None]) -> None:
    """Call this right before and right after each compilation: of a C++ source, of a Triton kernel on a GPU.

    It is called in whichever thread runs the operation: autograd's, in a backward pass.
    """
    if call not in _told:
        _told.append(call)
    if torch.cuda.is_available():
        from triton import knobs

        for hook in ("jit_cache_hook", "jit_post_compile_hook"):
            before = getattr(knobs.runtime, hook)
            if not isinstance(before, _Announcing):
                setattr(knobs.runtime, hook, _Announcing(before))


class _Announcing:
    """A hook of Triton's around the one that was there; what that says counts."""

    def __init__(self, inner: Callable[..., bool | None] | None) -> None:
        self.inner = inner

    def __call__(self, **told: Any) -> bool | None:
        announce()
        return self.inner(**told) if self.inner is not None else None
