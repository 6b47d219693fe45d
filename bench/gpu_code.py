"""What a GPU would get of the kernels, without one: `python -P bench/gpu_code.py [--op NAME …] [--json]`.

Every case of `kernels.bench` for a GPU runs on tensors without numbers, at its full size. Whatever Triton would launch
is compiled for a Hopper GPU, down to its machine code, and is not launched. So this says, on any machine:

- whether each kernel compiles, fits into a multiprocessor's shared memory, and with how many registers; how many bytes
  of a thread's own memory it takes, which is where registers are spilled to; how many products go to tensor cores
  (`wgmma`) and how many copies to the copy engine (`tma`), as instructions of the program;
- loads from memory that products wait for at every turn of their loop (kernels/machine_code.py);
- whether any operation looks at a number, for which a GPU would be waited for (an error here, under the case's name);
- the most bytes that an operation holds at a time beyond its inputs, and beside it the peer that a goal of memory
  names; results (gradients) are left out where the case says their size. They are those of torch's tensors, in blocks
  of 512 as torch's allocator has them. What libraries take for themselves, such as cuBLAS, is not known here.

It says nothing of time, and nothing of what is computed: for that there are Triton's interpreter and GPUs.

With `--json` the last line is an object: `kernels` (op, shape, kernel, registers, spilled, shared, warps, wgmma, tma,
waits), `memory` (op, shape, side, bytes), `goals` of memory (op, shape, peer, ratio, goal, met), `triton`.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import subprocess
import tempfile
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

NAME, CAPABILITY, PROCESSORS = "NVIDIA H100 80GB HBM3", (9, 0), 132
MOST_SHARED = 227 << 10  # bytes of a multiprocessor that one program may have
SAID = 4  # of a kernel's waits
BLOCK = 512  # bytes; of torch's allocator on a GPU
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
Row = dict[str, Any]
launched: set[JITFunction] = set()
"""The kernels that a GPU would have run so far."""


class Driver:
    """What Triton asks about the device that is not here."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class OnThisMachine(TorchFunctionMode):
    """Tensors that are asked for on a GPU are made where torch can make them; they say that they are on one.

    While inputs are made and peers run, which may look at numbers, counting gives as many as it is told are the least.
    """

    preparing = True

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = dict(named or {})
        if str(named.get("device", "")).startswith("cuda"):
            named["device"] = "cpu"
        if self.preparing and function in (torch.bincount, torch.Tensor.bincount):
            return torch.zeros(named["minlength"], dtype=torch.int64)
        arguments = tuple("cpu" if isinstance(given, str) and given == "cuda" else given for given in arguments)
        return function(*arguments, **named)


class Held(TorchDispatchMode):
    """Bytes of all tensors that are made within it and still there, and the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        made = function(*arguments, **(named or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((arguments, named)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        if key in self.known:
            return

        def gone(_: Any) -> None:
            del self.known[key]
            self.now -= size

        self.known[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


def pretend() -> list[Row]:
    """From here on this process takes tensors without numbers for a GPU's; what is compiled is put into the list."""
    compiled: list[Row] = []
    seen: set[str] = set()
    run = JITFunction.run

    def compile_only(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        launched.add(self)
        kernel: Any = run(self, *arguments, grid=grid, warmup=True, **named)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            compiled.append({"kernel": self.fn.__name__, **resources(kernel)})
        return kernel

    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION is unset")
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # what fails is said below
    driver.set_active(Driver())  # type: ignore[arg-type]
    JITFunction.run = compile_only  # type: ignore[method-assign]
    FakeTensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment]
    FakeTensor.is_cpu = property(lambda tensor: False)  # type: ignore[assignment]
    about = SimpleNamespace(multi_processor_count=PROCESSORS, major=CAPABILITY[0], minor=CAPABILITY[1], name=NAME)
    torch.cuda.get_device_properties = lambda *_: about  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *_: CAPABILITY  # type: ignore[assignment]
    torch.cuda.get_device_name = lambda *_: NAME  # type: ignore[assignment]
    from gristmill.kernels import tiles
    from gristmill.kernels.mla_attention import operation

    operation.attend = operation.attend_directly  # torch would only ask what shapes it gives
    tiles.tuned = lambda kernel, device, usual: tiles._found(tiles.FILE, kernel, NAME, usual)
    return compiled


