"""What is timed of greedy decoding's choice."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from gristmill.kernels.likeliest import likeliest
from gristmill.kernels.likeliest.reference import likeliest_reference
from gristmill.kernels.timing import Case


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Against torch's operations; a GPU has nothing else."""
    for rows, columns in [] if device == "cuda" else [(1, 32_768), (32, 32_768)]:
        logits = torch.randn(rows, columns, device=device, dtype=dtype)
        peers = {"log_softmax and max": partial(likeliest_reference, logits)}
        ours = partial(likeliest, logits)
        yield Case("likeliest", f"{rows} × {columns}", 4 * logits.numel(), ours, peers, bytes=logits.nbytes)
