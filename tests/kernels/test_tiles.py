"""Sizes of tiles: which candidate is taken, and that what was found for a device is used there and nowhere else."""

from __future__ import annotations

import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from gristmill.kernels import tiles
from gristmill.kernels.mla_attention.gpu import Tiles
from gristmill.kernels.tune import Search, fastest, usual_sizes

SLOW, FAST, WRONG, LARGE = (Tiles(rows, 64, 4, 2) for rows in (16, 32, 64, 128))


def results(sizes: Tiles) -> list[torch.Tensor]:
    if sizes == LARGE:
        raise OutOfResources(300_000, 232_448, "shared memory")
    if sizes == SLOW:
        time.sleep(0.01)
    return [torch.full((4,), 2.0 if sizes == WRONG else 1.0)]


def test_the_fastest_that_fits_and_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert fastest(Search("some.kernel", SLOW, [LARGE, WRONG, FAST], results), "cpu") == FAST
    said = capsys.readouterr().out
    assert "does not fit: rows 128" in said
    assert "refused, its result is 1 apart: rows 64" in said


def test_what_was_found_is_kept_by_device(tmp_path: Path) -> None:
    file = tmp_path / "tiles.json"
    assert tiles.read(file) == {}
    tiles.put("Some GPU", "some.kernel", FAST, file)
    tiles.put("Some GPU", "another", SLOW, file)
    assert set(tiles.read(file)["Some GPU"]) == {"some.kernel", "another"}
    assert tiles._found(file, "some.kernel", "Some GPU", SLOW) == FAST
    assert tiles._found(file, "some.kernel", "Another GPU", SLOW) == SLOW
    assert tiles.tuned("some.kernel", torch.device("cpu"), SLOW) == SLOW


def test_the_file_of_the_repository_names_kernels_and_fields_that_there_are() -> None:
    usual, found = usual_sizes(), tiles.read()
    assert found
    for kernels in found.values():
        for kernel, numbers in kernels.items():
            assert set(numbers) == {field.name for field in fields(usual[kernel])}


def test_what_is_searched_for_is_read_back_as_its_own_kind(tmp_path: Path) -> None:
    """Whatever the search writes, of whichever operation."""
    file = tmp_path / "tiles.json"
    for kernel, usual in usual_sizes().items():
        tiles.put("Some GPU", kernel, replace(usual, warps=16), file)
    for kernel, usual in usual_sizes().items():
        assert tiles._found(file, kernel, "Some GPU", usual) == replace(usual, warps=16)
