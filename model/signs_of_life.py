"""How a job's launcher tells ranks that work from ranks that hang: a file of each in log/ changes as the rank works."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

LONG_SECONDS = 1800.0  # the most that a rank asks for: what a profile's export may take
SLOWEST = 100e6  # bytes a second of a slow disk


def unwatched() -> None:
    """A sign of life where nobody waits for one."""


def seconds_to_move(size: int) -> float:
    """What reading or writing so many bytes in one go may take."""
    return min(size / SLOWEST, LONG_SECONDS)


class SignOfLife:
    """A rank's own file. In it are the seconds that its next sign may be late for a reason; mostly none."""

    def __init__(self, log: Path, rank: int) -> None:
        self.path = log / f"alive-{rank:05d}"

    def show(self) -> None:
        """Say that this rank works."""
        self.path.write_text("", encoding="ascii")

    def ask_for(self, seconds: float) -> None:
        """Say that this rank works, and that its next sign may be so much later than usual."""
        self.path.write_text(f"{seconds:g}", encoding="ascii")

    def end(self) -> None:
        """Be watched no longer."""
        self.path.unlink(missing_ok=True)


class SignsOfLife:
    """Notes when each rank's file last changed, by this machine's clock: those of several nodes may differ.

    Args:
        seconds: of silence that a rank may keep without asking, and of its start behind the first one's.
        ranks: how many there should be.
    """

    def __init__(self, log: Path, seconds: float, ranks: int) -> None:
        self.log, self.seconds, self.ranks = log, seconds, ranks
        self._seen: dict[str, tuple[int, float]] = {}
        self._absent, self._first = set(range(ranks)), 0.0

    def hung(self) -> tuple[int, float] | None:
        """(the rank that stopped first, the seconds it had) where every rank has been silent for too long.

        Ranks wait for each other in sums, so one that hangs silences all, and is the one that stopped first; one that
        writes a model while the others wait for it shows life for all, and so does one that asked for time.
        """
        now, before = time.monotonic(), self._seen
        self._seen, allowed = {}, {}
        for path in self.log.glob("alive-*"):
            with suppress(FileNotFoundError):  # a rank that is through its steps removes its own
                changed = path.stat().st_mtime_ns
                allowed[path.name] = allowed_silence(path, self.seconds)
                known, since = before.get(path.name, (0, now))
                self._seen[path.name] = (changed, since if known == changed else now)
        if not self._seen or any(now - since <= allowed[name] for name, (_, since) in self._seen.items()):
            return None
        # Of those that were seen to change in one look, the one whose file is older by the disk's clock.
        first = min(self._seen, key=lambda name: (self._seen[name][1], self._seen[name][0]))
        return rank_of(first), allowed[first]

    def absent(self) -> int | None:
        """The first rank that has not appeared `seconds` after another one did, of those that `hung` has looked at."""
        if not self._absent:
            return None
        now = time.monotonic()
        if len(self._absent) == self.ranks:
            self._first = now
        self._absent -= {rank_of(name) for name in self._seen}
        return min(self._absent) if self._absent and now - self._first > self.seconds else None


def allowed_silence(path: Path, seconds: float) -> float:
    """Seconds that the rank of this file may be silent: these, and those it asked for.

    Raises:
        FileNotFoundError: it was removed meanwhile.
    """
    asked = path.read_text(encoding="ascii")
    return seconds + float(asked) if asked else seconds


def rank_of(name: str) -> int:
    """The rank whose file has this name."""
    return int(name.removeprefix("alive-"))
