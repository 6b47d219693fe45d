"""Checkpoints on their own: pieces, atomic publication, and what is refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.model.training.checkpoints import (
    MANIFEST,
    Checkpoint,
    CheckpointWriter,
    DamagedCheckpoint,
    checkpoints,
    last_checkpoint,
    manifest_hash,
)
from gristmill.model.training.files import PART_BYTES, sha256

OWNER = {"hidden_size": 32, "vocab_size": 64}


def save(work: Path, step: int, ranks: int = 1, keep: int = 2, value: float = 1.0) -> Path:
    """One tensor of twelve numbers, in as many pieces as there are ranks."""
    writers = [CheckpointWriter(work, OWNER, rank=rank, ranks=ranks, keep=keep) for rank in range(ranks)]
    size = 12 // ranks
    for rank, writer in enumerate(writers):
        numbers = torch.arange(rank * size, (rank + 1) * size) * value
        writer.begin(step, {f"parameter/w@{rank * size}": numbers}, {"curves": [step]})
    for writer in writers:
        writer.wait()
    for writer in reversed(writers):
        writer.publish()
        writer.close()
    return work / f"checkpoint-{step:08d}"


@given(ranks=st.sampled_from([1, 2, 3, 4, 6]), ends=st.tuples(st.integers(0, 12), st.integers(0, 12)))
@settings(max_examples=30, deadline=None)
def test_any_stretch_is_read_whoever_wrote_it(tmp_path_factory, ranks: int, ends: tuple[int, int]) -> None:
    start, stop = min(ends), max(ends) + 1
    stop = min(stop, 12)
    if start >= stop:
        return
    with Checkpoint(save(tmp_path_factory.mktemp("work"), 4, ranks)) as found:
        assert found.read("parameter", "w", start, stop).tolist() == list(range(start, stop))
        assert found.find("parameter", "other", 0, 1) is None
        assert (found.step, found.state()["curves"]) == (4, [4])


def test_nothing_counts_before_it_is_published(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, OWNER)
    writer.begin(2, {"parameter/w@0": torch.ones(3)}, {})
    writer.wait()
    assert checkpoints(tmp_path) == []
    with pytest.raises(RuntimeError, match="step 2 is still being written"):
        writer.begin(4, {"parameter/w@0": torch.ones(3)}, {})
    writer.publish()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-00000002"]
    assert sorted(p.name for p in checkpoints(tmp_path)[0].iterdir()) == [
        "manifest.json", "rank-00000.safetensors", "state.json",
    ]  # fmt: skip


def test_what_is_saved_is_a_copy(tmp_path: Path) -> None:
    """Training goes on in the tensors while they are being written."""
    tensor, writer = torch.ones(1000), CheckpointWriter(tmp_path, OWNER)
    writer.begin(1, {"parameter/w@0": tensor}, {})
    tensor.zero_()
    writer.wait()
    writer.publish()
    with Checkpoint(tmp_path / "checkpoint-00000001") as found:
        assert bool((found.read("parameter", "w", 0, 1000) == 1).all())


def test_what_was_read_of_a_file_leaves_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished model is written from a checkpoint in parts; without mapping anew all of it would stay mapped."""
    monkeypatch.setattr("gristmill.model.training.checkpoints.MOST_MAPPED", 4 << 20)
    tensor, writer = torch.arange(16 << 20, dtype=torch.float32), CheckpointWriter(tmp_path, OWNER)
    writer.begin(1, {"parameter/w@0": tensor}, {})
    writer.wait()
    writer.publish()
    writer.close()

    def mapped() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile")) // 1024

    with Checkpoint(tmp_path / "checkpoint-00000001") as found:
        before, most = mapped(), 0
        for start in range(0, 16 << 20, 1 << 20):
            part = found.read("parameter", "w", start, start + (1 << 20))
            assert part.equal(tensor[start : start + (1 << 20)])
            most = max(most, mapped())
    assert most - before < 24  # MiB, of 64: the file's last parts and one that is still held


