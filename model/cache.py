"""What decoding keeps of tokens, `cache_width` numbers a token and layer: in slots, or in pages.

A place beyond a row's last token may hold what an earlier response or a refused draft left: nobody sees it, since a
token is written before anyone at or behind its position looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gristmill.model.config import ModelConfig

PAGE = 64  # places: some rows of tiles for a GPU; half of it is what a row wastes on average


@dataclass
class Cache:
    """The layers' slots, or where there is a table pages, of S places each; a table names the pages of each row."""

    latent_LBSC: Tensor
    table_BJ: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and places that each may have."""
        slots, places = self.latent_LBSC.shape[1:3]
        return (slots, places) if self.table_BJ is None else (len(self.table_BJ), self.table_BJ.shape[1] * places)


class SlotCache(Cache):
    """A slot of `length` places a row: its token at position p lies at place p."""

    def __init__(self, config: ModelConfig, slots: int, length: int, like: Tensor, layers: int | None = None) -> None:
        layers = config.num_hidden_layers if layers is None else layers
        super().__init__(like.new_zeros(layers, slots, length, config.cache_width))

    def keep(self, rows: Tensor) -> None:
        """These slots alone, in this order, within the memory that is there."""
        self.latent_LBSC[:, : len(rows)] = self.latent_LBSC[:, rows]
        self.latent_LBSC = self.latent_LBSC[:, : len(rows)]


class PagedCache(Cache):
    """Pages for `places` places, which rows of `length` at most take as they grow and give back when they are over.

    A row's memory is that of what it has said, up to a page, and not of the longest that it may say (Kwon et al. 2023,
    arXiv 2309.06180). Rows that begin with the same prompt may `share` the pages that it fills. Where all pages are
    taken, a row is laid aside: its numbers go to the host's memory and come back as they were.

    Page 0 is no row's own. There a row writes what nobody reads: the padding behind its prompt.
    """

    table_BJ: Tensor

    def __init__(self, config: ModelConfig, rows: int, length: int, places: int, like: Tensor) -> None:
        pages, width = places // PAGE, config.cache_width
        numbers = like.new_zeros(config.num_hidden_layers, pages + 1, PAGE, width)
        super().__init__(numbers, torch.zeros(rows, pages_of(length), dtype=torch.int64, device=like.device))
        self._free = list(range(pages, 0, -1))
        self._readers = [0] * (pages + 1)
        self._own: list[list[int]] = [[] for _ in range(rows)]

    @property
    def free(self) -> int:
        """Pages that no row has."""
        return len(self._free)

    def missing(self, row: int, places: int) -> int:
        """Pages that a row lacks for its first `places` places."""
        return max(0, pages_of(places) - len(self._own[row]))

    def grow(self, rows: Sequence[int], places: Sequence[int]) -> None:
        """Give rows pages for their first places; as many as they lack must be free."""
        taken: list[tuple[int, int, int]] = []
        for row, wanted in zip(rows, places, strict=True):
            for _ in range(self.missing(row, wanted)):
                page = self._free.pop()
                self._readers[page] = 1
                taken.append((row, len(self._own[row]), page))
                self._own[row].append(page)
        if taken:
            row_N, number_N, page_N = torch.tensor(taken, device=self.table_BJ.device).unbind(1)
            self.table_BJ[row_N, number_N] = page_N

    def share(self, source: int, row: int, places: int) -> None:
        """Let a row without pages begin with another's first places: full pages are both rows', the rest is copied."""
        common = self._own[source][: places // PAGE]
        for page in common:
            self._readers[page] += 1
        self._own[row] = list(common)
        self.table_BJ[row, : len(common)] = self.table_BJ[source, : len(common)]
        self.grow([row], [places])
        if places % PAGE:
            self.latent_LBSC[:, self._own[row][-1]] = self.latent_LBSC[:, self._own[source][len(common)]]

    def release(self, row: int) -> None:
        """Take a row's pages; those that no other row reads are free."""
        if not self._own[row]:
            return
        for page in reversed(self._own[row]):
            self._readers[page] -= 1
            if not self._readers[page]:
                self._free.append(page)
        self._own[row] = []
        self.table_BJ[row] = 0

    def lay_aside(self, row: int) -> Tensor:
        """A row's numbers in the host's memory, (L, J, PAGE, C + R); its pages are taken."""
        numbers = self.latent_LBSC[:, self._own[row]].cpu()
        self.release(row)
        return numbers

    def take_back(self, row: int, numbers: Tensor) -> None:
        """Give a row without pages what was laid aside."""
        self.grow([row], [numbers.shape[1] * PAGE])
        self.latent_LBSC[:, self._own[row]] = numbers.to(self.latent_LBSC.device)

    def keep(self, rows: Tensor) -> None:
        """These rows alone, in this order; nothing is copied."""
        kept = rows.tolist()
        for row in set(range(len(self._own))) - set(kept):
            self.release(row)
        self._own = [self._own[row] for row in kept]
        self.table_BJ = self.table_BJ[rows]

    def part(self, rows: list[int], places: int) -> Cache:
        """The same pages with these rows alone, and of each so many places."""
        return Cache(self.latent_LBSC, self.table_BJ[rows, : pages_of(places)])


def pages_of(places: int) -> int:
    """Pages that hold so many places."""
    return -(-places // PAGE)
