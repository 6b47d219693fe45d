"""A folder that a person names, as a local one: files of a remote store are fetched for as long as they are read.

What a run has not finished lies there as a snapshot (`gristmill.flows.mirror`): `<stage>/<key>/work/checkpoint-…` of a
stage that still runs, or was killed, is found in it.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from gristmill.flows.errors import UsageError
from gristmill.flows.mirror import fetch_sent, snapshot
from gristmill.flows.remote import Remote

UNFINISHED = re.compile(r"(?P<stage>.+/[0-9a-f]{16})/(?P<below>.+)")


def is_remote(place: str) -> bool:
    """Whether a place is an fsspec URI such as `s3://bucket/prefix`."""
    return "://" in place and not place.startswith("file://")


def local_path(place: str) -> Path:
    """A place to write to.

    Raises:
        UsageError: it is remote.
    """
    if is_remote(place):
        raise UsageError(f"{place} is not on this machine: write to a local folder, and copy it there")
    return Path(place.removeprefix("file://"))


@contextmanager
def fetched(places: list[str], only: Collection[str] | None = None) -> Iterator[list[Path]]:
    """Local folders that hold what lies at these places; copies of remote ones are removed at the end.

    Of a remote one all files are fetched, or `only` those of these names.

    Raises:
        UsageError: a remote place cannot be reached, or holds nothing.
        ValueError: a file of a snapshot is missing or has other bytes than were sent.
    """
    with tempfile.TemporaryDirectory(prefix="gristmill-") as temporary:
        yield [
            _fetch(place.rstrip("/"), Path(temporary) / str(i), only) if is_remote(place) else local_path(place)
            for i, place in enumerate(places)
        ]


def _fetch(uri: str, folder: Path, only: Collection[str] | None) -> Path:
    """Fetch the files below a URI; the folder that holds them, whose last name is that of the URI."""
    out, far = folder / uri.rsplit("/", 1)[-1], Remote(uri)
    if names := far.sizes(""):
        for name in names:
            if only is None or name in only:
                far.get(name, out / name)
        return out
    unfinished = UNFINISHED.fullmatch(uri)
    far = Remote(f"{unfinished['stage']}.partial") if unfinished else far
    below = f"{unfinished['below']}/" if unfinished else ""
    sent: Mapping[str, str] = snapshot(far, "") or {} if unfinished else {}
    found = {name.removeprefix(below): digest for name, digest in sent.items() if name.startswith(below)}
    if not found:
        raise UsageError(f"{uri} holds nothing: give the folder of a model or of a checkpoint")
    for name, digest in found.items():
        if wrong := fetch_sent(far, digest, out / name):
            raise ValueError(f"{below}{name} of the snapshot {far.uri} {wrong}: the run must send it again")
    return out
