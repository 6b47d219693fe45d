"""Memory of converting a DeepSeek-V3 release: a random one of its widths, scaled in depth and experts. JSON at the end.

    python -P bench/convert.py [--experts 24] [--layers 2] [--vocab 16160] [--keep FOLDER]

The folder has the release's form (FP8 with scales, one matrix an expert, MTP module included) and its widths; it is
converted to ours and back to bfloat16 in a process each. Keys of the last line, sizes in MiB:

    fp8_mib, ours_mib           the folders
    import_peak_mib             most memory the conversion to ours held, mapped pages of the files included
    import_own_peak_mib         of that, what is not a page of a file: no system has to write it anywhere to free it
    export_peak_mib, export_own_peak_mib    the same of the way back
    start_mib                   what the libraries take before any tensor is read
    largest_tensor_mib          in bfloat16
    …_model_mib                 beside each peak what the model of memory below allows; one above it ends in exit code 1
    v3                          what it says of the released shape (671 B parameters), whose tensors are never made

The model: a conversion holds its own two matrices in bfloat16 (the one that is written and the one that is multiplied
out of FP8 after it), a row of blocks of one in float32, and a few KiB of description a tensor; all else are pages of
the one file that is being read, of which none has to stay. So memory grows with the largest matrix and the largest
file, not with the model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20
TENSOR_BYTES = 8 << 10  # names, shapes and entries of a tensor while it waits to be written
ON_FIRST_USE = 64 << 20  # of libraries that are loaded once tensors are touched, and what the allocator keeps
BLOCK_ROWS, BLOCK_COPIES = 128, 3  # of a matrix in FP8 that are in float32 at once: values, scales, products
BFLOAT16, FLOAT32 = 2, 4
V3_VOCAB, V3_FILE_BYTES = 129_280, 5_300_000_000  # rows of the released model's vocabulary; its largest file


@dataclass(frozen=True)
class Held:
    """Bytes that a conversion holds at once beyond the libraries: its own, and pages of the file that it reads."""

    own: int
    mapped: int

    def mib(self, start_own: int, start_all: int) -> tuple[int, int]:
        """The most of its own and the most of all, given what was held (MiB) before it began."""
        return start_own + -(-self.own // MIB), start_all + -(-(self.own + self.mapped) // MIB)


def importing(config: Any, vocab_size: int, largest_file: int) -> Held:
    """From a release in FP8 of this shape, whose largest file has so many bytes, to ours in bfloat16."""
    from gristmill.model.hugging_face.fp8 import is_quantised
    from gristmill.model.hugging_face.names import layout

    pieces = [piece for _, found in layout(config, vocab_size).values() for piece in found]
    matrices = [piece.shape for piece in pieces if is_quantised(piece.name)]
    largest = max(rows * columns for rows, columns in matrices)
    in_float32 = BLOCK_ROWS * max(columns for _, columns in matrices) * FLOAT32 * BLOCK_COPIES
    own = 2 * largest * BFLOAT16 + in_float32 + TENSOR_BYTES * len(pieces) + ON_FIRST_USE
    return Held(own, largest_file)


def exporting(config: Any, vocab_size: int, largest_file: int) -> Held:
    """From ours in bfloat16, whose largest file has so many bytes, to Hugging Face's form in bfloat16."""
    from gristmill.model.hugging_face.names import layout

    pieces = sum(len(found) for _, found in layout(config, vocab_size).values())
    return Held(TENSOR_BYTES * pieces + ON_FIRST_USE, largest_file)


def of_v3() -> dict[str, int]:
    """What the model says of the released shape: MiB beyond the libraries."""
    import math

    from gristmill.model.hugging_face.names import layout

    config = shape(61, 256, dense=3)
    ours = max(math.prod(tensor) for tensor, _ in layout(config, V3_VOCAB).values()) * BFLOAT16
    there, back = importing(config, V3_VOCAB, V3_FILE_BYTES), exporting(config, V3_VOCAB, ours)
    made = {}
    for name, held in (("import", there), ("export", back)):
        own, everything = held.mib(0, 0)
        made |= {f"{name}_own_model_mib": own, f"{name}_model_mib": everything}
    return made


def shape(layers: int, experts: int, dense: int = 1) -> Any:
    """V3's widths (arXiv 2412.19437, section 4.2)."""
    from gristmill.model.config import ModelConfig, RotaryScalingConfig

    return ModelConfig(
        hidden_size=7168, num_hidden_layers=layers, num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=dense, intermediate_size=18432,
        n_routed_experts=experts, num_experts_per_tok=8, moe_intermediate_size=2048, n_group=8, topk_group=4,
        routed_scaling_factor=2.5, max_position_embeddings=163_840, rope_scaling=RotaryScalingConfig(),
    )  # fmt: skip


