"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Before any test imports them: nothing phones home, nothing asks a hub, every process has its one thread.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["DO_NOT_TRACK"] = "1"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real corpora, where they are: GRISTMILL_SHARED_DATA, or shared/data beside the checkout."""
    place = Path(os.environ.get("GRISTMILL_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not place.is_dir():
        pytest.skip(f"the shared corpora are not at {place}: set GRISTMILL_SHARED_DATA")
    return place


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of an S3 server of our own on a free loopback port."""
    from moto.server import ThreadedMotoServer

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A fresh bucket's URI, with the environment that reaches it."""
    import fsspec
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    filesystem = fsspec.filesystem("s3")
    bucket = f"gristmill-{os.getpid()}-{len(filesystem.ls('/'))}"
    filesystem.mkdir(bucket)
    yield f"s3://{bucket}"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def bytes_of() -> Callable[[Path], str]:
    """One hash of every file below a folder, names included."""

    def hashed(folder: Path) -> str:
        digest = hashlib.sha256()
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
        return digest.hexdigest()

    return hashed


@pytest.fixture(scope="session")
def laid_out() -> Callable[..., Path]:
    """Rows as the document shards of a stage's folder."""

    def lay(folder: Path, rows: list[dict], a_shard: int = 300) -> Path:
        from gristmill.data.documents import write_rows

        for number, start in enumerate(range(0, len(rows), a_shard)):
            write_rows(folder / "documents" / f"{number:05d}.jsonl.zst", rows[start : start + a_shard])
        return folder

    return lay
