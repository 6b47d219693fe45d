"""The language rule: a document stays if one of the wanted languages is likely enough (CCNet, arXiv 1911.00359)."""

from __future__ import annotations

from pydantic import Field, field_validator

from gristmill.data.filters.fasttext_model import language_identifier
from gristmill.data.filters.rule import Prepared, Rule, RuleConfig
from gristmill.data.sieve import Verdict, remove

DIGITS = 4  # of a certainty, in metadata: what rounding of single precision leaves


class Language(RuleConfig):
    """fastText's identifier of 176 languages on the whole text; datatrove's rule, with the model of a wheel."""

    languages: tuple[str, ...] = Field(
        default=("en",), title="Languages", description="ISO 639 codes of the languages that stay; empty keeps all."
    )
    least_score: float = Field(
        default=0.65, ge=0, le=1, title="Least certainty", description="The language must be more certain than this."
    )
    label_only: bool = Field(
        default=False, title="Label only", description="Write language and certainty to the metadata; remove nothing."
    )

    @field_validator("languages")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = sorted(set(value) - set(language_identifier().labels)) if value else []
        if unknown:
            raise ValueError(
                f"languages has {unknown[0]!r}, which the identifier does not know: give codes such as en, de, zh "
                "(ISO 639-1, or 639-3 where there is no shorter one)"
            )
        return value

    def rule(self, exact: bool) -> Rule:
        return _Language(self, exact)


class _Language:
    name = "language"

    def __init__(self, config: Language, exact: bool) -> None:
        self.config, self._exact = config, exact
        self._model = language_identifier()
        self._wanted = [self._model.labels.index(code) for code in config.languages]

    def judge(self, document: Prepared) -> Verdict:
        scores = self._model.scores(document.text, in_order=self._exact)
        best = int(scores.argmax())
        language, score = self._model.labels[best], float(scores[best])
        wanted = max((float(scores[i]) for i in self._wanted), default=score)
        values = {"language certainty": score}
        if self.config.label_only or wanted > self.config.least_score:
            found = {"language": language, "language_score": round(score, DIGITS)}
            # What a source says of its documents' languages is not overwritten.
            known = document.row["metadata"]
            return Verdict(metadata={k: v for k, v in found.items() if known.get(k) is None}, values=values)
        reason = "uncertain" if not self._wanted or best in self._wanted else "another language"
        return remove(f"{self.name}: {reason}", values=values, detail=f"{language} {score:.2f}")