def make(folder: Path, layers: int, experts: int, vocab_size: int) -> None:
    """A random release, a tensor at a time."""
    import torch

    from gristmill.model.hugging_face.conversion import export

    config = shape(layers, experts)

    def random(_: str, piece: Any) -> torch.Tensor:
        """The same numbers each time a piece is asked for: once for its values, once for their scales."""
        if len(piece.shape) == 1:
            return torch.ones(piece.shape)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{piece.name} {piece.expert}".encode()))
        return torch.empty(piece.shape, dtype=torch.float32).uniform_(-0.05, 0.05, generator=generator)

    export(random, config, vocab_size, folder, dtype=torch.bfloat16, fp8=True, mtp=True, shard_megabytes=1000)


class Watch:
    """The most memory of this process that is not file pages, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.peak, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.005):
            self.peak = max(self.peak, status("RssAnon"))

    def end(self) -> int:
        self._over.set()
        self._thread.join()
        return self.peak


def status(field: str) -> int:
    """MiB of a field of this process's status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) // 1024
    return 0


def run(source: Path, out: Path) -> None:
    """One conversion, and what it took beyond what the libraries hold once a model's shape was made."""
    from gristmill.model.hugging_face.names import layout
    from gristmill.model.model_folders import convert, describe

    described = describe(source)
    layout(described.config, described.vocab_size)
    start, everything, began = status("RssAnon"), status("VmRSS"), time.perf_counter()
    watch = Watch()
    convert(source, out, dtype="bfloat16", mtp=True, shard_megabytes=1000)
    seconds = time.perf_counter() - began
    told = {"start": start, "start_all": everything, "own": watch.end(), "peak": status("VmHWM")}
    print(json.dumps({**told, "seconds": round(seconds, 1)}))


def measured(source: Path, out: Path) -> dict[str, Any]:
    command = [sys.executable, "-P", __file__, "--run", str(source), str(out)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(said.splitlines()[-1])


def largest_file(folder: Path) -> int:
    return max(path.stat().st_size for path in folder.iterdir())


def mib(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir()) // MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=24, help="of a layer, routed; a multiple of 8, at least 16")
    parser.add_argument("--layers", type=int, default=2, help="the first is dense")
    parser.add_argument("--vocab", type=int, default=16_160, help="rows of the vocabulary")
    parser.add_argument("--keep", type=Path, help="work in this folder, and leave it")
    parser.add_argument("--run", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run(*arguments.run)
        return
    with tempfile.TemporaryDirectory(prefix="gristmill-convert-") as temporary:
        folder = arguments.keep or Path(temporary)
        make(folder / "fp8", arguments.layers, arguments.experts, arguments.vocab)
        print(f"a release of {mib(folder / 'fp8')} MiB", flush=True)
        there = measured(folder / "fp8", folder / "ours")
        print(f"to ours: {there}", flush=True)
        back = measured(folder / "ours", folder / "bf16")
        print(f"and to bfloat16: {back}", flush=True)
        largest = max(arguments.vocab * 7168, 18432 * 7168) * 2
        config = shape(arguments.layers, arguments.experts)
        of_import = importing(config, arguments.vocab, largest_file(folder / "fp8")).mib(
            there["start"], there["start_all"]
        )
        of_export = exporting(config, arguments.vocab, largest_file(folder / "ours")).mib(
            back["start"], back["start_all"]
        )
        result = {
            "fp8_mib": mib(folder / "fp8"),
            "ours_mib": mib(folder / "ours"),
            "import_peak_mib": there["peak"],
            "import_own_peak_mib": there["own"],
            "export_peak_mib": back["peak"],
            "export_own_peak_mib": back["own"],
            "start_mib": there["start"],
            "largest_tensor_mib": largest // MIB,
            "import_own_peak_model_mib": of_import[0],
            "import_peak_model_mib": of_import[1],
            "export_own_peak_model_mib": of_export[0],
            "export_peak_model_mib": of_export[1],
            "v3": of_v3(),
        }
    above = [
        f"{name} {result[name]} MiB is above the model's {result[name.replace('_mib', '_model_mib')]}"
        for name in ("import_peak_mib", "import_own_peak_mib", "export_peak_mib", "export_own_peak_mib")
        if result[name] > result[name.replace("_mib", "_model_mib")]
    ]
    print("\n".join(above) or "every peak is within the model of memory")
    print(json.dumps(result))
    if above:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
