"""Fixtures of the model's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def lesson_tokens(tmp_path_factory: pytest.TempPathFactory, laid_out) -> Path:
    """The folder of the tokenize stage for 300 lessons, 320 tokens, a tenth held out; mixtures may lie beside it."""
    from gristmill.data.arithmetic import lesson
    from gristmill.data.stage_types import silent
    from gristmill.data.tokenize import TokenizeConfig, tokenize

    folder = tmp_path_factory.mktemp("corpus")
    rows = [
        {"text": lesson(0, i), "id": f"lessons/{i}", "metadata": {"source": "lessons", "kind": "lessons"}}
        for i in range(300)
    ]
    out = folder / "tokens"
    out.mkdir()
    config = TokenizeConfig(vocab_size=320, sample_bytes=20_000, held_out=0.1)
    tokenize(config, laid_out(folder / "in", rows), out, 0, workers=0, progress=silent)
    return out


@pytest.fixture
def one_rank() -> Iterator[None]:
    """This process is the only rank of a job, so that training may run within it."""
    from tests.model.in_process import only_rank

    with only_rank():
        yield
