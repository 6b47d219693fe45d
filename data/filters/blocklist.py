"""Documents that a list excludes: by the domain, the address or words of their URL, or by words of their text.

The URL rules are those of datatrove's URLFilter, with its normalisation, and in its order: domain, address, hard word,
soft words, part. They differ where its own do less than they say: an entry `example.org` also excludes each of its
subdomains, however deep, and an IP address can be an entry; an address is met with or without its scheme and its last
slash; words do not depend on case.

Words of a text are whole words, or phrases of them, after Unicode's full case folding; in scripts without blanks
(Chinese, Thai, …) an entry is met wherever its characters stand. Accents count: `pêche` does not exclude `peche`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash
from pydantic import Field

from gristmill.data.filters.rule import Prepared, Rule, RuleConfig
from gristmill.data.folded_words import MOST_WORDS, Run, RunIndex, words_of
from gristmill.data.row_files import read_lines
from gristmill.data.sieve import KEEP, Verdict, remove

NOT_ALPHANUMERIC = re.compile(r"[^a-z0-9]+")
SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,31}+://")
LONGEST_HOST = 253  # characters of a domain name (RFC 1035, 2.3.4), without the last dot
LISTS = ("domains", "urls", "url_words", "url_soft_words", "url_parts", "words", "soft_words")


class BlocklistConfig(RuleConfig):
    """Lists in the recipe itself and in files of a line an entry (.gz and .zst too; # begins a comment line)."""

    domains: list[str] = Field(default=[], title="Domains", description="With all their subdomains.")
    domain_files: list[str] = Field(default=[], title="Files of domains", description="One entry a line.")
    urls: list[str] = Field(default=[], title="URLs", description="Whole addresses, with or without scheme.")
    url_files: list[str] = Field(default=[], title="Files of URLs", description="One entry a line.")
    url_words: list[str] = Field(default=[], title="Words in URLs", description="One of them is enough.")
    url_word_files: list[str] = Field(default=[], title="Files of words in URLs", description="One entry a line.")
    url_soft_words: list[str] = Field(default=[], title="Soft words in URLs", description="Several are needed.")
    url_soft_word_files: list[str] = Field(default=[], title="Files of soft words", description="One entry a line.")
    url_parts: list[str] = Field(
        default=[], title="Parts of URLs", description="Anywhere in the letters and digits of an address."
    )
    url_part_files: list[str] = Field(default=[], title="Files of parts of URLs", description="One entry a line.")
    words: list[str] = Field(default=[], title="Words in the text", description="Words or phrases; one is enough.")
    word_files: list[str] = Field(default=[], title="Files of words", description="One entry a line.")
    soft_words: list[str] = Field(default=[], title="Soft words in the text", description="Several are needed.")
    soft_word_files: list[str] = Field(default=[], title="Files of soft words", description="One entry a line.")
    soft_least: int = Field(
        default=2, ge=1, title="Least soft words", description="Different soft words that exclude a document."
    )

    def rule(self, exact: bool) -> Rule:
        """The rule; there is one way of it.

        Raises:
            ValueError: a file cannot be read, or an entry has no word.
        """
        return Blocklist(self)

    def files(self, which: str) -> list[str]:
        """The files of one of `LISTS`."""
        return getattr(self, f"{which.removesuffix('s')}_files")


def rule_files(config: BlocklistConfig) -> list[str]:
    """The files that the lists are read from; their contents belong to the stage's key."""
    return [file for which in LISTS for file in config.files(which)]


def check_blocklist(config: BlocklistConfig) -> None:
    """Refuse files that cannot be read and entries that can never be met, before anything runs.

    Raises:
        ValueError: with the file and what to do.
    """
    for file in rule_files(config):
        if not Path(file).is_file():
            raise ValueError(f"blocklist: there is no file {file!r}: correct its path")
    Blocklist(config)


class Blocklist:
    """Removes documents that a list excludes."""

    name = "blocklist"

    def __init__(self, config: BlocklistConfig) -> None:
        self._soft_least = config.soft_least
        self._domains, self._urls, self._url_words, self._url_soft_words, self._url_parts = (
            _hashed(tuple(getattr(config, which)), _stamped(config.files(which)), which) for which in LISTS[:5]
        )
        self._lengths = _lengths(tuple(config.url_parts), _stamped(config.url_part_files))
        self._words = _text_list(tuple(config.words), _stamped(config.word_files))
        self._soft_words = _text_list(tuple(config.soft_words), _stamped(config.soft_word_files))

    def judge(self, document: Prepared) -> Verdict:
        """By the URL first: it costs nothing."""
        url = document.row["metadata"].get("url")
        verdict = self.judge_url(url) if url else KEEP
        return verdict if verdict.reason else self.judge_text(document.text)

    def judge_url(self, url: str) -> Verdict:
        """What the lists of URLs say."""
        for domain in parents(host_of(url)):
            if domain in self._domains:
                return remove("url blocklist: domain", detail=domain)
        if address(url) in self._urls:
            return remove("url blocklist: url", detail=url)
        words = set(NOT_ALPHANUMERIC.split(url.lower())) - {""}
        hard = sorted(word for word in words if word in self._url_words)
        if hard:
            return remove("url blocklist: word", detail=hard[0])
        soft = sorted(word for word in words if word in self._url_soft_words)
        if len(soft) >= self._soft_least:
            return remove("url blocklist: soft words", detail=", ".join(soft))
        bare = normalised(url)
        for length in self._lengths:
            for at in range(len(bare) - length + 1):
                if bare[at : at + length] in self._url_parts:
                    return remove("url blocklist: part", detail=bare[at : at + length])
        return KEEP

    def judge_text(self, text: str) -> Verdict:
        """What the lists of words say."""
        hard = next(self._words.places(text), None)
        if hard is not None:
            return remove("word blocklist: word", detail=hard[0], spans=[[hard[1], hard[2]]])
        soft: dict[str, list[int]] = {}
        for entry, start, end in self._soft_words.places(text):
            soft.setdefault(entry, [start, end])
            if len(soft) == self._soft_least:
                return remove("word blocklist: soft words", detail=", ".join(soft), spans=list(soft.values()))
        return KEEP


def host_of(url: str) -> str:
    """The host of an address, lower case, without user, port and last dot."""
    rest = SCHEME.sub("", url.strip().lower(), count=1)
    authority = re.split(r"[/?#\\]", rest.removeprefix("//"), maxsplit=1)[0].rsplit("@", 1)[-1]
    host = authority.split("]")[0] + "]" if authority.startswith("[") else authority.split(":")[0]
    return host.rstrip(".")


def _domain(entry: str) -> str:
    host = host_of(entry)
    if len(host.split()) > 1 or host != host.strip():
        raise ValueError(
            f"blocklist: the domain {entry[:80]!r} holds white space, so no address has it: give the domain alone, and "
            f"comments on lines of their own"
        )
    return host


def parents(host: str) -> Iterator[str]:
    """A host and the domains that it lies in, its own name first; of what no host can be as long as, the end alone."""
    if len(host) > LONGEST_HOST:
        host = host[-LONGEST_HOST - 1 :].partition(".")[2]
    while host:
        yield host
        host = host.partition(".")[2]


def address(url: str) -> str:
    """An address as entries are compared: without scheme, the host's case, and the last slash."""
    rest = url.strip()
    scheme = SCHEME.match(rest.lower())
    rest = (rest[scheme.end() :] if scheme else rest).rstrip("/")
    host, slash, path = rest.partition("/")
    return host.lower() + slash + path


def normalised(text: str) -> str:
    """Letters and digits of ASCII, lower case."""
    return NOT_ALPHANUMERIC.sub("", text.lower())


NORMAL = {
    "domains": _domain,
    "urls": address,
    "url_words": normalised,
    "url_soft_words": normalised,
    "url_parts": normalised,
}


class Hashed:
    """A set of strings as sorted 64-bit hashes: eight bytes an entry; millions of Python's strings take gigabytes.

    With four million entries one string of four billion others is taken for one of them.
    """

    def __init__(self, entries: Iterator[str]) -> None:
        self._hashes = np.unique(np.fromiter(map(_hash, entries), np.uint64))

    def __contains__(self, entry: str) -> bool:
        wanted = np.uint64(_hash(entry))
        place = int(np.searchsorted(self._hashes, wanted))
        return place < len(self._hashes) and bool(self._hashes[place] == wanted)


def _hash(entry: str) -> int:
    return xxhash.xxh3_64_intdigest(entry.encode("utf-8", "surrogatepass"))


Stamped = tuple[tuple[str, int, int], ...]


def _stamped(files: Sequence[str]) -> Stamped:
    """Files with their size and time, by which what was read of them is remembered."""
    return tuple((file, Path(file).stat().st_size, Path(file).stat().st_mtime_ns) for file in files)


def _entries(inline: Sequence[str], files: Stamped) -> Iterator[str]:
    yield from (entry for entry in inline if entry.strip())
    for file, _, _ in files:
        yield from (line for _, line in read_lines(Path(file), "blocklist") if not line.startswith("#"))


@lru_cache(maxsize=32)
def _hashed(inline: tuple[str, ...], files: Stamped, which: str) -> Hashed:
    return Hashed(filter(None, map(NORMAL[which], _entries(inline, files))))


@lru_cache(maxsize=8)
def _lengths(inline: tuple[str, ...], files: Stamped) -> list[int]:
    return sorted({len(normalised(entry)) for entry in _entries(inline, files)} - {0})


@lru_cache(maxsize=16)
def _text_list(inline: tuple[str, ...], files: Stamped) -> TextList:
    return TextList(list(dict.fromkeys(_entries(inline, files))))


class TextList:
    """Words and phrases, and where they stand in a text."""

    def __init__(self, entries: Sequence[str]) -> None:
        runs = []
        for number, entry in enumerate(entries):
            size = len(words_of(entry).hashes)
            if not 0 < size <= MOST_WORDS:
                raise ValueError(
                    f"blocklist: the entry {entry[:80]!r} has {size} words, where 1 to {MOST_WORDS} can be met: "
                    f"correct or remove it"
                )
            runs.append(Run(number, 0, size))
        self._entries = entries
        self._spelled = [accented(entry) for entry in entries]
        self._index = RunIndex(entries, runs)

    def places(self, text: str) -> Iterator[tuple[str, int, int]]:
        """(entry, start, end) in the order of their ends."""
        for number, start, end in self._index.hits(text):
            said = accented(text[start:end])
            for run in self._index.uses[number]:
                if self._spelled[run.text] == said:
                    yield self._entries[run.text], start, end


def accented(text: str) -> list[str]:
    """The words of a text after compatibility normalisation and full case folding, with their accents."""
    plain = unicodedata.normalize("NFC", unicodedata.normalize("NFKC", text).casefold())
    words = words_of(plain)
    return [plain[a:b] for a, b in zip(words.starts.tolist(), words.ends.tolist(), strict=True)]
