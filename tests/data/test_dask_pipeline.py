"""datatrove's pipelines on Dask: its own executor's bytes, whatever is killed and however many work."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.io import DataFolder, get_datafolder
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
)
from datatrove.pipeline.filters import LambdaFilter, RegexFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter, ParquetWriter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from gristmill.data.dask_pipeline import DaskPipelineExecutor, PipelineFailed
from gristmill.data.executor import close_cluster, cluster_client
from gristmill.data.staging import staged_outputs

WORDS = [
    "the",
    "mill",
    "ground",
    "coarse",
    "grain",
    "slowly",
    "while",
    "water",
    "turned",
    "its",
    "wheel",
    "and",
    "flour",
    "fell",
    "into",
    "sacks",
    "below",
]
Make = Callable[..., PipelineExecutor]


@pytest.fixture(autouse=True, scope="module")
def _two_workers() -> Iterator[Any]:
    """One local cluster for the tests that ask for two workers: starting it costs seconds."""
    yield cluster_client(2)
    close_cluster()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of 40 documents, every fifth nearly the one before it."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(7)
    for shard in range(6):
        rows, text = [], ""
        for number in range(40):
            if number % 5 != 4:
                text = " ".join(draw.choices(WORDS, k=draw.randrange(60, 120)))
            rows.append({"text": f"{text} {WORDS[number % 3]}", "id": f"{shard}/{number}"})
        (folder / f"{shard}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """What the files below a folder hold; gzip's header has the time in it, so what it packs."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        p.relative_to(folder).as_posix(): gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes()
        for p in paths
    }


def counts(stats: Path) -> list[Any]:
    """Each step's sums, without the times. (A sum's unit is lost in datatrove's own files of single tasks.)"""
    steps = json.loads(stats.read_text())
    return [(s["name"], {n: v["total"] if isinstance(v, dict) else v for n, v in s["stats"].items()}) for s in steps]


class Mark(PipelineStep):
    """A user's own step, of a module that workers cannot import."""

    name = "Mark"
    type = "OWN"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        for document in data:
            self.stat_update("marked")
            document.metadata["part"] = f"{rank} of {world_size}"
            yield document


class Split(WordTokenizer):
    """Words between spaces: spaCy, which datatrove takes by default, needs ten seconds to be imported."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        raise NotImplementedError


class Slow(PipelineStep):
    """Takes its time, so that it can be killed, and says when it has begun."""

    name = "Slow"
    type = "OWN"

    def __init__(self, begun: Path, seconds: float = 0.01) -> None:
        super().__init__()
        self.begun, self.seconds = begun, seconds

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        for number, document in enumerate(data):
            if number == 20:
                (self.begun / f"{rank}-{os.getpid()}").touch()
            time.sleep(self.seconds)
            yield document


class FailsOnTwo(PipelineStep):
    """Fails in task 2, in the middle of its documents, until it is mended."""

    name = "FailsOnTwo"
    type = "OWN"

    def __init__(self, mended: Path) -> None:
        super().__init__()
        self.mended = mended

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        for number, document in enumerate(data):
            if rank == 2 and number == 30 and not self.mended.exists():
                raise ValueError("document 30 is bad")
            yield document


def mixed(texts: Path, out: Path, *own: Any) -> list[Any]:
    return [
        JsonlReader(str(texts)),
        Mark(),
        *own,
        LambdaFilter(lambda document: len(document.text) % 3 != 0, exclusion_writer=JsonlWriter(f"{out}/removed")),
        RegexFilter("sacks below", exclusion_writer=JsonlWriter(f"{out}/repeats", compression=None)),
        JsonlWriter(f"{out}/kept", output_filename="part/${rank}.jsonl.gz", compression="infer"),
        JsonlWriter(f"{out}/small", compression=None, max_file_size=3000),
        ParquetWriter(f"{out}/parquet"),
    ]


@pytest.fixture(scope="module")
def locally(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """datatrove's own executor on the mixed pipeline."""
    place = tmp_path_factory.mktemp("locally")
    pipeline = mixed(texts, place / "out")
    LocalPipelineExecutor(pipeline, tasks=4, workers=1, logging_dir=str(place / "log")).run()
    return place


