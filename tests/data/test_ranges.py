"""Files read in ranges: a bounded cache, filled ahead, and files that change meanwhile."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gristmill.data.ranges import BLOCK, RangeError, RemoteFiles


def test_the_cache_is_bounded_fetches_once_and_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    data = np.arange(64 * BLOCK // 4, dtype="<u4")
    memory.pipe_file("/ranges/x", data.tobytes())
    files = RemoteFiles("memory://ranges", cache_bytes=10 * BLOCK)
    asked: list[tuple[int, int]] = []
    real = files.filesystem.cat_ranges

    def counted(paths: list[str], starts: list[int], ends: list[int], **more: Any) -> list[bytes]:
        asked.extend((start // BLOCK, -(-end // BLOCK)) for start, end in zip(starts, ends, strict=True))
        return real(paths, starts, ends, **more)

    monkeypatch.setattr(files.filesystem, "cat_ranges", counted)
    array = files.array("x", np.dtype("<u4"))
    per = BLOCK // 4
    assert array[per - 2 : per + 3].tolist() == list(range(per - 2, per + 3))
    assert array[5:9].tolist() == [5, 6, 7, 8]
    assert asked == [(0, 2)]  # one request for neighbours
    files.ahead(files.load, [(array, 20 * per, 21 * per), (array, 23 * per, 24 * per), (array, 50 * per, 50 * per + 1)])
    deadline = time.monotonic() + 20
    while len(asked) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert array[21 * per : 21 * per + 1].tolist() == [21 * per]  # a small gap was fetched along
    assert asked == [(0, 2), (20, 24), (50, 51)]
    for block in range(64):
        assert int(array[block * per : block * per + 1][0]) == block * per
    assert len(files._blocks) <= 10
    assert array[0:0].tolist() == []
    assert array[len(array) - 1 : len(array) + 5].tolist() == [len(array) - 1]
    files.close()


def test_a_remote_file_that_shrinks_is_named() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/shrinks/x", bytes(3 * BLOCK))
    files = RemoteFiles("memory://shrinks")
    array = files.array("x", np.dtype("u1"))
    assert len(array[0:10]) == 10
    memory.pipe_file("/shrinks/x", bytes(BLOCK))
    with pytest.raises(
        RangeError, match=rf"bytes {BLOCK} to {2 * BLOCK} of memory://shrinks/x cannot be read .*changed"
    ):
        array[BLOCK : BLOCK + 10]
    files.close()


def test_an_s3_object_that_changes_is_never_read_in_parts_of_both(s3: str) -> None:
    """Neither where its size stays, nor in blocks that another request gave before."""
    import fsspec

    filesystem = fsspec.filesystem("s3")
    filesystem.pipe_file(f"{s3}/shards/x", b"a" * (3 * BLOCK))
    filesystem.pipe_file(f"{s3}/shards/y", b"c" * BLOCK)
    filesystem.invalidate_cache()
    files = RemoteFiles(f"{s3}/shards")
    array = files.array("x", np.dtype("S1"))
    assert set(array[0:10].tolist()) == {b"a"}
    filesystem.pipe_file(f"{s3}/shards/x", b"b" * (3 * BLOCK))
    with pytest.raises(RangeError, match=rf"of {s3}/shards/x cannot be read .*changed while it was read"):
        array[BLOCK : BLOCK + 10]
    assert set(files.array("y", np.dtype("S1"))[0:9].tolist()) == {b"c"}  # others go on
    files.close()
    again = RemoteFiles(f"{s3}/shards")
    assert set(again.array("x", np.dtype("S1"))[0 : 3 * BLOCK].tolist()) == {b"b"}
    again.close()


def test_an_interrupted_fetch_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe_file("/interrupted/x", bytes(3 * BLOCK))
    files = RemoteFiles("memory://interrupted")
    array, asked, real = files.array("x", np.dtype("u1")), threading.Event(), files._ranges
    said: list[Exception] = []

    def interrupted(*wanted: Any) -> Any:
        asked.set()
        deadline = time.monotonic() + 20
        while not waiter.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)  # the other thread comes to wait for the same block
        raise KeyboardInterrupt

    def wait() -> None:
        asked.wait(20)
        monkeypatch.setattr(files, "_ranges", real)
        try:
            array[0:10]
        except RangeError as error:
            said.append(error)

    waiter = threading.Thread(target=wait)
    monkeypatch.setattr(files, "_ranges", interrupted)
    waiter.start()
    with pytest.raises(KeyboardInterrupt):
        array[0:10]
    waiter.join(20)
    assert not waiter.is_alive()
    assert ["was interrupted" in str(error) for error in said] in ([True], [])  # it waited, or came after and had it
    assert array[0:10].tolist() == [0] * 10
    files.close()


def test_an_answer_that_breaks_off_is_asked_for_again_and_another_error_is_told(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec
    from botocore.exceptions import ReadTimeoutError

    filesystem = fsspec.filesystem("s3")
    filesystem.pipe_file(f"{s3}/shards/x", b"a" * (2 * BLOCK))
    filesystem.invalidate_cache()
    files = RemoteFiles(f"{s3}/shards")
    real, errors = files.filesystem._call_s3, [ReadTimeoutError(endpoint_url=s3), ValueError("no such thing")]

    class Broken:
        async def __aenter__(self) -> None:
            raise errors.pop(0)

        async def __aexit__(self, *_: object) -> None:
            """Never entered."""

    async def breaking(*arguments: Any, **more: Any) -> Any:
        return {"Body": Broken()} if errors[1:] or len(asked) else await real(*arguments, **more)

    asked: list[int] = []
    monkeypatch.setattr(files.filesystem, "_call_s3", breaking)
    array = files.array("x", np.dtype("S1"))
    assert set(array[0:10].tolist()) == {b"a"}
    asked.append(1)  # from now on the other error
    with pytest.raises(RangeError, match="no such thing"):
        array[BLOCK : BLOCK + 10]
    assert errors == []
    files.close()