def resources(kernel: Any) -> Row:
    """What a compiled kernel takes."""
    from gristmill.kernels import machine_code

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def told(tool: str, how: str) -> str:
            return subprocess.run([TOOLS / tool, how, file.name], capture_output=True, text=True, check=True).stdout

        said = told("cuobjdump", "--dump-resource-usage")
        listing = told("nvdisasm", "-c") if "mma" in kernel.asm["ptx"] else ""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
    if found is None:
        raise RuntimeError(f"cuobjdump says of no kernel what it takes: {said}")
    registers, stack, local = map(int, found.groups())
    program = kernel.asm["ptx"]
    return {
        "registers": registers,
        "spilled": stack + local,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "wgmma": program.count("wgmma.mma_async"),
        "tma": program.count("cp.async.bulk.tensor"),
        "waits": machine_code.waits(listing),
    }


@contextmanager
def without_numbers() -> Iterator[OnThisMachine]:
    with FakeTensorMode(), OnThisMachine() as mode:
        yield mode


def most_held(work: Any) -> int:
    """Most bytes held while it works, beyond what was there."""
    with Held() as held:
        kept = work()
    del kept
    return held.most


@dataclass
class Found:
    """What is said of some cases."""

    kernels: list[Row] = field(default_factory=list)
    memory: list[Row] = field(default_factory=list)
    goals: list[Row] = field(default_factory=list)


def look_at(names: list[str], compiled: list[Row]) -> Found:
    """Every case of these operations, said as they come."""
    from gristmill.kernels.bench import OPERATIONS, cases_of

    found = Found()
    with without_numbers() as mode:
        for folder, operations in OPERATIONS.items():
            for name in names:
                if name not in (folder, *operations):
                    continue
                for case in cases_of(folder, name, "cuda", torch.bfloat16):
                    print(f"{case.op}, {case.shape}", flush=True)
                    _take(case, found, compiled, mode)
    return found


def _take(case: Any, found: Found, compiled: list[Row], mode: OnThisMachine) -> None:
    """One case: ours, and the peers that a goal of memory names."""
    from gristmill.kernels.timing import OURS

    goals = [goal for goal in case.goals if goal.metric == "memory"]
    common, held = {"op": case.op, "shape": case.shape}, {}
    for side in (OURS, *(peer for goal in goals for peer in goal.peers)):
        mode.preparing = side != OURS  # torch's own counting may wait for a GPU
        try:
            held[side] = most_held(case.ours if side == OURS else case.peers[side]) - case.results
        finally:
            mode.preparing = True
        found.memory.append({**common, "side": side, "bytes": held[side]})
        print(f"    holds {held[side] / 2**20:10.1f} MiB   {side}", flush=True)
    for goal in goals:
        peer, whole = goal.whole or (goal.peers[0], held[goal.peers[0]])
        ratio = held[OURS] / whole
        found.goals.append({**common, "peer": peer, "ratio": ratio, "goal": goal.value, "met": ratio <= goal.value})
        print(f"    {ratio:.3f} of {peer}; at most {goal.value}", flush=True)
    for row in compiled:
        found.kernels.append({**common, **row})
        print("    " + said(row), flush=True)
    compiled.clear()


def said(row: Row) -> str:
    return (
        f"{row['kernel']:<28} {row['registers']:3} registers, {row['spilled']:4} bytes spilled, {row['shared']:6} "
        f"shared, {row['warps']:2} warps, {row['wgmma']:3} wgmma, {row['tma']:3} tma"
        + "".join(f"\n        products wait for {wait}" for wait in row["waits"][:SAID])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--op", nargs="+", metavar="NAME", help="folders or operations, as of kernels.bench; without: all"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    asked = parser.parse_args()
    compiled = pretend()
    from gristmill.kernels.bench import OPERATIONS

    found = look_at(asked.op or list(OPERATIONS), compiled)
    if asked.json:
        print(json.dumps({**asdict(found), "triton": triton.__version__}))


if __name__ == "__main__":
    main()
