"""What stages made and the next one cannot take: refused before its process starts, and in the plan once it is there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from gristmill.data.mix import MixConfig
from gristmill.data.shards import write_index, write_shard
from gristmill.flows import stages
from gristmill.flows.cli import guarded
from gristmill.flows.errors import UsageError
from gristmill.flows.execution import Execution
from gristmill.flows.plan import Plan
from gristmill.flows.recipe import Recipe, load_recipe
from gristmill.flows.runners import Plain
from gristmill.flows.stage import Artifact, stage
from gristmill.flows.store import Store
from tests.flows.toys import Frozen

LENGTH = 64  # of the sequences of `smoke`
EXTENDED = "extend=[{sequence_length: 128, batch_sequences: 2, steps: 2}]"


class Vocabulary(Frozen):
    """Tokens of a vocabulary, and how many training documents of a sequence's length are in the shards."""

    size: int = 96
    documents: int = 40


def write_tokens(config: Vocabulary, out: Path) -> dict[str, Any]:
    (out / "tokenizer").mkdir()
    words = {f"w{i}": i for i in range(config.size)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(out / "tokenizer" / "tokenizer.json"))
    streams = {}
    for split, count in (("train", config.documents), ("held_out", 4)):
        documents = [np.arange(LENGTH, dtype="<u2") % config.size for _ in range(count)]
        entry = write_shard(out / "tokens", split, "a", 0, documents, range(count), "uint16")
        streams[split, "a"] = ([entry], LENGTH * count)
    write_index(out / "tokens", config.size, "0" * 64, streams)
    return {}


def write_model(config: Vocabulary, out: Path) -> dict[str, Any]:
    (out / "model").mkdir()
    (out / "model" / "config.json").write_text(json.dumps({"vocab_size": config.size}))
    return {}


def write_nothing(config: Frozen, out: Path) -> dict[str, Any]:
    return {}


tokens = stage("tokens", version=1)(write_tokens)
base = stage("base", version=1)(write_model)
nothing = stage("nothing", version=1)(write_nothing)


def cold_start(recipe: Recipe, model: Artifact, shards: Artifact) -> None:
    stages.cold_start(recipe.cold_start, model=model, problems=nothing(Frozen()), tokenizer=shards, seed=0)


def rl_zero(recipe: Recipe, model: Artifact, shards: Artifact) -> None:
    stages.rl_zero(recipe.rl_zero, model=model, problems=nothing(Frozen()), tokenizer=shards, seed=0)


def rl(recipe: Recipe, model: Artifact, shards: Artifact) -> None:
    stages.rl(recipe.rl, model=model, problems=nothing(Frozen()), tokenizer=shards, seed=0)


def evaluate(recipe: Recipe, model: Artifact, shards: Artifact) -> None:
    problems = nothing(Frozen())
    models = {"base": model, "cold_start": model, "zero": model, "rl": model}
    stages.evaluate(recipe.evaluate, problems=problems, tokenizer=shards, documents=problems, **models, seed=0)


def export(recipe: Recipe, model: Artifact, shards: Artifact) -> None:
    stages.export(recipe.export, model=model, tokenizer=shards)


def extend_1(recipe: Recipe, model: Artifact, shards: Artifact) -> None:
    asked = recipe.phases[0]
    mixture = stages.mix_longer[0](mixing(recipe.mixing_of(asked)), tokens=shards, seed=0)
    stages.extend[0](asked, model=model, tokens=shards, mixture=mixture, seed=0)


def mixing(asked: MixConfig, **changes: Any) -> MixConfig:
    return asked.model_copy(update={"weights": {}, **changes})


def pipeline_of(
    last: Callable[[Recipe, Artifact, Artifact], None], model: Vocabulary, shards: Vocabulary
) -> Callable[[Recipe], None]:
    return lambda recipe: last(recipe, base(model), tokens(shards))


