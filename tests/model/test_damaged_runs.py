"""Runs whose newest checkpoint is damaged, and runs on a disk that fills: what is said, and what is left to go on from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gristmill.model.launch import JobFailed
from gristmill.model.stage_types import Progress
from gristmill.model.training.checkpoints import DamagedCheckpoint, checkpoints
from tests.model.in_process import jobs_here
from tests.model.several_runs import Stopped, stopping_at
from tests.model.test_checkpoints import spoil
from tests.model.test_training import CONFIG, PLAIN, content, mixed, trained


@pytest.fixture(scope="module")
def whole(lesson_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    trained(lesson_tokens, out)
    return out


def started(tokens: Path, out: Path, progress: Progress) -> None:
    """Pretraining in this process until `progress` ends it."""
    from gristmill.model.pretrain import pretrain

    out.mkdir(exist_ok=True)
    how = {"threads": 1, "ranks": 1, "device": "cpu", "layout": PLAIN, "progress": progress}
    with jobs_here(), pytest.raises(Stopped):
        pretrain(CONFIG, tokens, mixed(tokens, CONFIG), out, 0, **how)


@pytest.fixture(scope="module")
def stopped(lesson_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended after seven steps, with checkpoints of four and six."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    started(lesson_tokens, out, stopping_at(7))
    assert [p.name for p in checkpoints(out / "work")] == ["checkpoint-00000004", "checkpoint-00000006"]
    return out


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", r"rank-00000.safetensors has \d+ bytes"),
        ("a bit flipped", "rank-00000.safetensors has another hash"),
        ("another model", "it is of another model: hidden_size is 48, and this run's is 32"),
        ("of a later version", "manifest.json has format 99"),
        ("another step", "manifest.json has another hash"),
        ("half uploaded", r"is missing|has \d+ bytes"),
    ],
)
def test_a_run_goes_on_from_the_checkpoint_that_is_offered(
    how: str, said: str, stopped: Path, whole: Path, lesson_tokens: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(stopped, out)
    spoil(out / "work" / "checkpoint-00000006", how)
    offer = f"({said}).*the last good one is checkpoint-00000004: remove checkpoint-00000006 to go on from there"
    with pytest.raises(DamagedCheckpoint, match=offer):
        trained(lesson_tokens, out)
    shutil.rmtree(out / "work" / "checkpoint-00000006")
    trained(lesson_tokens, out)
    assert content(out) == content(whole)
    starts = [json.loads(line)["from_step"] for line in (out / "log" / "starts.jsonl").read_text().splitlines()]
    assert starts == [0, 4]


def test_a_checkpoint_that_was_never_published_is_passed_over(
    stopped: Path, whole: Path, lesson_tokens: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(stopped, out)
    (out / "work" / "checkpoint-00000006" / "manifest.json").unlink()
    trained(lesson_tokens, out)
    assert content(out) == content(whole)


def test_a_disk_that_fills_ends_the_run_with_a_sentence_and_leaves_the_last_checkpoint(
    lesson_tokens: Path, whole: Path, stopped: Path, tmp_path: Path
) -> None:
    """The job's files may be no larger than half a checkpoint: what it saves, it cannot write."""
    out = tmp_path / "out"
    shutil.copytree(stopped, out)
    size = (out / "work" / "checkpoint-00000006" / "rank-00000.safetensors").stat().st_size
    ended = subprocess.run(
        [sys.executable, "-P", "-c", JOB, str(lesson_tokens), str(out), str(size // 2)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    last = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode == 1
    assert last.startswith(f"{JobFailed.__module__}.{JobFailed.__name__}: ")
    assert "checkpoint-00000008.tmp/rank-00000.safetensors cannot be written" in last
    assert "is the disk full? Checkpoints that were published before it stay" in last
    assert [p.name for p in checkpoints(out / "work")] == ["checkpoint-00000004", "checkpoint-00000006"]
    trained(lesson_tokens, out)  # there is room again
    assert content(out) == content(whole)
    starts = [json.loads(line)["from_step"] for line in (out / "log" / "starts.jsonl").read_text().splitlines()]
    assert starts == [0, 6, 6]


JOB = """
import resource, sys
from pathlib import Path
sys.path.insert(0, ".")
from tests.model.test_training import job
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
job(Path(sys.argv[1]), Path(sys.argv[2]))
"""
