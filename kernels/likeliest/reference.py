"""The same in plain torch."""

from __future__ import annotations

from torch import Tensor


def likeliest_reference(logits: Tensor) -> tuple[Tensor, Tensor]:
    """See `likeliest`."""
    token, logits = logits.argmax(-1), logits.float()
    return token, logits.gather(-1, token[..., None])[..., 0] - logits.logsumexp(-1)