def run(store: Store, pipeline: Any, recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """As the command line does: the exit code, and what it says."""
    runner = Plain(store, Execution(workers=0, threads=1, device="cpu"))
    code = guarded(lambda: runner.run(pipeline, recipe))
    return code, capsys.readouterr().err.strip()


@pytest.mark.parametrize(
    ("last", "of"),
    [
        (cold_start, "tokenizer"),
        (rl_zero, "tokenizer"),
        (rl, "tokenizer"),
        (evaluate, "tokenizer"),
        (export, "tokenizer"),
        (extend_1, "shards"),
    ],
)
@pytest.mark.parametrize("size", [95, 97])
def test_another_vocabulary_is_refused_before_a_process_starts(
    last: Callable[[Recipe, Artifact, Artifact], None], of: str, size: int, tmp_path: Path, capsys
) -> None:
    store, recipe = Store(tmp_path / "store"), load_recipe("smoke", [EXTENDED])
    pipeline = pipeline_of(last, Vocabulary(size=size), Vocabulary())
    said = (
        f"stage {last.__name__}: the model has a vocabulary of {size} tokens and the {of} one of 96: give a model of "
        f"96 tokens, or tokenize with vocab_size {size}"
    )
    assert run(store, pipeline, recipe, capsys) == (2, f"gristmill: {said}")
    assert not (store.local / last.__name__).exists()  # neither a process nor its folder
    # Now that both are there the plan refuses them, and a run before it begins.
    runs = len(list((store.local / "runs").iterdir()))
    with pytest.raises(UsageError) as refused:
        Plan(store).run(pipeline, recipe)
    assert str(refused.value) == said
    assert run(store, pipeline, recipe, capsys) == (2, f"gristmill: {said}")
    assert len(list((store.local / "runs").iterdir())) == runs


def test_one_vocabulary_is_planned(tmp_path: Path, capsys) -> None:
    store, recipe = Store(tmp_path / "store"), load_recipe("smoke", [EXTENDED])
    for last in (base, tokens):
        Plain(store, Execution(workers=0, threads=1)).run(lambda recipe, last=last: last(Vocabulary()), recipe)
    for last in (cold_start, rl, export, extend_1):
        assert not Plan(store).run(pipeline_of(last, Vocabulary(), Vocabulary()), recipe).cached


def pretrain(recipe: Recipe, documents: int, **changes: Any) -> None:
    shards = tokens(Vocabulary(documents=documents))
    mixture = stages.mix(mixing(recipe.mixing, **changes), tokens=shards, seed=0)
    stages.pretrain(recipe.pretrain, tokens=shards, mixture=mixture, seed=0)


@pytest.mark.parametrize(
    ("documents", "changes", "message"),
    [
        (
            3,
            {},
            "pretrain asks for batches of batch_sequences 4, and the shards give it 3 different sequences of 64 "
            "tokens: choose at most 3, or give more text",
        ),
        (40, {"caps": {"a": 128}}, "the shards give it 2 different sequences of 64 tokens: choose at most 2"),
        (40, {"sequences": 47}, r"pretrain asks for sequences 48 .*, and the mixture was made for 47"),
        (40, {"sequence_length": 32}, "pretrain asks for sequence_length 64 .*, and the mixture was made for 32"),
    ],
)
def test_shards_that_cannot_fill_a_batch_are_refused_before_a_process_starts(
    documents: int, changes: dict[str, Any], message: str, tmp_path: Path, capsys
) -> None:
    store, recipe = Store(tmp_path / "store"), load_recipe("smoke", ["execution.ranks=4"])

    def pipeline(recipe: Recipe) -> None:
        pretrain(recipe, documents, **changes)

    code, said = run(store, pipeline, recipe, capsys)
    assert code == 2
    assert len(said.splitlines()) == 1
    assert re.search(message, said), said
    assert not (store.local / "pretrain").exists()
    with pytest.raises(UsageError, match=message):
        Plan(store).run(pipeline, recipe)


def test_shards_that_just_fill_a_batch_are_planned(tmp_path: Path) -> None:
    store, recipe = Store(tmp_path / "store"), load_recipe("smoke")
    Plain(store, Execution(workers=0, threads=1)).run(lambda recipe: pretrain(recipe, 4), recipe, until="mix")
    plan = Plan(store).run(lambda recipe: pretrain(recipe, 4), recipe)
    assert [(s.name, s.runs) for s in plan.stages] == [("tokens", False), ("mix", False), ("pretrain", True)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": {"a": 0.5}}, "the run asks for 48 sequences up to 1.0 of it, and epochs and caps leave 20: raise them, or make the run shorter"),
        ({"weights": {"b": 1.0}}, "mix: weights names 'b', and the train shards have only a: correct it"),
    ],
)  # fmt: skip
def test_a_mixture_that_the_shards_cannot_give_is_bad_input(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys
) -> None:
    """Which only the packing shows: not a stage that failed, and not tried again."""
    store, recipe = Store(tmp_path / "store"), load_recipe("smoke")
    code, said = run(store, lambda recipe: pretrain(recipe, 40, **changes), recipe, capsys)
    assert (code, said) == (2, f"gristmill: stage mix: {message}")
    (record,) = [json.loads(path.read_text()) for path in (store.local / "runs").iterdir()]
    assert record["state"] == "failed"
    assert message in record["error"]
