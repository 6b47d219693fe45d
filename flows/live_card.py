"""The Prefect artifact of a stage: made while the stage still runs, brought up to date now and then, and at its end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uuid import UUID

CARD_SECONDS = 30.0


class LiveCard:
    """The card of one attempt at a stage, a single artifact that is updated in place."""

    def __init__(self, stage: str, title: str, folder: Path, every: float = CARD_SECONDS) -> None:
        from gristmill.flows.cards.run_log import RunLog

        self.stage, self.title, self.log, self.every = stage, title, RunLog(folder), every
        self.artifact: UUID | None = None
        self.last = time.monotonic()

    def refresh(self) -> str | None:
        """Show what the stage has told by now, at most every `every` seconds; a sentence where that went wrong.

        A server that does not answer must not end a training run: the card is then left as it is, for good.
        """
        if time.monotonic() - self.last < self.every:
            return None
        from gristmill.flows.cards.training import live_card

        card = live_card(self.stage, self.title, self.log)
        if card is not None:
            self._show(card)
        self.last = time.monotonic()  # what the picture took is not part of the pause

    def finish(self, card: str) -> None:
        """Show the card of the finished stage."""
        self._show(card)

    def _show(self, card: str) -> None:
        if self.artifact is None:
            self.artifact = show_card(self.stage, self.title, card)
            return
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.actions import ArtifactUpdate

        with get_client(sync_client=True) as client:
            client.update_artifact(self.artifact, ArtifactUpdate(data=card))


def show_card(stage: str, title: str, card: str) -> UUID:
    """Make the artifact of a stage in the flow run in force; its id."""
    from prefect.artifacts import create_markdown_artifact

    made: Any = create_markdown_artifact(card, key=artifact_key(stage), description=title)
    return made


def artifact_key(stage: str) -> str:
    """Prefect's keys are lower case with dashes."""
    return stage.replace("_", "-")
