"""A text's words as two arrays of places, by spaCy's English rules to the letter or by one pass over code points.

Both splitters know words as runs of a text, so that every count after them is a loop over numbers, and none needs a
Python string a word. Words include punctuation marks, as datatrove's do.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
from numba import njit
from numpy.typing import NDArray

from gristmill.data.filters.characters import SPACE, character_table
from gristmill.data.filters.splitting import split_fast

AT_ONCE = 1 << 16  # runs between white space that are looked up together
KNOWN_CHARACTERS = 1 << 23  # of runs that the exact splitter remembers; then it begins anew
MOST_WORDS = 4_000_000  # of a document, some 24 MB of prose: what a worker of 1 GiB has room for, n-grams and all
BLANK = 0x20
LONGEST_RUN = 2000  # characters without white space that spaCy is asked for: its time grows with their square


@dataclass(frozen=True)
class Words:
    """Word i is characters [starts[i], ends[i]) of its text; both int32 of shape [words]."""

    starts: NDArray[np.int32]
    ends: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.starts)

    def of(self, text: str) -> list[str]:
        """The words as strings."""
        return [text[a:b] for a, b in zip(self.starts.tolist(), self.ends.tolist(), strict=True)]


class TooManyWords(ValueError):
    """A text has more than MOST_WORDS words."""


def _refuse_more(words: int) -> None:
    if words > MOST_WORDS:
        raise TooManyWords(f"more than {MOST_WORDS} words")


class Splitter(Protocol):
    """Splits texts into words."""

    def split(self, text: str, codes: NDArray[np.uint32]) -> Words:
        """The words of a text, whose code points are `codes`.

        Raises:
            TooManyWords: there are more than MOST_WORDS; the memory is bounded before all are found.
        """
        ...


def code_points(text: str) -> NDArray[np.uint32]:
    """A text's code points; shape [characters]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


class FastSplitter:
    """One pass over code points, for all scripts; its rules are those of `splitting.py`."""

    def split(self, text: str, codes: NDArray[np.uint32]) -> Words:
        return Words(*_split_by_fast_rules(codes))


