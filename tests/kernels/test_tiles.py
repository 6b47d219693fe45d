"""Sizes of tiles: which candidate is taken, and that what was found for a device is used there and nowhere else."""

from __future__ import annotations

import math
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources, PTXASError

from gristmill.kernels import tiles, tune
from gristmill.kernels.mla_attention.gpu import Tiles
from gristmill.kernels.tune import Search, fastest, refusal, results_of, usual_sizes

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


def test_what_does_not_compile_ends_no_search(capsys: pytest.CaptureFixture[str]) -> None:
    def compiled(sizes: Tiles) -> list[torch.Tensor]:
        if sizes == WRONG:
            raise PTXASError("too many registers")
        return results(sizes)

    assert fastest(Search("some.kernel", SLOW, [WRONG, FAST], compiled), "cpu") == FAST
    assert "fails, PTXASError PTXAS error: too many registers: rows 64" in capsys.readouterr().out


def test_what_a_candidate_leaves_out_is_not_what_the_one_before_left() -> None:
    place = torch.zeros(8), torch.zeros(8, dtype=torch.int64)

    def halves(sizes: Tiles) -> list[torch.Tensor]:
        for t in place:
            t[: 4 if sizes == WRONG else 8] = 3
        return list(place)

    search = Search("some.kernel", SLOW, [WRONG], halves)
    wanted = results_of(search, SLOW)
    assert refusal(search, FAST, wanted) is None
    assert refusal(search, WRONG, wanted) == "refused, its result is nan apart"


def test_whole_numbers_are_right_or_wrong() -> None:
    """Of a long order, two places that are exchanged are a small part."""

    def order(sizes: Tiles) -> list[torch.Tensor]:
        found = torch.arange(10_000)
        if sizes == WRONG:
            found[:2] = found[:2].flip(0)
        return [found]

    search = Search("some.kernel", SLOW, [WRONG], order)
    wanted = results_of(search, SLOW)
    assert refusal(search, FAST, wanted) is None
    assert refusal(search, WRONG, wanted) == "refused, its result is not equal"


def test_results_are_compared_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = float((mine.float() - theirs.float()).norm() / theirs.float().norm())
    for piece in (4, 35, 100):
        monkeypatch.setattr(tune, "PIECE", piece)
        assert tune.distance(mine, theirs) == pytest.approx(wanted)  # of 35 numbers in float32, in another order
    theirs[4, 6] = float("nan")
    assert math.isnan(tune.distance(mine, theirs))


def test_inputs_that_are_written_over_are_put_back() -> None:
    x = torch.ones(4)
    search = Search("some.kernel", SLOW, [FAST], lambda _: [x.mul_(2)], partial(x.fill_, 1.0))
    assert fastest(search, "cpu") in (SLOW, FAST)
    assert not x.isnan().any()  # which what is timed would have gone on with
    assert results_of(search, FAST)[0].eq(2).all()


def test_the_fastest_are_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searches = [Search("some.kernel", SLOW, [FAST], results), Search("another", FAST, [SLOW], results)]
    monkeypatch.setattr(tune, "search_of", lambda _: SimpleNamespace(searches=lambda _: iter(searches)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    tune.tune(["some"], "cpu", tmp_path / "tiles.json")
    numbers = {"rows": FAST.rows, "keys": FAST.keys, "warps": FAST.warps, "stages": FAST.stages}
    assert tiles.read(tmp_path / "tiles.json") == {"Some GPU": {"some.kernel": numbers, "another": numbers}}


def test_a_run_takes_what_was_found_for_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what is found after it asked."""
    file, device = tmp_path / "tiles.json", torch.device("cuda", 0)
    monkeypatch.setattr(tiles, "FILE", file)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    tiles._found_on.cache_clear()
    assert tiles.tuned("some.kernel", device, SLOW) == SLOW
    tiles.put("Some GPU", "some.kernel", FAST, file)
    assert tiles.tuned("some.kernel", device, SLOW) == FAST
    assert tiles.tuned("some.kernel", torch.device("cpu"), SLOW) == SLOW
    tiles._found_on.cache_clear()


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
