"""Source trees: folders and archives give the same documents, with the language and the licence that hold for each."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest
import zstandard

from gristmill.data.documents import read_rows, shards
from gristmill.data.ingest import IngestConfig, ingest
from gristmill.data.sources.languages import language_of
from gristmill.data.sources.licences import is_licence_name, licence_of_text
from gristmill.data.stage_types import silent

MIT = """Permission is hereby granted, free of charge, to any person obtaining a copy of this software ...
THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND"""
APACHE = "                              Apache License\n                        Version 2.0, January 2004"
FILES = {
    "LICENSE": MIT.encode(),
    "a.py": b"print(1)\n",
    "lib/b.c": b"// SPDX-License-Identifier: GPL-2.0-or-later\nint x;\n",
    "third/COPYING": APACHE.encode(),
    "third/deep/c.rs": b"fn main() {}\n",
    "tool": b"#!/usr/bin/env python3\nprint(2)\n",
    "README.md": b"# words\n",
    "logo.png": b"\x89PNG\0",
    "empty.py": b"",
    "blob.c": b"int\0x",
    "node_modules/x.js": b"not ours",
    "__init__.pyc": b"\0",
}


def laid(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name, data in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def go(tmp_path: Path, path: Path, on_bad: str = "quarantine", **source) -> tuple[dict, list[dict], list[dict]]:
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    asked = {"type": "tree", "name": "code", "paths": [str(path)], **source}
    metrics = ingest(
        IngestConfig.model_validate({"sources": [asked], "on_bad": on_bad}), out, 0, workers=0, progress=silent
    )
    bad = [json.loads(line) for f in sorted((out / "quarantine").glob("*")) for line in f.read_text().splitlines()]
    return metrics, [row for shard in shards(out) for row in read_rows(shard)], bad


def archived(root: Path, path: Path) -> Path:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                archive.write(file, file.relative_to(root))
        return path
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        for file in reversed(files):  # licences come last
            archive.add(file, str(file.relative_to(root)))
    data = held.getvalue()
    pack = {".tar": bytes, ".zst": zstandard.compress}.get(path.suffix)
    if pack is None:
        import gzip

        pack = gzip.compress
    path.write_bytes(pack(data))
    return path


EXPECTED = {
    "a.py": ("Python", "MIT"),
    "lib/b.c": ("C", "GPL-2.0-or-later"),
    "third/deep/c.rs": ("Rust", "Apache-2.0"),
    "tool": ("Python", "MIT"),
}


@pytest.mark.parametrize("form", ["folder", "t.zip", "t.tar", "t.tar.gz", "t.tar.zst", "t.tgz"])
def test_language_and_licence_of_each_file(form: str, tmp_path: Path) -> None:
    root = laid(tmp_path)
    path = root if form == "folder" else archived(root, tmp_path / form)
    metrics, rows, bad = go(tmp_path, path)
    assert not bad
    prefix = "" if form == "folder" else f"{form}/"
    found = {r["id"]: (r["metadata"]["language"], r["metadata"]["licence"]) for r in rows}
    assert found == {f"code/{prefix}{name}": what for name, what in EXPECTED.items()}
    assert rows[0]["metadata"]["kind"] == "code"
    assert metrics["skipped_by_reason"] == {
        "a binary file": 1,
        "an empty file": 1,
        "language Markdown": 1,
        "no language is known by its name": 4,  # two licences, a picture, compiled code
    }


def test_only_some_languages_and_licences(tmp_path: Path) -> None:
    root = laid(tmp_path)
    _, rows, _ = go(tmp_path, root, licences=["MIT", "Apache-2.0"], languages=["Python", "C", "Markdown"])
    assert sorted(r["id"] for r in rows) == ["code/README.md", "code/a.py", "code/tool"]
    with pytest.raises(ValueError, match="no language is called 'Pyhton'"):
        go(tmp_path, root, languages=["Pyhton"])


@pytest.mark.parametrize("form", ["t.zip", "t.tar.gz", "t.tar"])
def test_an_archive_cut_short(form: str, tmp_path: Path) -> None:
    path = archived(laid(tmp_path), tmp_path / form)
    path.write_bytes(path.read_bytes()[:-1400] if form != "t.tar" else path.read_bytes()[:700])
    with pytest.raises(ValueError, match=rf"{form}, record \d+: cut short or damaged"):
        go(tmp_path, path, "refuse")


def test_two_files_of_one_name_in_an_archive(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for name, data in (("a.py", b"x = 1\n"), ("./a.py", b"x = 2\n")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    _, rows, bad = go(tmp_path, tmp_path / "t.tar")
    assert [(r["id"], r["text"]) for r in rows] == [("code/t.tar/a.py", "x = 1\n")]
    assert [(b["record"], b["reason"]) for b in bad] == [(2, "duplicate id")]


def test_a_licence_is_read_once_for_all_files_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    root = laid(tmp_path)
    for number in range(30):
        (root / f"n{number}.py").write_text("x = 1\n")
    opened, plain = [], fsspec.open
    monkeypatch.setattr(fsspec, "open", lambda address, mode: (opened.append(address), plain(address, mode))[1])
    _, rows, _ = go(tmp_path, root)
    assert [r["metadata"]["licence"] for r in rows if "/n" in r["id"]] == ["MIT"] * 30
    assert len(opened) == len(set(opened))
    assert opened


def test_a_source_file_that_is_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "t" / "b.py").write_bytes(b"x = 1\n")
    metrics, rows, bad = go(tmp_path, tmp_path / "t")
    assert [(b["file"], b["reason"]) for b in bad] == [("a.py", "invalid UTF-8")]
    assert len(rows) == 1
    assert metrics["quarantined_by_source"] == {"code": 1}


def test_a_zip_bomb_stays_small(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.py", b"#" * (80 << 20))
        archive.writestr("b.py", b"x = 1\n")
    _, rows, bad = go(tmp_path, tmp_path / "b.zip")
    assert [b["reason"] for b in bad] == ["too large"]
    assert len(rows) == 1


def test_licences_by_their_texts() -> None:
    """The texts that this machine's own packages carry, held against what their metadata says in SPDX's words."""
    from importlib import metadata

    compared = wrong = 0
    for package in metadata.distributions():
        stated = package.metadata.get("License-Expression")
        texts = [f for f in package.files or [] if is_licence_name(f.name)]
        if stated not in ("MIT", "Apache-2.0", "BSD-3-Clause", "BSD-2-Clause", "ISC", "MPL-2.0") or len(texts) != 1:
            continue
        path = Path(str(texts[0].locate()))
        if path.exists():
            compared += 1
            wrong += licence_of_text(path.read_text(errors="replace")) != stated
    assert compared >= 20
    assert (
        wrong <= compared // 10
    )  # some packages put several texts in one file, or a file that says other than they do


def test_gnu_texts_are_told_apart() -> None:
    for name, identifier in {
        "GNU AFFERO GENERAL PUBLIC LICENSE Version 3, 19 November 2007": "AGPL-3.0-only",
        "GNU GENERAL PUBLIC LICENSE Version 2, June 1991 ... GNU Lesser General Public License instead": "GPL-2.0-only",
        "GNU LESSER GENERAL PUBLIC LICENSE Version 2.1, February 1999": "LGPL-2.1-only",
        "no licence at all": None,
    }.items():
        assert licence_of_text(name) == identifier


@pytest.mark.parametrize(
    ("name", "head", "language"),
    [
        ("x/CMakeLists.txt", b"", "CMake"),
        ("Makefile", b"", "Makefile"),
        ("a.b.cpp", b"", "C++"),
        ("run", b"#!/bin/bash\n", "Shell"),
        ("run", b"#!/usr/bin/env -S node --x\n", "JavaScript"),
        (".gitignore", b"", None),
        ("a.unknown", b"#!/bin/sh\n", None),
    ],
)
def test_languages(name: str, head: bytes, language: str | None) -> None:
    assert language_of(name, head) == language
