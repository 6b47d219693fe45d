"""A file's bytes, decompressed in pieces of bounded size, whatever the file says of itself; ends that come too early
are noticed, and reading can begin again in the middle."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections import deque
from collections.abc import Iterator
from typing import IO, Protocol

import zstandard

READ = 1 << 16  # compressed bytes at once
BLOCK = 1 << 18  # decompressed bytes at once, for the formats whose libraries can be bounded
ZSTD_PIECE = 1 << 12  # zstandard's cannot: 4 KiB give at most 128 MiB (blocks of 4 bytes, each up to 128 KiB)
ZSTD_WINDOW = 1 << 27  # what a frame may ask for; a longer one (zstd --long=28 and more) would need gigabytes

ENDINGS = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}


class DamagedError(Exception):
    """A compressed file that ends too early, or is not what its name says."""


class Member(Protocol):
    """One member of a compressed file: the formats allow several, one behind the other."""

    @property
    def hungry(self) -> bool: ...
    @property
    def ended(self) -> bool: ...
    def inflate(self, data: bytes) -> tuple[bytes, bytes]: ...


class _Gzip:
    def __init__(self) -> None:
        self._one = zlib.decompressobj(wbits=31)
        self.hungry = True

    @property
    def ended(self) -> bool:
        return self._one.eof

    def inflate(self, data: bytes) -> tuple[bytes, bytes]:
        out = self._one.decompress(data, BLOCK)
        self.hungry = len(out) < BLOCK
        return out, self._one.unused_data if self._one.eof else self._one.unconsumed_tail


class _Bzip2:
    def __init__(self) -> None:
        self._one = bz2.BZ2Decompressor()

    @property
    def hungry(self) -> bool:
        return self._one.needs_input

    @property
    def ended(self) -> bool:
        return self._one.eof

    def inflate(self, data: bytes) -> tuple[bytes, bytes]:
        out = self._one.decompress(data, BLOCK)
        return out, self._one.unused_data if self._one.eof else b""


class _Xz(_Bzip2):
    def __init__(self) -> None:
        self._one = lzma.LZMADecompressor(memlimit=256 << 20)


class _Zstd:
    hungry = True

    def __init__(self) -> None:
        self._one = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()

    @property
    def ended(self) -> bool:
        return self._one.eof

    def inflate(self, data: bytes) -> tuple[bytes, bytes]:
        parts, given, at = [], 0, 0
        while at < len(data) and given < BLOCK and not self._one.eof:
            parts.append(self._one.decompress(data[at : at + ZSTD_PIECE]))
            given += len(parts[-1])
            at += ZSTD_PIECE
        return b"".join(parts), (self._one.unused_data if self._one.eof else b"") + data[at:]


MEMBERS: dict[str, type[Member]] = {"gzip": _Gzip, "bzip2": _Bzip2, "xz": _Xz, "zstd": _Zstd}


def compression(name: str) -> str | None:
    """How a file is compressed, by the ending of its name."""
    return next((form for ending, form in ENDINGS.items() if name.lower().endswith(ending)), None)


class Stream:
    """The decompressed bytes of a file, to be read once from front to back.

    Attributes:
        offset: decompressed bytes given so far, counted from the file's beginning.

    Args:
        raw: the file, at its beginning, and seekable if `start` is not the beginning.
        form: a key of `MEMBERS`; none for a file that is not compressed.
        start: (compressed, decompressed) offsets of a place to begin at, as `restart` gave it.
    """

    def __init__(self, raw: IO[bytes], form: str | None, start: tuple[int, int] = (0, 0)) -> None:
        self._raw, self._form = raw, form
        self._packed, self._unpacked = start  # bytes of the file read so far, and what they gave
        self._starts: deque[tuple[int, int]] = deque([start])
        self._buffer, self._at = b"", 0
        self.offset = start[1]
        if start[0]:
            move_to(raw, start[0])
        self._blocks = self._decompressed() if form else self._plain()

    def restart(self, offset: int) -> tuple[int, int]:
        """Where to begin so as to come to a decompressed offset: the last member's beginning before it.

        A plain file begins at that very byte; a file that is one compressed member, at its front.
        """
        if self._form is None:
            return offset, offset
        while len(self._starts) > 1 and self._starts[1][1] <= offset:
            self._starts.popleft()
        return self._starts[0]

    def skip(self, size: int) -> int:
        """Pass over bytes; how many there were."""
        left = size
        while left and self._fill():
            taken = min(left, len(self._buffer) - self._at)
            self._at += taken
            left -= taken
        self.offset += size - left
        return size - left

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes; fewer only at the end. All of them if it is negative."""
        parts, left = [], size
        while left and self._fill():
            part = self._buffer[self._at : self._at + left] if left > 0 else self._buffer[self._at :]
            self._at += len(part)
            left -= len(part) if left > 0 else 0
            parts.append(part)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self.offset += len(data)
        return data

    def some(self) -> bytes:
        """The bytes at hand; none at the end."""
        self._fill()
        data, self._buffer = self._buffer[self._at :] if self._at else self._buffer, b""
        self._at = 0
        self.offset += len(data)
        return data

    def unread(self, data: bytes) -> None:
        """Put bytes back that were read last; what is still at hand is not copied."""
        if self._at >= len(data) and self._buffer.startswith(data, self._at - len(data)):
            self._at -= len(data)
        else:
            self._buffer, self._at = data + self._buffer[self._at :], 0
        self.offset -= len(data)

    def find(self, pattern: bytes) -> bool:
        """Go to the first byte of the next `pattern`, or to the end; whether there is one."""
        while self._fill():
            found = self._buffer.find(pattern, self._at)
            end = found if found >= 0 else len(self._buffer)
            self.offset += end - self._at
            start, self._at = self._at, end
            if found >= 0:
                return True
            tail = self._buffer[max(start, end - len(pattern) + 1) :]  # it may begin there
            if not self._fill():
                return False
            self.unread(tail)
        return False

    def line(self, limit: int) -> bytes:
        """The next line with its end, or its first `limit` bytes; nothing at the end."""
        parts, left = [], limit
        while left and self._fill():
            end = self._buffer.find(b"\n", self._at, self._at + left)
            stop = end + 1 if end >= 0 else min(len(self._buffer), self._at + left)
            parts.append(self._buffer[self._at : stop])
            left -= stop - self._at
            self._at = stop
            if end >= 0:
                break
        self.offset += limit - left
        return b"".join(parts)

    def lines(self, limit: int) -> Iterator[tuple[bytes | None, int]]:
        """Every line without its end, and its length; None for one longer than `limit`, of which no more is held."""
        parts: list[bytes] = []
        held = 0
        while block := self.some():
            self.offset -= len(block)
            pieces = block.split(b"\n")
            last = pieces.pop()
            for piece in pieces:
                if held:
                    held += len(piece)
                    piece = b"".join([*parts, piece]) if held <= limit else None
                    size, held, parts = held, 0, []
                else:
                    size = len(piece)
                    piece = piece if size <= limit else None
                self.offset += size + 1
                yield piece, size
            held += len(last)
            parts = [*parts, last] if len(parts) < 64 else [b"".join([*parts, last])]
            if held > limit:
                parts = []
        if held:
            self.offset += held
            yield (b"".join(parts) if held <= limit else None), held

    def close(self) -> None:
        """Close the file below."""
        self._raw.close()

    def _fill(self) -> bool:
        while self._at >= len(self._buffer):
            block = next(self._blocks, b"")
            if not block:
                return False
            self._buffer, self._at = block, 0
        return True

    def _plain(self) -> Iterator[bytes]:
        while block := self._raw.read(BLOCK):
            yield block

    def _decompressed(self) -> Iterator[bytes]:
        make = MEMBERS[self._form or ""]
        member: Member | None = None
        waiting = b""
        while True:
            if not waiting and (member is None or member.hungry):
                waiting = self._raw.read(READ)
                self._packed += len(waiting)
                if not waiting:
                    break
            if member is None:
                if self._unpacked and not waiting.strip(b"\0"):  # tapes pad with zeros, and so do some writers
                    waiting = b""
                    continue
                member = make()
                self._starts.append((self._packed - len(waiting), self._unpacked))
            try:
                out, waiting = member.inflate(waiting)
            except (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, ValueError) as error:
                raise DamagedError(f"the {self._form} data is damaged ({error})") from error
            if member.ended:
                member = None
            if out:
                self._unpacked += len(out)
                yield out
        if member is not None:
            raise DamagedError(f"the {self._form} data has no end")


def move_to(raw: IO[bytes], offset: int) -> None:
    """Go to an offset of a file; one that cannot seek (a server without ranges) is read up to there."""
    try:
        raw.seek(offset)
        return
    except (ValueError, OSError):  # a streamed file of a web server says that it can seek, and cannot
        left = offset
    while left and (block := raw.read(min(left, BLOCK))):
        left -= len(block)
