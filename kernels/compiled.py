"""C++ sources of the CPU paths, compiled for this machine at their first use and kept for the next.

A source is plain C++ with vectors of the compiler and OpenMP, without torch's headers: a second or two to compile. Its
functions are `extern "C"`, take pointers (float *, int64_t *), int64_t and double, and as last argument the number of
threads. OpenMP's pool is torch's own, which is loaded before it, so that the two do not wait for each other.

Where there is no compiler, or GRISTMILL_KERNELS=torch, the paths in torch run instead, which the log says once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gristmill.kernels.compiling import announce

log = logging.getLogger("gristmill.kernels")
HERE = Path(__file__).parent
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC",
    # Nothing that moves a rounding but the fused multiply-add: what is not a number, and the order of sums, stay.
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
)  # fmt: skip
TORCH_ALONE = os.environ.get("GRISTMILL_KERNELS") == "torch"  # read once: a call of a kernel takes microseconds
Argument = Tensor | int | float | None


class Compiled:
    """The functions of one source. Tensors are passed as they lie: the caller sees to dtype, order and size.

    No tensor is a null pointer.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._functions: dict[str, Any] = {}

    def __call__(self, function: str, *arguments: Argument) -> int:
        known = self._functions.get(function) or self._declared(function, arguments)
        return known(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments], torch.get_num_threads())

    def _declared(self, function: str, arguments: tuple[Argument, ...]) -> Any:
        """The function, told once what its arguments are: else each call would convert them by hand."""
        declared = self._functions[function] = getattr(self._library, function)
        declared.argtypes = [*(_kind(argument) for argument in arguments), ctypes.c_int64]
        return declared


def _kind(argument: Argument) -> Any:
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p
    return ctypes.c_int64 if isinstance(argument, int) else ctypes.c_double


def may_compile() -> bool:
    """Whether sources are compiled at all, where there is a compiler."""
    return not TORCH_ALONE


def compiled(source: str) -> Compiled | None:
    """The functions of a source, named as `moe_mlp/cpu.cpp`; none where it cannot be compiled here."""
    if TORCH_ALONE:
        return _torch_alone()
    return _compiled(source)


@functools.cache
def _torch_alone() -> None:
    log.warning("nothing is compiled, for GRISTMILL_KERNELS=torch: slower paths in torch run")


def needed(source: str) -> Compiled:
    """The functions of a source that `compiled` was found to have."""
    library = _compiled(source)
    assert library is not None, source
    return library


@functools.cache
def _compiled(source: str) -> Compiled | None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        log.warning("%s is not compiled, for there is no C++ compiler ($CXX): slower paths in torch run", source)
        return None
    try:
        return Compiled(ctypes.CDLL(str(_built(HERE / source, compiler))))
    except subprocess.CalledProcessError as error:
        log.warning("%s does not compile, so slower paths in torch run: %s", source, error.stderr[-2000:])
    except OSError as error:
        log.warning("%s cannot be compiled or loaded, so slower paths in torch run: %s", source, error)
    return None


def _built(source: Path, compiler: str) -> Path:
    """The library of a source, from the cache where these sources were compiled so for such a processor."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    made_of = [source, *sorted(HERE.rglob("*.h"))]
    parts = [*(path.read_bytes() for path in made_of), version.encode(), " ".join(FLAGS).encode(), _processor()]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    name = f"{source.parent.name}-{source.stem}-{key}.so"
    folder = cache_folder()
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            built = Path(work) / name
            command = [compiler, *FLAGS, f"-I{HERE}", str(source), "-o", str(built)]
            announce()
            subprocess.run(command, check=True, capture_output=True, text=True)
            announce()
            built.replace(folder / name)
    return folder / name


def cache_folder() -> Path:
    """Where compiled sources are kept: $XDG_CACHE_HOME/gristmill/kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gristmill" / "kernels"


def _processor() -> bytes:
    """What -march=native looks at: machines that share a home folder need not be alike."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join([platform.machine(), platform.processor(), *dict.fromkeys(told)]).encode()