@pytest.mark.parametrize("workers", [1, 2])
def test_the_bytes_and_statistics_are_those_of_datatroves_executor(
    workers: int, texts: Path, locally: Path, tmp_path: Path
) -> None:
    seen = []
    stats = DaskPipelineExecutor(
        mixed(texts, tmp_path / "out"),
        tasks=4,
        workers=workers,
        logging_dir=str(tmp_path / "log"),
        cluster=cluster_client(2),
        progress=lambda done, total, **_: seen.append((done, total)),
    ).run()
    made = contents(tmp_path / "out")
    assert made == contents(locally / "out")
    assert any(name.startswith("small/001_") for name in made)
    assert seen == [(i, 4) for i in range(5)]
    assert counts(tmp_path / "log" / "stats.json") == counts(locally / "log" / "stats.json")
    assert stats.stats[1].stats["marked"].total == 240
    layout = {p.relative_to(locally / "log").as_posix() for p in (locally / "log").rglob("*")}
    assert {p.relative_to(tmp_path / "log").as_posix() for p in (tmp_path / "log").rglob("*")} == layout
    assert not list(tmp_path.rglob(".*.unfinished"))


def minhash(make: Make, texts: Path, place: Path) -> PipelineExecutor:
    names = {name: f"{place}/out/{name}" for name in ("signatures", "buckets", "remove", "removed", "kept")}
    config = MinhashConfig(
        hash_config=HashConfig(precision=64, hash_fc="sha1"), n_grams=3, num_buckets=4, hashes_per_bucket=4
    )
    reader = JsonlReader(str(texts))

    def made(name: str, tasks: int, pipeline: list[Any], depends: PipelineExecutor | None) -> PipelineExecutor:
        # datatrove's own pool hangs where it cannot import a step's class
        workers = 1 if make is LocalPipelineExecutor else 2
        return make(pipeline, tasks=tasks, workers=workers, logging_dir=str(place / "log" / name), depends=depends)

    signature = MinhashDedupSignature(names["signatures"], config, Split(), skip_existing_sigs=True)
    sign = made("1", 3, [reader, signature], None)
    bands = made("2", 4, [MinhashDedupBuckets(names["signatures"], names["buckets"], config=config)], sign)
    groups = made("3", 1, [MinhashDedupCluster(names["buckets"], names["remove"], config=config)], bands)
    removed = JsonlWriter(names["removed"])
    return made("4", 3, [reader, MinhashDedupFilter(names["remove"], removed), JsonlWriter(names["kept"])], groups)


def test_a_chain_of_four_minhash_stages(texts: Path, tmp_path: Path) -> None:
    minhash(LocalPipelineExecutor, texts, tmp_path / "theirs").run()
    minhash(DaskPipelineExecutor, texts, tmp_path / "ours").run()
    ours = contents(tmp_path / "ours" / "out")
    assert ours == contents(tmp_path / "theirs" / "out")
    assert len(ours["removed/00000.jsonl.gz"].splitlines()) >= 10
    for stage in "1234":
        theirs = counts(tmp_path / "theirs" / "log" / stage / "stats.json")
        assert counts(tmp_path / "ours" / "log" / stage / "stats.json") == theirs


SCRIPT = """
import sys
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from gristmill.data.dask_pipeline import DaskPipelineExecutor
from beside import SUFFIX

class Shout(PipelineStep):
    name = "Shout"
    type = "OWN"
    def run(self, data, rank=0, world_size=1):
        for document in data:
            document.text = document.text.upper() + SUFFIX
            yield document

def short(data, rank, world_size):
    return (d for d in data if len(d.text) < 500)

if __name__ == "__main__":
    DaskPipelineExecutor(
        [JsonlReader(sys.argv[1]), Shout(), short, lambda data, rank, size: data, JsonlWriter("out", compression=None)],
        tasks=2, logging_dir="log",
    ).run()
"""


