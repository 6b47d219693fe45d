"""The room's public names: each is there, is what it says, and costs nothing until it is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

import gristmill.data as room


@pytest.mark.parametrize("name", sorted(room.PUBLIC))
def test_a_public_name_is_what_its_module_holds(name: str) -> None:
    found = getattr(room, name)
    assert getattr(sys.modules[f"gristmill.data.{room.PUBLIC[name][0]}"], room.PUBLIC[name][1]) is found


def test_the_names_are_those_that_are_told() -> None:
    assert sorted(room.__all__) == sorted(room.PUBLIC)
    with pytest.raises(AttributeError, match=r"no 'dedupe'; its public names are .*deduplicate"):
        room.dedupe  # noqa: B018


def test_importing_the_room_loads_no_library() -> None:
    heavy = "torch", "numba", "datatrove", "datasets", "distributed", "pyarrow"
    code = f"import sys, gristmill.data; print([n for n in {heavy!r} if n in sys.modules])"
    said = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