def _split_by_fast_rules(codes: NDArray[np.uint32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    starts, ends = split_fast(codes, character_table(), MOST_WORDS)
    _refuse_more(len(starts))
    return starts, ends


class ExactSplitter:
    """The words that datatrove's splitter of a language gives, where that is spaCy's tokenizer of rules.

    Those rules see a run between white space alone, and a corpus has few different runs: each is split once by spaCy
    and remembered. The one exception (see `_Faces`) is found and split anew. A run of more than LONGEST_RUN characters
    is split by the fast rules, since spaCy's time grows with the square of its length.

    Raises:
        ValueError: see `check_words`.
    """

    def __init__(self, language: str = "en") -> None:
        self._tokenizer = _spacy(language)
        self._faces = _Faces(self._tokenizer)
        self._forget()

    def _forget(self) -> None:
        self._known: dict[str, int] = {}
        self._together: dict[str, list[tuple[int, int]]] = {}
        self._remembered = 0
        self._offsets = np.zeros(1, np.int64)
        self._lengths = np.zeros(0, np.int32)

    def split(self, text: str, codes: NDArray[np.uint32]) -> Words:
        starts, ends = runs(codes, character_table(), MOST_WORDS + 1)
        _refuse_more(len(starts))  # for a run has a word or more
        if not len(starts):
            return Words(np.zeros(0, np.int32), np.zeros(0, np.int32))
        near_faces = self._faces.near(codes, starts, ends)
        parts, at, count = [], 0, 0
        while at < len(starts):
            end = min(at + AT_ONCE, len(starts))
            while end < min(len(starts), at + 2 * AT_ONCE) and near_faces[end - 1]:
                end += 1
            parts.append(self._split_runs(text, starts[at:end], ends[at:end], near_faces[at : end - 1]))
            count += len(parts[-1][0])
            _refuse_more(count)
            at = end
        if self._remembered > KNOWN_CHARACTERS:
            self._forget()
        del starts, ends, near_faces
        return Words(*parts[0]) if len(parts) == 1 else Words(*map(np.concatenate, zip(*parts, strict=True)))

    def _split_runs(
        self, text: str, starts: NDArray[np.int32], ends: NDArray[np.int32], near_faces: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        if self._remembered > KNOWN_CHARACTERS:
            self._forget()
        found = text[starts[0] : ends[-1]].split()
        known = self._known
        missing = [run for run in dict.fromkeys(found) if run not in known]
        if missing:
            self._learn(missing)
        ids = np.fromiter(map(known.__getitem__, found), np.int64, len(found))
        _refuse_more((self._offsets[ids + 1] - self._offsets[ids]).sum())
        word_starts, word_ends = _laid_out(starts, ids, self._offsets, self._lengths)
        groups = self._faces.groups(found, np.flatnonzero(near_faces).tolist())
        if not groups:
            return word_starts, word_ends
        stays = np.ones(len(word_starts), bool)
        anew: list[tuple[int, int]] = []
        for first, last in groups:
            start = int(starts[first])
            low, high = np.searchsorted(word_starts, [start, int(ends[last])])
            stays[low:high] = False
            anew += [(start + a, start + b) for a, b in self._split_together(text[start : ends[last]])]
        together = np.array(anew, np.int32)
        word_starts = np.sort(np.concatenate([word_starts[stays], together[:, 0]]))
        return word_starts, np.sort(np.concatenate([word_ends[stays], together[:, 1]]))

    def _split_together(self, runs_of_text: str) -> list[tuple[int, int]]:
        """Words of several runs as spaCy sees them in one piece."""
        words = self._together.get(runs_of_text)
        if words is None:
            with self._tokenizer.vocab.memory_zone():
                tokens = self._tokenizer(runs_of_text)
                words = [(t.idx, t.idx + len(t)) for t in tokens if not t.text.isspace()]
            self._together[runs_of_text] = words
            self._remembered += len(runs_of_text) + 100 * (1 + len(words))
        return words

    def _learn(self, missing: list[str]) -> None:
        """Split runs that were not seen before, and remember the lengths of their words."""
        short = [run for run in missing if len(run) <= LONGEST_RUN]
        lengths: dict[str, Any] = dict(zip(short, self._lengths_by_spacy(short), strict=True))
        together = 0
        for run in missing:
            if len(run) > LONGEST_RUN:
                lengths[run] = _lengths_by_fast_rules(run)
                together += len(lengths[run])
                _refuse_more(together)  # before anything is remembered
        for run in missing:
            self._known[run] = len(self._known)
            self._remembered += len(run) + 100  # a string and its place in the dictionary
        counts = np.array([len(lengths[run]) for run in missing])
        self._offsets = np.concatenate([self._offsets, self._offsets[-1] + np.cumsum(counts)])
        if len(short) == len(missing):
            flat = [np.fromiter((n for run in missing for n in lengths[run]), np.int32)]
        else:  # a run of millions of words is no list
            flat = [np.asarray(lengths[run], np.int32) for run in missing]
        self._lengths = np.concatenate([self._lengths, *flat])

    def _lengths_by_spacy(self, missing: list[str]) -> Iterator[list[int]]:
        """Lengths of the words of each run.

        All runs are one text, a line each: spaCy has no rule that reaches over the token of a line break. The memory
        zone is datatrove's way as well, and turns off a cache that would change the rules of runs within runs.
        """
        from spacy.attrs import LENGTH

        if not missing:
            return
        with self._tokenizer.vocab.memory_zone():
            document = self._tokenizer("\n".join(missing))
            lengths = document.to_array(LENGTH).tolist()
        at = 0
        for run in missing:
            own, left = [], len(run)
            while left:
                own.append(lengths[at])
                left -= lengths[at]
                at += 1
            yield own
            at += 1  # the line break


def _lengths_by_fast_rules(run: str) -> NDArray[np.int32]:
    """Lengths of the words of one run; all else that it takes is gone on return."""
    starts, ends = _split_by_fast_rules(code_points(run))
    np.subtract(ends, starts, out=ends)
    return ends


class SplitterOnDemand:
    """The exact splitter of a language, made when the first words are asked for: spaCy takes seconds to load.

    A thread has one a language, which goes on from shard to shard with what it remembers.
    """

    def __init__(self, language: str = "en") -> None:
        self._language = language

    def split(self, text: str, codes: NDArray[np.uint32]) -> Words:
        made: dict[str, ExactSplitter] = vars(_of_thread).setdefault("splitters", {})
        if self._language not in made:
            made[self._language] = ExactSplitter(self._language)
        return made[self._language].split(text, codes)


_of_thread = threading.local()


class _Faces:
    """Where spaCy's special words of several marks, such as `:-)`, might reach over a space.

    spaCy looks for them among the tokens, without regard for the spaces between. What it finds over a space it leaves
    as it is, but it no longer looks at the marks in it: in `(= (x` it sees no `(=`. So runs with a space between are
    split together where a special word, cut between two of its tokens, fits their ends.
    """

    def __init__(self, tokenizer: Any) -> None:
        from spacy.tokenizer import Tokenizer

        plain = Tokenizer(
            tokenizer.vocab,
            prefix_search=tokenizer.prefix_search,
            suffix_search=tokenizer.suffix_search,
            infix_finditer=tokenizer.infix_finditer,
            token_match=tokenizer.token_match,
            url_match=tokenizer.url_match,
        )
        self._halves: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for word in tokenizer.rules:
            for token in list(plain(word))[1:]:
                left, right = word[: token.idx], word[token.idx :]
                self._halves.setdefault((left[-1], right[0]), []).append((left, right))
        self._corners = np.array(sorted(ord(a) << 32 | ord(b) for a, b in self._halves), np.int64)

    def near(self, codes: NDArray[np.uint32], starts: NDArray[np.int32], ends: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Whether each run's last character and the next run's first, over one blank, are neighbours in a word."""
        return _near(codes, starts, ends, self._corners)

    def groups(self, found: list[str], near: list[int]) -> list[tuple[int, int]]:
        """First and last of the runs to be split together, of those before and after each of these places."""
        groups: list[tuple[int, int]] = []
        for i in near:
            if self._may_join(found[i], found[i + 1]):
                if groups and groups[-1][1] == i:
                    groups[-1] = (groups[-1][0], i + 1)
                else:
                    groups.append((i, i + 1))
        return [g for g in groups if all(len(found[i]) <= LONGEST_RUN for i in range(g[0], g[1] + 1))]

    def _may_join(self, before: str, after: str) -> bool:
        return any(
            _fits(before[::-1], left[::-1]) and _fits(after, right)
            for left, right in self._halves[before[-1], after[0]]
        )


def _fits(run: str, half: str) -> bool:
    """Whether a run begins with half of a special word, or is the beginning of it; no rule cuts between two letters."""
    if len(run) <= len(half):
        return half.startswith(run)
    return run.startswith(half) and not (half[-1].isalpha() and run[len(half)].isalpha())


def check_words(language: str) -> None:
    """Refuse a language whose words `ExactSplitter` does not split, before it is asked to.

    Raises:
        ValueError: datatrove does not know the language, splits it with a model or a dictionary, or splits each of its
            scripts in another way and the code names none.
    """
    if language != "en":  # which is known to be split by rules: a run of the defaults is planned without spaCy
        _spacy(language)


_loading = threading.Lock()


@contextmanager
def _without_torch() -> Iterator[None]:
    """What is loaded does without torch, where it is not loaded yet: spaCy would take it along for models that are not
    used here, two seconds and 180 MB of each worker. For this process spaCy then has none."""
    with _loading:
        if "torch" in sys.modules:
            yield
            return
        sys.modules["torch"] = None  # type: ignore[assignment]  # which Python takes for a package that is not there
        try:
            yield
        finally:
            del sys.modules["torch"]


@cache
def _spacy(language: str) -> Any:
    """The tokenizer of a language as datatrove has it, over a vocabulary of bare words: what a word looks like
    is half of spaCy's time, and nobody asks here."""
    from datatrove.utils.word_tokenizers import SpaCyTokenizer, load_tokenizer_assignments, load_word_tokenizer

    with _without_torch():
        from spacy.tokenizer import Tokenizer
        from spacy.vocab import Vocab

    known = load_tokenizer_assignments()
    if language not in known:
        raise ValueError(
            f"words of {language!r} are asked for, a language that datatrove's table lacks: give a code such as en or "
            f"de (ISO 639-1), or use mode fast, which splits every script"
        )
    # Of a code without a script the table takes what stands last in it, which for zh and ar is Latin letters.
    scripts = {code: known[code].args for code in sorted(known) if code.startswith(f"{language}_")}  # type: ignore[attr-defined]
    if len(set(scripts.values())) > 1:
        raise ValueError(
            f"the words of language {language!r} are split in another way in each of its scripts: name one "
            f"({', '.join(scripts)}), or use mode fast, which splits every script"
        )
    refusal = (
        f"the words of language {language!r} are not split by rules alone: use mode fast, which splits every script"
    )
    try:
        splitter = load_word_tokenizer(language)
        tokenizer: Any = splitter.tokenizer.tokenizer if isinstance(splitter, SpaCyTokenizer) else None
    except ImportError as error:  # of a model or dictionary
        raise ValueError(f"{refusal} ({error})") from error
    if type(tokenizer) is not Tokenizer:
        raise ValueError(refusal)
    return Tokenizer(
        Vocab(),
        rules=tokenizer.rules,
        prefix_search=tokenizer.prefix_search,
        suffix_search=tokenizer.suffix_search,
        infix_finditer=tokenizer.infix_finditer,
        token_match=tokenizer.token_match,
        url_match=tokenizer.url_match,
        faster_heuristics=tokenizer.faster_heuristics,
        max_cache_size=0,
    )


@njit(cache=True, nogil=True)
def _near(codes, starts, ends, corners):
    """Whether one blank is between each run and the next, and their characters beside it are one of the corners."""
    found = np.zeros(len(starts) - 1, np.bool_)
    for i in range(len(starts) - 1):
        if starts[i + 1] - ends[i] == 1 and codes[ends[i]] == BLANK:
            corner = np.int64(codes[ends[i] - 1]) << 32 | np.int64(codes[starts[i + 1]])
            at = np.searchsorted(corners, corner)
            found[i] = at < len(corners) and corners[at] == corner
    return found


@njit(cache=True, nogil=True)
def runs(codes, table, most):
    """Starts and ends of the runs between white space; of the first `most`."""
    starts = np.empty(min((len(codes) + 1) // 2, most), np.int32)
    ends = np.empty(min((len(codes) + 1) // 2, most), np.int32)
    count, inside = 0, False
    for i in range(len(codes)):
        if count == len(starts):
            break
        space = table[codes[i]] & SPACE != 0
        if inside and space:
            ends[count] = i
            count += 1
            inside = False
        elif not inside and not space:
            starts[count] = i
            inside = True
    if inside:
        ends[count] = len(codes)
        count += 1
    return starts[:count].copy(), ends[:count].copy()


@njit(cache=True, nogil=True)
def _laid_out(starts, ids, offsets, lengths):
    """Starts and ends of the words of runs that begin at `starts`, the words' lengths being known by the runs' ids."""
    total = 0
    for i in range(len(ids)):
        total += offsets[ids[i] + 1] - offsets[ids[i]]
    word_starts, word_ends = np.empty(total, np.int32), np.empty(total, np.int32)
    count = 0
    for i in range(len(ids)):
        at = starts[i]
        for j in range(offsets[ids[i]], offsets[ids[i] + 1]):
            word_starts[count] = at
            at += lengths[j]
            word_ends[count] = at
            count += 1
    return word_starts, word_ends
