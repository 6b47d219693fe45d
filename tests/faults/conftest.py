"""One undisturbed run of `smoke`, whose content hashes the disturbed ones are held against."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [str(Path(sys.executable).with_name("gristmill"))]


@pytest.fixture(scope="session")
def smoke_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the undisturbed run was; its store is .gristmill/store below. Test processes side by side share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "undisturbed"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def smoke_hashes(smoke_folder: Path) -> dict[str, str]:
    """Content hash of each stage of `smoke`, from a run that nothing disturbed."""
    hashes = smoke_folder / "hashes.json"
    with (smoke_folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not hashes.exists():
            hashes.write_text(json.dumps(_run_smoke(smoke_folder)))
    return json.loads(hashes.read_text())


def _run_smoke(folder: Path) -> dict[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for arguments in (["run", "smoke", "--plain"], ["verify", "--json"]):
        said = subprocess.run(
            [*COMMAND, *arguments], capture_output=True, text=True, cwd=folder, env=environment, check=False
        )
        assert said.returncode == 0, said.stdout[-3000:] + said.stderr[-3000:]
    return json.loads(said.stdout)["stages"]
