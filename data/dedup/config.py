"""What is asked of the `dedup` stage."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from gristmill.data.config import Config

Policy = Literal["first", "longest", "quality", "source"]


class DedupConfig(Config):
    """Exact duplicates, equal URLs, and near duplicates by MinHash-LSH over word n-grams.

    A pair of similarity J becomes a candidate with probability 1 − (1 − J^rows)^buckets. FineWeb's 14 × 8 (arXiv
    2406.17557, section 3.4) finds 77 % of the pairs at 0.75; since every candidate is verified here, 24 × 6 can afford
    to find 99 %.
    """

    exact: bool = Field(
        default=True,
        title="Exact duplicates",
        description="Remove documents equal to another after NFKC, lower case and single blanks.",
    )
    url: bool = Field(
        default=False,
        title="Equal URLs",
        description="Remove documents whose normalised URL another has too. Only for sources with one document a URL.",
    )
    near: bool = Field(default=True, title="Near duplicates", description="Remove near duplicates by MinHash-LSH.")
    ngram: int = Field(default=5, ge=1, le=50, title="Words a shingle", description="n of the word n-grams compared.")
    buckets: int = Field(default=24, ge=1, le=256, title="Buckets", description="Bands of the signature.")
    rows: int = Field(
        default=6, ge=1, le=64, title="Rows", description="Minima a bucket; all must agree to make a candidate."
    )
    threshold: float = Field(
        default=0.75,
        gt=0,
        le=1,
        title="Threshold",
        description="Least Jaccard similarity of shingles of a near duplicate.",
    )
    leaders: int = Field(
        default=32,
        ge=1,
        le=1024,
        title="Compared in a bucket",
        description="A document is compared with at most this many of each of its buckets, the best-ranked ones.",
    )
    policy: Policy = Field(
        default="first",
        title="Which one stays",
        description="first, longest (characters), quality (a number in the metadata), or source (a list); then first.",
    )
    quality_field: str = Field(
        default="quality",
        min_length=1,
        title="Field of the quality",
        description="With the policy quality: a number in the metadata, more is better; without it a document is last.",
    )
    preferred_sources: tuple[str, ...] = Field(
        default=(),
        max_length=1000,
        title="Preferred sources",
        description="With the policy source: names of sources, the best first; all others come after them.",
    )
    against: tuple[str, ...] = Field(
        default=(),
        max_length=10_000,
        title="Earlier indexes",
        description="Folders `index` of earlier dedup outputs (paths or s3://), in order: what they hold came before.",
    )

    @model_validator(mode="after")
    def _sources_are_named(self) -> Self:
        if self.policy == "source" and not self.preferred_sources:
            raise ValueError("the policy source needs preferred_sources: name at least one, or take another policy")
        if not (self.exact or self.url or self.near):
            raise ValueError("exact, url and near are all off: turn one on, or leave the stage out")
        return self

    def parameters(self) -> dict[str, Any]:
        """What an index was made by: all but the indexes it was compared with."""
        return self.model_dump(mode="json", exclude={"against"})

    def kinds(self) -> list[str]:
        """The kinds of keys by which documents meet: exact, url and the buckets' numbers."""
        buckets = [f"{number:03d}" for number in range(self.buckets)] if self.near else []
        return ["exact"] * self.exact + ["url"] * self.url + buckets
