"""What ended a job, as a sentence that says what to change, and whether trying again can help."""

from __future__ import annotations

import re
from pathlib import Path

MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory|MemoryError", re.IGNORECASE)
PORT = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)
NUMBER_OF_PORT = re.compile(r"port: (\d+)|:(\d+)")
SPARING = (
    "what takes less: more execution.layout.micro_batches, recompute (selective or full), a higher zero_stage over "
    "more ranks, offload, or fewer or shorter sequences in a batch; `gristmill plan` prints the estimate"
)


def sentence(error: BaseException) -> str:
    """The error of a rank, with what to change where its own words leave that open."""
    said = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or MEMORY.search(said):
        return f"out of memory ({said.splitlines()[0]}); {SPARING}"
    if PORT.search(said):
        number = next((one or other for one, other in NUMBER_OF_PORT.findall(said)), "where the ranks meet")
        return f"port {number} is taken by another process: end that one, or set MASTER_PORT to a free port"
    return said


def may_pass(error: BaseException) -> bool:
    """Whether trying again can help: the same input is refused again, and the same numbers diverge again."""
    return not isinstance(error, ValueError | ArithmeticError | MemoryError) and not MEMORY.search(str(error))


def kills_for_memory(counters: Path = Path("/proc/vmstat")) -> int:
    """How many processes the kernel has ended for want of memory since the machine's start; 0 where it does not say."""
    lines = counters.read_text(encoding="ascii").splitlines() if counters.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
