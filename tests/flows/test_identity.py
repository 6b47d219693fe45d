"""Keys: what is in them and what is not; why two differ; fingerprints of code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from gristmill.flows import fingerprint as fingerprints
from gristmill.flows.fingerprint import drifted, fingerprint
from gristmill.flows.identity import canonical, dumped, first_difference, key_of, likeness
from tests.flows.toys import Frozen, Parts


class Inner(Frozen):
    rate: float = 0.1
    sizes: list[int] = Field(default_factory=lambda: [1, 2])


class Config(Frozen):
    inner: Inner = Inner()
    tags: frozenset[str] = frozenset()
    kind: Literal["a", "b"] = "a"
    weights: dict[str, float] = Field(default_factory=dict)
    limit: int | None = None


configs = st.builds(
    Config,
    inner=st.builds(Inner, rate=st.floats(-1e6, 1e6), sizes=st.lists(st.integers(-9, 9), max_size=4)),
    tags=st.frozensets(st.text("abcdef", max_size=3), max_size=5),
    kind=st.sampled_from(["a", "b"]),
    weights=st.dictionaries(st.text("xyz", min_size=1, max_size=3), st.floats(0, 1), max_size=4),
    limit=st.none() | st.integers(0, 9),
)


def identity(config: Any, **other: Any) -> dict[str, Any]:
    made = {"stage": "s", "version": 1, "config": dumped(config), "seed": 0, "inputs": {}, "sources": {}}
    return {**made, **other}


@given(configs)
def test_the_order_of_fields_and_the_way_they_were_given_do_not_matter(config: Config) -> None:
    again = Config.model_validate(dict(reversed(config.model_dump(mode="json").items())))
    assert key_of(identity(again)) == key_of(identity(config))
    explicit = Config(**{name: getattr(config, name) for name in Config.model_fields})
    assert canonical(dumped(explicit)) == canonical(dumped(config))


@given(configs, configs)
def test_keys_are_equal_exactly_where_configurations_are(one: Config, other: Config) -> None:
    assert (key_of(identity(one)) == key_of(identity(other))) == (canonical(dumped(one)) == canonical(dumped(other)))
    same = dumped(one) == dumped(other)
    assert (first_difference(identity(one), identity(other)) is None) == (same or _only_zero_signs(one, other))


def _only_zero_signs(one: Config, other: Config) -> bool:
    """-0.0 and 0.0 are equal and written differently: they have other keys, and no difference that a person sees."""
    return canonical(dumped(one)).replace("-0.0", "0.0") == canonical(dumped(other)).replace("-0.0", "0.0")


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "t"},
        {"version": 2},
        {"seed": 1},
        {"seed": None},
        {"sources": {"a": "b"}},
        {"inputs": {"x": {"stage": "s", "key": "0" * 16}}},
    ],
)
def test_everything_else_of_an_identity_is_in_the_key(change: dict[str, Any]) -> None:
    assert key_of(identity(Config(), **change)) != key_of(identity(Config()))


def test_the_key_of_a_configuration_is_what_it_was() -> None:
    """A change here would make every result of every store new: it must be meant, and said in the changelog."""
    assert key_of(identity(Config(tags=frozenset({"b", "a", "c"})))) == "ac4ffcb653388e23"


def test_a_number_that_is_not_finite_has_no_key() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        key_of(identity(Inner(rate=float("nan"))))


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"config": {"a": 1}}, {"config": {"a": 2}}, "s.a 1 → 2"),
        ({"config": {"a": {"b": [1, 2]}}}, {"config": {"a": {"b": [1, 3]}}}, "s.a.b.1 2 → 3"),
        ({"config": {"a": True}}, {"config": {"a": 1}}, "s.a true → 1"),
        ({"config": {}}, {"config": {"a": "x"}}, 's.a was not there → "x"'),
        ({"config": {"a": None}}, {"config": {}}, "s.a null → is not there"),
        ({"version": 1, "config": {"a": 1}}, {"version": 2, "config": {"a": 2}}, "version 1 → 2"),
        ({"seed": 0}, {"seed": 1}, "seed 0 → 1"),
        ({"sources": {"stdlib": "1"}}, {"sources": {"stdlib": "2"}}, "source stdlib changed"),
        ({"sources": {"stdlib": "1"}}, {"sources": {}}, "source stdlib is gone"),
        ({"sources": {}}, {"sources": {"mine": "1"}}, "source mine is new"),
        (
            {"inputs": {"m": {"stage": "p", "key": "1"}}},
            {"inputs": {"m": {"stage": "p", "key": "2"}}},
            "input m changed (p 2)",
        ),
        ({"inputs": {"m": {"stage": "p", "key": "1"}}}, {"inputs": {}}, "input m is gone"),
        ({}, {}, None),
    ],
)
def test_the_first_difference_in_words(before: dict[str, Any], now: dict[str, Any], said: str | None) -> None:
    empty = identity(Frozen())
    assert first_difference({**empty, **before}, {**empty, **now}) == said


def test_the_nearest_has_most_in_common() -> None:
    now = identity(Parts(parts=5, text="b"))
    assert likeness(identity(Parts(parts=5, text="a")), now) > likeness(identity(Parts(parts=4, text="a")), now)


CODE = {
    "stages": '"""Text."""\nfrom gristmill.data.helper import help_out\n\ndef work(config, out):\n    """Says."""\n    return help_out()\n',
    "helper": "import math\n\ndef help_out():\n    return 1\n",
}  # fmt: skip


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes CODE with changes as `gristmill.data.stages_` and its helper; the fingerprint of `work`."""
    monkeypatch.setattr(fingerprints, "_room", lambda name: tmp_path if name == "data" else None)
    monkeypatch.setattr(fingerprints, "CACHES", tmp_path / "caches")

    def write(**changed: str) -> str:
        for kept in (fingerprints._file_of, fingerprints._said, fingerprints._known):
            kept.cache_clear()  # as in a new process
        for name, text in {**CODE, **changed}.items():
            (tmp_path / f"{name}.py").write_text(text)
        module = ModuleType("stages_under_test")
        exec(compile("def work(config, out): ...", str(tmp_path / "stages.py"), "exec"), module.__dict__)  # noqa: S102
        return fingerprint(module.work)

    yield write
    fingerprints._file_of.cache_clear()
    fingerprints._known.cache_clear()


