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
from pathlib import Path
from typing import Any

MIB = 1 << 20


def shape(layers: int, experts: int) -> Any:
    """V3's widths (arXiv 2412.19437, section 4.2)."""
    from gristmill.model.config import ModelConfig, RotaryScalingConfig

    return ModelConfig(
        hidden_size=7168, num_hidden_layers=layers, num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=1, intermediate_size=18432,
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
    """One conversion, and what it took."""
    from gristmill.model.model_folders import convert

    start, began = status("RssAnon"), time.perf_counter()
    watch = Watch()
    convert(source, out, dtype="bfloat16", mtp=True, shard_megabytes=1000)
    seconds = time.perf_counter() - began
    print(json.dumps({"start": start, "own": watch.end(), "peak": status("VmHWM"), "seconds": round(seconds, 1)}))


def measured(source: Path, out: Path) -> dict[str, Any]:
    command = [sys.executable, "-P", __file__, "--run", str(source), str(out)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(said.splitlines()[-1])


def mib(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir()) // MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=24, help="routed experts of a layer; a multiple of 8")
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
        result = {
            "fp8_mib": mib(folder / "fp8"),
            "ours_mib": mib(folder / "ours"),
            "import_peak_mib": there["peak"],
            "import_own_peak_mib": there["own"],
            "export_peak_mib": back["peak"],
            "export_own_peak_mib": back["own"],
            "start_mib": there["start"],
            "largest_tensor_mib": largest // MIB,
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
