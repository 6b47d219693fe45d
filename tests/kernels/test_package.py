"""What is built of the kernels' folder holds all that they are compiled from."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for kind in ("*.cpp", "*.h", "*.json") for path in (ROOT / "kernels").rglob(kind))
FOLDERS = sorted({path.parent for path in (ROOT / "kernels").rglob("*.py")})


def settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def package(folder: Path) -> str:
    return ".".join(("gristmill", *folder.relative_to(ROOT).parts))


def test_there_are_sources() -> None:
    assert len(SOURCES) > 10


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_source_is_in_the_package(path: Path) -> None:
    assert any(path.match(pattern) for pattern in settings()["package-data"].get(package(path.parent), []))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_is_a_package(folder: Path) -> None:
    assert package(folder) in settings()["packages"]