def test_hashing_a_file_holds_little_of_it(tmp_path: Path) -> None:
    """A checkpoint is hashed beside the training whose memory is then at its most."""
    content = bytes(range(256)) * (40 << 12)
    (tmp_path / "large").write_bytes(content)
    tracemalloc.start()
    found = sha256(tmp_path / "large")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == hashlib.sha256(content).hexdigest()
    assert most < 2 * PART_BYTES < len(content)


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=3)
    assert [p.name[-1] for p in checkpoints(tmp_path)] == ["2", "3", "4"]
    assert not list(tmp_path.glob("*.tmp"))


def test_what_an_earlier_attempt_left_does_not_count(tmp_path: Path) -> None:
    """Killed with four ranks in the middle of a save, then saved by two at the same step."""
    for rank in range(4):
        writer = CheckpointWriter(tmp_path, OWNER, rank=rank, ranks=4)
        writer.begin(4, {f"parameter/w@{rank * 3}": torch.full((3,), -1.0)}, {})
        writer.wait()
    folder = save(tmp_path, 4, ranks=2)
    assert sorted(p.name for p in folder.iterdir()) == [
        "manifest.json", "rank-00000.safetensors", "rank-00001.safetensors", "state.json",
    ]  # fmt: skip
    with Checkpoint(folder) as found:
        assert found.read("parameter", "w", 0, 12).tolist() == list(range(12))


def test_numbers_that_are_none_are_not_saved(tmp_path: Path) -> None:
    save(tmp_path, 1)
    writer = CheckpointWriter(tmp_path, OWNER)
    writer.begin(2, {"parameter/lm_head.weight@0": torch.tensor([1.0, float("nan")])}, {})
    with pytest.raises(FloatingPointError, match=r"lm_head.weight@0 .*is not finite"):
        writer.wait()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-00000001"]


