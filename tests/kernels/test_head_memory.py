"""What the output head's operation takes of memory, measured by the system in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the most that was taken"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the memory of a CPU"),
]
MEASURE = """
import sys
from pathlib import Path
import torch
from gristmill.kernels.cross_entropy import linear_cross_entropy_mean

def kilobytes(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])

def loss_and_gradients(rows, vocab):
    x, w = torch.ones(rows, 8).requires_grad_(), torch.ones(vocab, 8).requires_grad_()
    target, weight = torch.zeros(rows, dtype=torch.long), torch.full((rows,), 1 / rows)
    Path("/proc/self/clear_refs").write_text("5")  # the most from here on
    before = kilobytes("VmRSS")
    linear_cross_entropy_mean(x, w, target, weight).backward()
    return 1024 * (kilobytes("VmHWM") - before)

loss_and_gradients(100, 300)
for rows, vocab in zip(*2 * [map(int, sys.argv[1:])]):
    gradients = 4 * 8 * (rows + vocab)
    print((loss_and_gradients(rows, vocab) - gradients) / (4 * rows * vocab))
"""


@pytest.mark.parametrize(
    ("path", "shapes"),
    [
        ("", [(2048, 32_768), (2048, 129_280)]),
        ("torch", [(8192, 8192)]),  # which holds at least 128 rows, in several forms
    ],
)
def test_no_more_than_5_percent_of_the_logits_is_held(path: str, shapes: list[tuple[int, int]]) -> None:
    # Each block of memory goes back to the system with its tensor, so that none is held from before; and a thread has
    # some of its own, which counts where there are many
    how = {"GRISTMILL_KERNELS": path, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    numbers = [str(number) for shape in shapes for number in shape]
    done = subprocess.run(
        [sys.executable, "-P", "-c", MEASURE, *numbers],
        capture_output=True,
        text=True,
        env={**os.environ, **how},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shares = [float(share) for share in done.stdout.split()]
    assert len(shares) == len(shapes)
    assert all(0.005 < share < 0.05 for share in shares), shares
