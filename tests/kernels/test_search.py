"""What `bench --tune` lists: every candidate gives the right results in the interpreter, at a small shape.

A candidate that is wrong is then known before a GPU's time is spent on it, and what the interpreter does not look at,
warps and buffers, is looked at here.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from gristmill.kernels import tune
from gristmill.kernels.tune import SEARCHED, Search, refusal, results_of, search_of, usual_sizes

INTERPRETED = os.environ.get("GRISTMILL_KERNELS") == "gpu"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="small shapes are for the interpreter")


@pytest.fixture(autouse=True)
def _multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many that few places of a cache are divided, otherwise for each candidate's `filled`."""
    monkeypatch.setattr("gristmill.kernels.mla_decode.gpu._processors", lambda _: 20)


@cache
def small_searches(folder: str) -> list[Search]:
    torch.manual_seed(0)
    module = search_of(folder)
    return list(module.searches("cpu", module.SMALL))


def test_every_folder_with_a_search_is_asked() -> None:
    kernels = Path(tune.__file__).parent
    assert {path.parent.name for path in kernels.glob("*/search.py")} == set(SEARCHED)
    assert all(name.split(".")[0] in {*SEARCHED, "attention"} for name in usual_sizes())


@pytest.mark.parametrize("folder", SEARCHED)
def test_sizes_are_ones_that_a_device_can_be_asked_for(folder: str) -> None:
    for kernel, (usual, others) in search_of(folder).SIZES.items():
        assert others, kernel
        assert len({usual, *others}) == 1 + len(others), f"{kernel} tries a candidate twice"
        for sizes in (usual, *others):
            assert type(sizes) is type(usual)
            for name, number in asdict(sizes).items():
                assert number > 0, (kernel, sizes)
                if name not in ("stages", "programs"):
                    part = number // 3 if name == "rows" and number % 3 == 0 else number  # three parts of a tile
                    assert part & (part - 1) == 0, (kernel, sizes)
            assert sizes.warps <= 32
            assert getattr(sizes, "stages", 1) <= 5
            assert getattr(sizes, "programs", 1) <= 4


@interpreted
@pytest.mark.parametrize("folder", SEARCHED)
def test_every_candidate_is_right(folder: str) -> None:
    found = small_searches(folder)
    assert {search.kernel: (search.usual, search.others) for search in found} == search_of(folder).SIZES
    for search in found:
        wanted = results_of(search, search.usual)
        assert all(t.float().isfinite().all() and t.any() for t in wanted), search.kernel
        for sizes in search.others:
            assert refusal(search, sizes, wanted) is None, (search.kernel, sizes)


@interpreted
@pytest.mark.parametrize("folder", SEARCHED)
def test_a_run_asks_for_what_was_found(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the search's own name, and where nothing was found it takes the search's usual sizes; what is found, it uses."""
    asked: dict[str, Any] = {}
    taken: dict[str, Any] = {}

    def tuned(kernel: str, device: torch.device, usual: Any) -> Any:
        asked[kernel] = usual
        return taken.get(kernel, usual)

    found = small_searches(folder)
    monkeypatch.setattr(importlib.import_module(f"gristmill.kernels.{folder}.gpu"), "tuned", tuned)
    for search in found:
        results_of(search, None)
        assert asked.pop(search.kernel) == search.usual
        taken[search.kernel] = "what was found"
        with pytest.raises(AttributeError, match="'str' object has no attribute"):
            search.results(None)
        del taken[search.kernel]
