"""Documents of one line of 50 MB through all corpus stages, with workers of the default size."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

COMMAND = [str(Path(sys.executable).with_name("gristmill"))]
SIZE = 50_000_000


def drawn_words() -> str:
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randrange(2, 9))) for _ in range(30_000)]
    return " ".join(rng.choice(words) for _ in range(SIZE // 5))[:SIZE]


@pytest.mark.slow
def test_lines_of_50_megabytes_go_through_every_stage(tmp_path: Path) -> None:
    lines = ["word and the others of it " * (SIZE // 26), "(" * SIZE, "語" * (SIZE // 3), drawn_words()]
    small = [f"Page {i} says little, and that in a sentence of its own." for i in range(50)]
    with (tmp_path / "lines.jsonl").open("w", encoding="utf-8") as file:
        for text in (*lines, *small):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    recipe = {
        "name": "lines",
        "ingest": {"sources": [{"type": "files", "name": "lines", "paths": [str(tmp_path / "lines.jsonl")]}]},
        "spans": {"substring": {}},
        "filter": {"profiles": {"prose": {"mode": "fast", "pii": {}}}},
        "tokenize": {"vocab_size": 1024},
        "execution": {"workers": 1},
    }
    (tmp_path / "lines.yaml").write_text(yaml.safe_dump(recipe))
    store = tmp_path / "store"
    command = [*COMMAND, "run", str(tmp_path / "lines.yaml"), "--until", "mix", "--store", str(store)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    manifests = {path.parents[1].name: json.loads(path.read_text()) for path in store.glob("*/*/manifest.json")}
    for stage in ("ingest", "spans", "filter", "decontaminate"):
        assert manifests[stage]["metrics"]["documents_out"] == len(lines) + len(small), stage
    # A worker that outgrows its gibibyte is ended and its task tried again, and refused in the end, as above. This is of
    # the command and its scheduler as well.
    for stage, manifest in manifests.items():
        assert manifest["peak_bytes"] < 1.25 * 2**30, stage
