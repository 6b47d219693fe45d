"""The remote side of a store: an fsspec filesystem below one root, with errors as sentences."""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from pathlib import Path
from typing import Any

from gristmill.flows.errors import UsageError
from gristmill.flows.manifest import CHUNK

UNMET = ("PreconditionFailed", "ConditionalRequestConflict")  # S3's words for a condition that did not hold


class Remote:
    """Files below a URI such as `s3://bucket/prefix`; names are relative to it."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """The filesystem and the root's path, once it has answered."""
        import fsspec

        try:
            filesystem, root = fsspec.core.url_to_fs(self.uri, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UsageError(
                f"store {self.uri!r} cannot be opened ({error}): use a path or s3://bucket/prefix"
            ) from error
        root = root.rstrip("/")
        self._refuse_unreachable(filesystem, root)
        return filesystem, root

    def _refuse_unreachable(self, filesystem: Any, root: str) -> None:
        try:
            try:
                filesystem.ls(root)
            except FileNotFoundError:  # nothing was ever written below the prefix; is the bucket there?
                filesystem.ls(root.split("/")[0])
        except FileNotFoundError as error:
            raise UsageError(f"store {self.uri!r}: there is no such bucket: create it or correct the name") from error
        except Exception as error:  # each provider's library has its own kinds for missing and wrong credentials
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(
                f"store {self.uri!r} cannot be reached ({reason}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                f"and AWS_ENDPOINT_URL for a server of your own"
            ) from error

    @property
    def filesystem(self) -> Any:
        return self._opened[0]

    def path(self, name: str) -> str:
        """The full path of a name below the root."""
        root = self._opened[1]
        return f"{root}/{name}" if name else root

    def check(self) -> None:
        """Refuse a place that cannot be reached, which its first use does as well.

        Raises:
            UsageError: an unknown scheme, no bucket, no credentials, wrong ones, no answer.
        """
        self._opened  # noqa: B018 - opening is the check

    def exists(self, name: str) -> bool:
        return bool(self.filesystem.exists(self.path(name)))

    def names(self, below: str) -> list[str]:
        """Names right below a folder, sorted."""
        try:
            entries = self.filesystem.ls(self.path(below), detail=False)
        except FileNotFoundError:
            return []
        return sorted({e.rstrip("/").rsplit("/", 1)[-1] for e in entries} - {""})

    def sizes(self, below: str) -> dict[str, int]:
        """Size of every file below a folder, by its path relative to it."""
        place = f"{self.path(below)}/"
        try:
            found = self.filesystem.find(place, detail=True)
        except FileNotFoundError:
            return {}
        return {path[len(place) :]: int(info["size"]) for path, info in found.items() if path.startswith(place)}

    def read(self, name: str) -> bytes | None:
        """A file's bytes; none where there is no such file."""
        try:
            return self.filesystem.cat_file(self.path(name))
        except FileNotFoundError:
            return None

    def tag(self, name: str) -> str | None:
        """What the server calls this version of a file (S3's ETag); none where there is no file or no such thing."""
        try:
            return self.filesystem.info(self.path(name)).get("ETag")
        except FileNotFoundError:
            return None

    def sha256(self, name: str) -> str:
        """Hash of a file's bytes where it lies, a block at a time."""
        digest = hashlib.sha256()
        with self.filesystem.open(self.path(name), "rb", block_size=8 * CHUNK, cache_type="none") as file:
            while block := file.read(8 * CHUNK):
                digest.update(block)
        return digest.hexdigest()

    def write(self, name: str, data: bytes, **conditions: Any) -> None:
        """Write a file; `conditions` go to the filesystem (`mode="create"`, S3's `IfMatch`).

        Raises:
            FileExistsError: a condition was not met.
        """
        try:
            self.filesystem.pipe_file(self.path(name), data, **conditions)
        except OSError as error:
            answer = getattr(error.__cause__, "response", {})
            if conditions and answer.get("Error", {}).get("Code") in UNMET:
                raise FileExistsError(f"{name} was written by another meanwhile") from error
            raise

    def get(self, name: str, path: Path) -> None:
        """Fetch a file, whole or not at all.

        Raises:
            FileNotFoundError: there is none.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.tmp")
        self.filesystem.get_file(self.path(name), str(part))
        os.replace(part, path)

    def put(self, path: Path, name: str) -> None:
        """Send a file.

        Raises:
            FileNotFoundError: there is no such file here.
            OSError: it could not be sent, or did not arrive whole.
        """
        size = path.stat().st_size
        try:
            self.filesystem.put_file(str(path), self.path(name))
            arrived = int(self.filesystem.info(self.path(name))["size"])
        except Exception as error:  # each provider's library has its own kinds for what a network does
            path.stat()
            reason = " ".join(str(error).split()) or type(error).__name__
            raise OSError(f"{name} could not be sent to {self.uri} ({reason})") from error
        if arrived != size and path.stat().st_size == size:
            raise OSError(f"{name} was sent to {self.uri}, and {arrived} of {size} bytes arrived")

    def copy(self, name: str, to: str) -> None:
        """Copy a file where it lies."""
        self.filesystem.cp_file(self.path(name), self.path(to))

    def remove(self, name: str) -> None:
        """Remove a file or all that is below a folder; nothing happens where there is none."""
        if self.filesystem.exists(self.path(name)):
            self.filesystem.rm(self.path(name), recursive=True)
