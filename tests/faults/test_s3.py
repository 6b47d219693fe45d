"""A store on S3: `smoke` is run, killed and resumed there, and comes to the same content hashes as on a disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [str(Path(sys.executable).with_name("gristmill"))]


def run(store: str, folder: Path) -> subprocess.Popen[bytes]:
    log = (folder / "log").open("ab")
    return subprocess.Popen(
        [*COMMAND, "run", "smoke", "--plain", "--until", "rl_zero", "--store", store],
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=folder,
        start_new_session=True,
    )


def hashes(store: str, folder: Path) -> dict[str, str]:
    said = subprocess.run(
        [*COMMAND, "verify", "--store", store, "--json"], capture_output=True, text=True, cwd=folder, check=False
    )
    assert said.returncode == 0, said.stdout + said.stderr
    return json.loads(said.stdout)["stages"]


def test_smoke_on_s3_is_killed_and_resumed_elsewhere(s3: str, tmp_path: Path, smoke_hashes) -> None:
    store, folder = f"{s3}/store", tmp_path / "one machine"
    folder.mkdir()
    process = run(store, folder)
    until = time.monotonic() + 120
    while not any(folder.glob(".gristmill/cache/*/pretrain/*/work/checkpoint-????????")):
        assert process.poll() is None, (folder / "log").read_text()[-2000:]
        assert time.monotonic() < until
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    other = tmp_path / "another machine"  # which has nothing of the first one's folder
    other.mkdir()
    until = time.monotonic() + 120
    while (waiting := run(store, other)).wait(timeout=300) == 2:  # the dead run's lock is stale after a minute
        assert "in use by process" in (other / "log").read_text()
        assert time.monotonic() < until
        time.sleep(5)
    assert waiting.returncode == 0, (other / "log").read_text()[-3000:]
    found = hashes(store, other)
    assert found == {name: smoke_hashes[name] for name in found}
    assert {"ingest", "tokenize", "pretrain", "rl_zero"} <= set(found)
    shutil.rmtree(other / ".gristmill")  # and a third machine verifies it from the store alone
    assert hashes(store, other) == found


@pytest.mark.parametrize("uri", ["s3://no-such-bucket-here/store"])
def test_a_bucket_that_is_not_there_is_refused(s3: str, uri: str, tmp_path: Path) -> None:
    said = subprocess.run(
        [*COMMAND, "run", "smoke", "--plain", "--store", uri], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert said.returncode == 2
    assert "there is no such bucket" in said.stderr
    assert len(said.stderr.strip().splitlines()) == 1
