"""What a training stage has told in log/ so far, read as it grows: each look reads what was appended since the last."""

from __future__ import annotations

import json
from pathlib import Path

from gristmill.flows.cards.folder import Row


class GrowingRows:
    """The rows of a JSON-lines file that is being written.

    A line is read when it is whole; one that its writer, killed, left torn is passed over. A file that begins anew
    (a resumed run writes its curves from its checkpoint on) is read from its start.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._rows: list[Row] = []
        self._position, self._last = 0, b""  # behind the last line that was read, and that line

    def look(self) -> list[Row]:
        """All rows that are there by now."""
        if not self.file.exists():
            return []
        with self.file.open("rb") as file:
            file.seek(self._position - len(self._last))
            if file.read(len(self._last)) != self._last:
                self._rows, self._position, self._last = [], 0, b""
                file.seek(0)
            new = file.read()
        lines = new[: new.rfind(b"\n") + 1].splitlines(keepends=True)
        for line in lines:
            try:
                self._rows.append(json.loads(line))
            except ValueError:
                continue
        if lines:
            self._position, self._last = self._position + sum(map(len, lines)), lines[-1]
        return self._rows


class RunLog:
    """The files of a stage's log/ that its card is made of."""

    def __init__(self, folder: Path) -> None:
        log = folder / "log"
        self._peak, self._notes = log / "peak.json", log / "notes.json"
        self._curves, self._timings, self._loads, self._samples = (
            GrowingRows(log / f"{name}.jsonl") for name in ("curves", "timings", "expert_load", "samples")
        )

    def curves(self) -> list[Row]:
        return self._curves.look()

    def timings(self) -> list[Row]:
        """The last row of each step: a killed run took some of them twice."""
        return [row for _, row in sorted({row["step"]: row for row in self._timings.look() if "step" in row}.items())]

    def loads(self) -> list[Row]:
        return self._loads.look()

    def samples(self) -> list[Row]:
        return self._samples.look()

    def notes(self) -> list[str]:
        """What the stage has to say of how it runs."""
        return json.loads(self._notes.read_text(encoding="utf-8")) if self._notes.exists() else []

    def peak(self) -> Row:
        """What utilisation is held against; nothing where it was not measured."""
        return json.loads(self._peak.read_text(encoding="utf-8")) if self._peak.exists() else {}