def test_a_script_with_steps_of_its_own_on_a_scheduler_elsewhere(
    texts: Path, tmp_path: Path, elsewhere: dict[str, str]
) -> None:
    """`__main__`'s classes, functions, lambdas, a module beside it, paths relative to where it was started."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("SUFFIX = '!'\n")
    (tmp_path / "here").mkdir()
    environment = {**os.environ, **elsewhere}
    subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(texts)], cwd=tmp_path / "here", env=environment, check=True
    )
    texts_out = [
        json.loads(line)["text"] for name, b in contents(tmp_path / "here" / "out").items() for line in b.splitlines()
    ]
    rows = [json.loads(line)["text"] for p in texts.iterdir() for line in p.read_text().splitlines()]
    assert sorted(texts_out) == sorted(t.upper() + "!" for t in rows if len(t) < 499)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A scheduler and a worker of two threads, as someone else would have started them; the variable that says where."""
    (tmp_path / "cluster").mkdir()
    file = tmp_path / "cluster" / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    common = ["--scheduler-file", str(file)]
    started = [
        subprocess.Popen(
            [
                *dask,
                "scheduler",
                "--host",
                "127.0.0.1",
                "--port",
                "0",
                "--no-dashboard",
                "--dashboard-address",
                "127.0.0.1:0",
                *common,
            ],
            cwd=tmp_path / "cluster",
            stderr=subprocess.DEVNULL,
        ),
        subprocess.Popen(
            [*dask, "worker", "--nthreads", "2", "--no-dashboard", "--host", "127.0.0.1", *common],
            cwd=tmp_path / "cluster",
            stderr=subprocess.DEVNULL,
        ),
    ]
    until = time.monotonic() + 30
    while not file.exists() or not file.read_text().endswith("}"):
        assert time.monotonic() < until, "the scheduler did not start"
        time.sleep(0.1)
    yield {"DASK_SCHEDULER_ADDRESS": json.loads(file.read_text())["address"]}
    for process in reversed(started):
        process.terminate()
        process.wait(timeout=20)


def test_a_killed_worker_leaves_no_half_file_and_changes_no_byte(texts: Path, tmp_path: Path) -> None:
    def pipeline(out: Path, begun: Path) -> list[Any]:
        begun.mkdir(parents=True)
        return [JsonlReader(str(texts)), Slow(begun), JsonlWriter(str(out), compression=None)]

    LocalPipelineExecutor(
        pipeline(tmp_path / "theirs", tmp_path / "a"), tasks=6, workers=1, logging_dir=str(tmp_path / "la")
    ).run()
    whole, out, begun = contents(tmp_path / "theirs"), tmp_path / "ours", tmp_path / "b"
    seen, halves = [], {}

    def kill() -> None:
        for _ in range(3):
            while not (new := {int(p.name.partition("-")[2]) for p in begun.iterdir()} - set(seen)):
                time.sleep(0.01)
            seen.append(min(new))
            os.kill(seen[-1], signal.SIGKILL)
            halves.update({n: b for n, b in contents(out).items() if whole[n] != b} if out.exists() else {})

    killer = threading.Thread(target=kill)
    executor = DaskPipelineExecutor(
        pipeline(out, begun), tasks=6, workers=2, logging_dir=str(tmp_path / "lb"), cluster=cluster_client(2)
    )
    killer.start()
    executor.run()
    killer.join(timeout=60)
    assert len(seen) == 3
    assert not halves
    assert len({p.name for p in begun.iterdir()}) > 6
    assert contents(out) == whole
    assert not list(tmp_path.rglob(".*.unfinished"))
    assert counts(tmp_path / "lb" / "stats.json") == counts(tmp_path / "la" / "stats.json")


def test_a_task_that_fails_is_named_and_only_it_runs_again(texts: Path, tmp_path: Path) -> None:
    mended = tmp_path / "mended"

    def made() -> DaskPipelineExecutor:
        return DaskPipelineExecutor(
            [JsonlReader(str(texts)), FailsOnTwo(mended), JsonlWriter(str(tmp_path / "out"))],
            tasks=4,
            workers=2,
            logging_dir=str(tmp_path / "log"),
            cluster=cluster_client(2),
        )

    with pytest.raises(
        PipelineFailed, match=r"1 of 4 tasks failed.*rank 2: ValueError: document 30 is bad \(log: .*/task_00002.log"
    ) as failure:
        made().run()
    assert failure.value.ranks == (2,)
    assert isinstance(failure.value.__cause__, ValueError)
    assert sorted(contents(tmp_path / "out")) == ["00000.jsonl.gz", "00001.jsonl.gz", "00003.jsonl.gz"]
    assert "document 30 is bad" in (tmp_path / "log/logs/task_00002.log").read_text()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    mended.touch()
    made().run()
    assert before == {p: p.stat().st_mtime_ns for p in before}
    # The statistics are of all tasks, not of those that ran last.
    assert counts(tmp_path / "log/stats.json")[0][1]["documents"] == 240
    assert sum(len(b.splitlines()) for b in contents(tmp_path / "out").values()) == 240