def test_comments_docstrings_and_layout_do_not_count(code) -> None:
    first = code()
    assert code(stages=CODE["stages"].replace('"""Says."""', "# another comment\n\n")) == first
    assert code(helper='"""New text."""\nimport math\n\n\n\ndef help_out():  # why\n    return (1)\n') == first


def test_code_counts_where_it_is_imported_too(code) -> None:
    first = code()
    assert drifted(first, code(helper=CODE["helper"].replace("return 1", "return 2")))
    assert drifted(first, code(stages=CODE["stages"].replace("return help_out()", "return help_out() + 0")))
    assert code() == first


def test_a_file_at_rest_is_parsed_once(code, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed, really = [], fingerprints._parsed
    monkeypatch.setattr(
        fingerprints, "_parsed", lambda content, package: parsed.append(content) or really(content, package)
    )
    first = code()
    assert len(parsed) == 2
    assert code() == first
    assert len(parsed) == 2
    code(helper=CODE["helper"].replace("return 1", "return 3"))  # of the same size
    assert len(parsed) == 3


@pytest.mark.parametrize(
    "damaged", ["", "{", "[]", *(f'{{"gristmill.data.helper": {row}}}' for row in ("null", "[]", '["x"]', '{"a": 1}'))]
)
def test_a_damaged_cache_of_parsed_files_is_made_again(code, tmp_path: Path, damaged: str) -> None:
    first, (cache,) = code(), (tmp_path / "caches").iterdir()
    whole = cache.read_bytes()
    cache.write_text(damaged)
    assert code() == first
    assert cache.read_bytes() == whole


def test_without_a_place_for_the_cache_there_is_a_fingerprint(code, tmp_path: Path) -> None:
    (tmp_path / "caches").write_text("not a folder")
    assert code() == code()


def test_another_python_is_no_drift() -> None:
    assert not drifted("3.11:abc", "3.12:def")
    assert drifted("3.11:abc", "3.11:def")


def test_a_plan_of_the_real_stages_imports_no_torch() -> None:
    program = (
        "import sys; from gristmill.flows import stages; print(len({stages.pretrain.fingerprint, stages.dedup.fingerprint,"
        " stages.report.fingerprint}), 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["3", "False"]