FULL = """
import resource, signal, sys, torch
from pathlib import Path
from gristmill.model.training.checkpoints import CheckpointWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
writer = CheckpointWriter(Path(sys.argv[1]), {"hidden_size": 32, "vocab_size": 64})
writer.begin(2, {"parameter/w@0": torch.ones(100_000)}, {})
writer.wait()
"""


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    """In a process whose files may be no larger than 4 KiB."""
    save(tmp_path, 1)
    ended = subprocess.run(
        [sys.executable, "-P", "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert "OSError" in ended.stderr.splitlines()[-1]
    assert "rank-00000.safetensors cannot be written" in ended.stderr
    found = last_checkpoint(tmp_path, OWNER)
    assert found is not None
    assert found.step == 1


def test_a_hash_that_cannot_be_written_is_said_too(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-00000002.tmp" / "rank-00000.sha256").mkdir(parents=True)  # nothing can be written there
    writer = CheckpointWriter(tmp_path, OWNER)
    writer.begin(2, {"parameter/w@0": torch.ones(3)}, {})
    with pytest.raises(OSError, match=r"rank-00000.sha256 cannot be written .*: is the disk full\?"):
        writer.wait()


FULL_FOR_THE_STATE = FULL.replace("100_000", "9").replace("}, {})", '}, {"curves": [0.5] * 9999})')
FULL_FOR_THE_MANIFEST = (
    FULL.replace("resource.setrlimit", "pass #").replace("100_000", "9")
    + """
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
writer.publish()
"""
)


@pytest.mark.parametrize(
    ("program", "named"), [(FULL_FOR_THE_STATE, "state.json"), (FULL_FOR_THE_MANIFEST, "manifest.json")]
)
def test_a_disk_that_fills_behind_the_tensors_is_said_too(program: str, named: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    ended = subprocess.run(
        [sys.executable, "-P", "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert f"checkpoint-00000002.tmp/{named} cannot be written" in last
    assert "is the disk full? Checkpoints that were published before it stay" in last
    found = last_checkpoint(tmp_path, OWNER)
    assert found is not None
    assert found.step == 1


def spoil(folder: Path, how: str) -> None:
    file, manifest = folder / "rank-00000.safetensors", folder / MANIFEST
    told = json.loads(manifest.read_text())
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-4])
    elif how == "a bit flipped":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))
    elif how == "missing":
        file.unlink()
    elif how == "of a later version":
        manifest.write_text(json.dumps({**told, "format": 99}))
    elif how == "another step":
        manifest.write_text(json.dumps({**told, "step": told["step"] + 1}))
    elif how == "no fields":
        manifest.write_text(json.dumps({"format": told["format"], "step": told["step"]}))
    elif how == "no dictionary":
        manifest.write_text("[]")
    elif how == "another model":
        told["owner"] = {**told["owner"], "hidden_size": 48}
        manifest.write_text(json.dumps({**told, "sha256": manifest_hash(told)}))
    elif how == "half uploaded":  # the files that were sent first, and half of the next
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        (folder / "state.json").unlink()
    else:
        manifest.write_text("{")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", r"rank-00000.safetensors has \d+ bytes, and \d+ were written"),
        ("a bit flipped", "rank-00000.safetensors has another hash than what was written"),
        ("missing", "rank-00000.safetensors is missing"),
        ("of a later version", "manifest.json has format 99, and this version of Gristmill reads 2"),
        ("no JSON", "manifest.json cannot be read"),
        ("no dictionary", "manifest.json has format None"),
        ("no fields", "manifest.json lacks ranks, owner, files, sha256"),
        ("another step", "manifest.json has another hash than what was written"),
        ("another model", "it is of another model: hidden_size is 48, and this run's is 32"),
        ("half uploaded", r"(state.json is missing|rank-00000.safetensors has \d+ bytes, and \d+ were written)"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_last_good_one_named(how: str, said: str, tmp_path: Path) -> None:
    save(tmp_path, 2)
    save(tmp_path, 4)
    spoil(tmp_path / "checkpoint-00000004", how)
    with pytest.raises(DamagedCheckpoint, match=f"{said}.*the last good one is checkpoint-00000002: remove"):
        last_checkpoint(tmp_path, OWNER)
    spoil(tmp_path / "checkpoint-00000002", "truncated")
    with pytest.raises(
        DamagedCheckpoint, match="there is no other: remove checkpoint-00000004 to begin from the start"
    ):
        last_checkpoint(tmp_path, OWNER)


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 2)
    with pytest.raises(DamagedCheckpoint, match="is of another model: hidden_size is 32, and this run's is 48"):
        last_checkpoint(tmp_path, {**OWNER, "hidden_size": 48})
    save(tmp_path, 4)
    spoil(tmp_path / "checkpoint-00000002", "another model")
    spoil(tmp_path / "checkpoint-00000004", "truncated")
    with pytest.raises(DamagedCheckpoint, match="there is no other"):  # another model's is none to go on from
        last_checkpoint(tmp_path, OWNER)


def test_lacking_numbers_are_refused(tmp_path: Path) -> None:
    with (
        Checkpoint(save(tmp_path, 2)) as found,
        pytest.raises(DamagedCheckpoint, match="lacks the numbers from 12 to 13"),
    ):
        found.read("parameter", "w", 6, 13)


def test_the_command_line_verifies_a_checkpoint(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from gristmill.flows.cli import app

    folder = save(tmp_path, 2, ranks=2)
    result = CliRunner().invoke(app, ["checkpoint", "verify", str(folder)])
    assert result.exit_code == 0
    assert "whole; checkpoint of step 2 by 2 ranks, 1 tensors, 12 numbers" in result.output
    spoil(folder, "a bit flipped")
    result = CliRunner().invoke(app, ["checkpoint", "verify", str(folder)])
    assert result.exit_code == 1
    assert "rank-00000.safetensors has another hash" in " ".join(result.output.split())