def test_a_log_is_there_while_its_task_runs(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    pipeline = [JsonlReader(str(texts)), Slow(tmp_path / "begun", 0.01)]
    executor = DaskPipelineExecutor(pipeline, logging_dir=str(tmp_path / "log"), cluster=cluster_client(2))
    running = threading.Thread(target=executor.run)
    running.start()
    until = time.monotonic() + 20
    while not list((tmp_path / "begun").iterdir()):
        assert time.monotonic() < until
        time.sleep(0.02)
    assert "Reading input file 0.jsonl" in (tmp_path / "log/logs/task_00000.log").read_text()
    assert not (tmp_path / "log/completions/00000").exists()
    running.join()
    assert (tmp_path / "log/completions/00000").exists()


def test_parts_of_the_tasks_and_refusals(texts: Path, locally: Path, tmp_path: Path) -> None:
    def made(**given: Any) -> DaskPipelineExecutor:
        pipeline = mixed(texts, tmp_path / "out")
        return DaskPipelineExecutor(
            pipeline, tasks=4, logging_dir=str(tmp_path / "log"), cluster=cluster_client(2), **given
        )

    made(local_tasks=2, local_rank_offset=1).run()
    assert sorted(p.name for p in (tmp_path / "log/completions").iterdir()) == ["00001", "00002"]
    made().run()
    assert contents(tmp_path / "out") == contents(locally / "out")
    assert counts(tmp_path / "log/stats.json") == counts(locally / "log/stats.json")
    with pytest.raises(ValueError, match="tasks 3 to 5 are asked for, of 4"):
        made(local_tasks=2, local_rank_offset=3)
    with pytest.raises(ValueError, match="tasks is 4 and workers 0"):
        made(workers=0)


def test_documents_in_a_list_are_a_step(tmp_path: Path) -> None:
    documents = [Document(text=word, id=word) for word in WORDS]
    kept = LambdaFilter(lambda document: "a" in document.text)
    pipeline = [documents, kept, JsonlWriter(str(tmp_path / "out"))]
    DaskPipelineExecutor(pipeline, logging_dir=str(tmp_path / "log"), cluster=cluster_client(2)).run()
    texts = [json.loads(line)["text"] for data in contents(tmp_path / "out").values() for line in data.splitlines()]
    assert texts == [word for word in WORDS if "a" in word]


def half(folder: DataFolder, name: str) -> None:
    with staged_outputs("t", "2"), folder.open(name, "wt", compression="infer") as file:
        file.write("one\n" * 1000)
        raise KeyError


class TestStaging:
    """What `staged_outputs` does, in this process."""

    def test_a_file_appears_when_it_is_closed(self, tmp_path: Path) -> None:
        folder = get_datafolder(str(tmp_path / "out"))
        plain = DataFolder.open
        with staged_outputs("t", "1"):
            file = folder.open("a/b.jsonl.gz", "wt", compression="infer")
            file.write("one\n")
            assert not (tmp_path / "out/a").exists()
            file.close()
            assert folder.open("a/b.jsonl.gz", "rt", compression="infer").read() == "one\n"
            folder.open("left-open", "wb").write(b"whole all the same")
        assert contents(tmp_path / "out") == {"a/b.jsonl.gz": b"one\n", "left-open": b"whole all the same"}
        # gzip writes the file's name into its header: it is the final one
        assert b"b.jsonl\0" in (tmp_path / "out/a/b.jsonl.gz").read_bytes()[:30]
        assert DataFolder.open is plain

    def test_an_exception_leaves_what_was_there(self, tmp_path: Path) -> None:
        folder = get_datafolder(str(tmp_path / "out"))
        (tmp_path / "out").mkdir()
        (tmp_path / "out/a").write_bytes(b"before")
        with pytest.raises(KeyError):
            half(folder, "a")
        assert contents(tmp_path) == {"out/a": b"before"}
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def test_what_a_killed_attempt_left_goes_with_the_next(self, tmp_path: Path) -> None:
        left = tmp_path / ".out.unfinished" / "t.1" / "a"
        other = tmp_path / ".out.unfinished" / "u.1" / "a"
        for path in (left, other):
            path.parent.mkdir(parents=True)
            path.write_bytes(b"half")
        with staged_outputs("t", "2"):
            get_datafolder(str(tmp_path / "out")).open("b", "wb").close()
        assert not left.exists()
        assert other.exists()

    def test_objects_in_a_store_are_taken_back(self, s3: str) -> None:
        folder = get_datafolder(f"{s3}/out")
        with staged_outputs("t", "1"), folder.open("whole.jsonl.gz", "wt", compression="infer") as file:
            file.write("one\n" * 1000)
        with pytest.raises(KeyError):
            half(folder, "half.jsonl.gz")
        folder.fs.invalidate_cache()
        assert folder.list_files() == ["whole.jsonl.gz"]
        assert folder.open("whole.jsonl.gz", "rt", compression="infer").read() == "one\n" * 1000
