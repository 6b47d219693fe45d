"""Stages small enough to reason about, for the tests of the contract; also run as a program, to be killed."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from gristmill.flows.execution import Execution
from gristmill.flows.runners import Plain
from gristmill.flows.stage import Artifact, stage
from gristmill.flows.store import Store

ran: list[str] = []


class Progress(Protocol):
    def __call__(self, done: int, total: int, **values: float) -> None: ...


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Parts(Frozen):
    """How many numbered parts are written, and how long one takes."""

    parts: int = Field(default=3, ge=1, title="Parts", description="Files written.")
    text: str = Field(default="a", title="Text", description="What stands in them.")


class Join(Frozen):
    between: str = Field(default="+", title="Between", description="What joins the parts.")


class Source(Frozen):
    path: str = Field(title="Path", description="A file outside the store.")


class Toy(Frozen):
    name: str = "toy"
    seed: int = 0
    write: Parts = Parts()
    join: Join = Join()
    count: Frozen = Frozen()


def write_parts(config: Parts, out: Path, seed: int, *, progress: Progress, workers: int) -> dict[str, Any]:
    """Resumable: each part is written aside and renamed; TOY_SLEEP seconds a part; work/ counts the starts."""
    ran.append("write")
    work = out / "work"
    work.mkdir(exist_ok=True)
    for number in range(config.parts):
        part = out / f"part-{number}.txt"
        if not part.exists():
            time.sleep(float(os.environ.get("TOY_SLEEP", "0")))
            aside = part.with_name(f"{part.name}.tmp")
            aside.write_text(f"{config.text}{number}/{seed}")
            os.replace(aside, part)
        progress(number + 1, config.parts)
    shutil.rmtree(work)
    (out / "log" / "when.txt").write_text(str(time.time_ns()))
    return {"tokens": config.parts, "workers_used": 0}


def join_parts(config: Join, parts: Path, out: Path) -> dict[str, Any]:
    ran.append("join")
    texts = [p.read_text() for p in sorted(parts.glob("part-*.txt"))]
    (out / "joined.txt").write_text(config.between.join(texts))
    return {"parts": len(texts)}


def count_characters(config: Frozen, joined: Path, out: Path) -> dict[str, Any]:
    ran.append("count")
    length = len((joined / "joined.txt").read_text())
    (out / "count.txt").write_text(str(length))
    return {"characters": length}


write = stage("write", version=1)(write_parts)
join = stage("join", version=1)(join_parts)
count = stage("count", version=1)(count_characters)


def toy(recipe: Toy) -> Artifact:
    parts = write(recipe.write, seed=recipe.seed)
    return count(recipe.count, joined=join(recipe.join, parts=parts))


class Heard:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.states: list[tuple[str, str]] = []
        self.said: list[str] = []

    def stage(self, name: str, state: str, **values: Any) -> None:
        self.states.append((name, state))

    def progress(self, name: str, done: int, total: int, **values: float) -> None: ...

    def say(self, text: str) -> None:
        self.said.append(text)


def go(store: Store, recipe: Toy | None = None, *, pipeline: Any = toy, **asked: Any) -> dict[str, Any]:
    """Run; the record. `ran` holds what was computed in it."""
    ran.clear()
    until, from_ = asked.pop("until", None), asked.pop("from_", None)
    watcher = asked.pop("watcher", None)
    execution = asked.pop("execution", Execution(workers=0, threads=1))
    return Plain(store, execution, watcher, **asked).run(pipeline, recipe or Toy(), until, from_)


def main() -> None:
    """`python toys.py STORE CACHE PARTS`: one run, to be killed from outside."""
    where, cache, parts = sys.argv[1:]
    go(Store(where, Path(cache)), Toy(write=Parts(parts=int(parts))))


if __name__ == "__main__":
    main()
