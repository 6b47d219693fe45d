"""Recipes: what ships is valid; bad input is one sentence and exit code 2, before anything is written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from gristmill.flows.cli import app, guarded
from gristmill.flows.errors import UsageError
from gristmill.flows.recipe import load_recipe, recipe_schema, shipped

NOBODY = 65_534  # by convention the user who owns nothing


def test_what_ships_is_valid() -> None:
    assert shipped() == ["long", "smoke", "tiny"]
    assert {load_recipe(name).name for name in shipped()} == {"long", "smoke", "tiny"}


def test_settings_reach_nested_fields_and_lists() -> None:
    recipe = load_recipe("tiny", ["rl.optimizer.adam_learning_rate=1e-4", "ingest.sources.2.count=5", "seed=3"])
    assert recipe.rl.optimizer.adam_learning_rate == 1e-4
    assert recipe.ingest.sources[2].count == 5  # type: ignore[union-attr]
    assert recipe.seed == 3
    assert recipe.rl_zero.optimizer.adam_learning_rate == 2e-4  # the shared anchor is not shared any more


def test_schema_describes_every_field() -> None:
    schema = recipe_schema()
    bare = [
        f"{name}.{field}"
        for name, model in schema["$defs"].items()
        for field, described in model.get("properties", {}).items()
        if field != "type" and not ("title" in described and "description" in described)
    ]
    assert bare == []


def run_cli(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = guarded(lambda: app(list(arguments), standalone_mode=False))
    return code, capsys.readouterr().err


RECIPE_ERRORS = {
    "unknown section": ("rll: {}", r"rll is no field: did you mean 'rl'\?"),
    "misspelled field": ("rl: {stepps: 3}", r"rl\.stepps is no field: did you mean 'steps'\?"),
    "wrong type": ("pretrain: {steps: many}", r"pretrain\.steps is 'many', which will not do"),
    "out of bounds": (
        "rl: {temperature: -1}",
        r"rl\.temperature is -1, which will not do: input should be greater than 0",
    ),
    "experts not divisible": (
        "pretrain: {model: {n_routed_experts: 9, n_group: 2}}",
        "n_routed_experts 9 is not divisible by n_group 2: choose 8 or 10 experts, or n_group 1 or 3$",
    ),
    "fewer experts than groups": (
        "pretrain: {model: {n_routed_experts: 3, n_group: 4}}",
        "n_routed_experts 3 is not divisible by n_group 4: choose 8 experts, or n_group 1$",
    ),
    "experts that would be divisible and too few": (
        "pretrain: {model: {n_routed_experts: 9, n_group: 2, num_experts_per_tok: 5}}",
        "choose 10 experts, or n_group 1$",
    ),
    "more groups a token than groups": (
        "pretrain: {model: {n_group: 2, topk_group: 3}}",
        "topk_group 3 is more than the 2 groups of n_group: choose at most 2$",
    ),
    "more active than the groups hold": (
        "pretrain: {model: {n_group: 4, topk_group: 1, num_experts_per_tok: 3}}",
        "num_experts_per_tok 3 is more than the 2 experts of the 1 of 4 groups that topk_group allows: choose at most "
        "2, or topk_group 2$",
    ),
    "groups of one expert": (
        "pretrain: {model: {n_group: 8, topk_group: 2}}",
        "n_group 8 leaves 1 expert a group, and a group is scored by its two best: choose 16 experts, or n_group 4$",
    ),
    "odd rotary width": (
        "pretrain: {model: {qk_rope_head_dim: 15}}",
        r"pretrain\.model\.qk_rope_head_dim 15 is no multiple of 2: choose 14 or 16$",
    ),
    "least odd rotary width": (
        "pretrain: {model: {qk_rope_head_dim: 1}}",
        r"pretrain\.model\.qk_rope_head_dim 1 is no multiple of 2: choose 2$",
    ),
    "key/value latent wider than the model": (
        "pretrain: {model: {kv_lora_rank: 129}}",
        "kv_lora_rank 129 is a latent wider than the model, whose hidden_size is 128: choose at most 128",
    ),
    "query latent wider than the model": (
        "pretrain: {model: {q_lora_rank: 1536}}",
        "q_lora_rank 1536 is a latent wider than the model, whose hidden_size is 128: choose at most 128",
    ),
    "more active than there are": (
        "pretrain: {model: {num_experts_per_tok: 9}}",
        "9 is more than the 8 experts there are: choose at most 8$",
    ),
    "past the position limit": (
        "pretrain: {sequence_length: 1024}",
        "1024 is longer than the position limit max_position_embeddings 512: choose at most 512 tokens, or raise the "
        "limit to 1024$",
    ),
    "cold start past the limit": (
        "cold_start: {sequence_length: 1024}",
        r"cold_start\.sequence_length 1024 is longer than the position limit pretrain\.model\.max_position_embeddings "
        "512: choose at most 512 tokens, or raise the limit to 1024$",
    ),
    "responses past the limit": (
        "rl: {max_new_tokens: 512}",
        r"rl\.max_new_tokens 512 leaves no room for a prompt .* 512: choose at most 511 tokens, less those of the prompts",
    ),
    "missing source": (
        "ingest: {sources: [{type: files, name: mine, paths: [nowhere.txt]}]}\nmix: {weights: {}}",
        "'nowhere.txt' names no file",
    ),
    "mixture of another source": (
        "mix: {weights: {lesson: 1}}",
        "'lesson', which is no source.*did you mean 'lessons'",
    ),
    "negative weight": ("mix: {weights: {lessons: -1}}", r"mix: the weight of 'lessons' is -1"),
    "unknown hardware": ("execution: {hardware: H1000}", r"execution.hardware: device 'H1000' is not in hardware.yaml"),
    "no number": ("rl: {temperature: .nan}", r"rl\.temperature is nan, which is no number"),
    "no sources": ("ingest: {sources: []}", r"ingest\.sources is \[\], which will not do"),
    "key twice": ("rl: {steps: 1}\nrl: {steps: 2}", "the key 'rl' stands twice"),
    "not yaml": ("rl: [", "is not valid YAML"),
    "batch among ranks": (
        "execution: {ranks: 3}",
        "batch_sequences 16 does not divide among 3 data-parallel ranks .*: choose 15 or 18$",
    ),
    "more ranks than the batch's sequences": (
        "execution: {ranks: 32}",
        "batch_sequences 16 does not divide among 32 data-parallel ranks .*: choose 32$",
    ),
    "experts among ranks": (
        "execution: {ranks: 2, layout: {expert_parallel: 3}}",
        "expert_parallel 3 does not divide ranks 2",
    ),
    "experts among more ranks than there are experts": (
        "execution: {ranks: 16, layout: {expert_parallel: 16}}",
        "expert_parallel 16 does not divide n_routed_experts 8: choose 8$",
    ),
    "latent attention among ranks": (
        "execution: {ranks: 2, layout: {sequence_parallel: 3}}",
        "sequence_parallel 3 does not divide ranks 2",
    ),
    "experts of a dense student among ranks": (
        "execution: {ranks: 2, layout: {expert_parallel: 2}}\ndistill: {folder: student}",
        "expert_parallel 2 with distill: a dense student has no experts to share",
    ),
    "a student's batch among ranks": (
        "execution: {ranks: 2}\ndistill: {folder: student, training: {batch_sequences: 5}}",
        "distill.training: batch_sequences 5 does not divide among 2 data-parallel ranks",
    ),
    "micro-batches": (
        "execution: {layout: {micro_batches: 3}}",
        "batch_sequences 16 does not divide among 1 data-parallel ranks .* of 3 micro-batches: choose 15 or 18",
    ),
    "offload without ZeRO": ("execution: {layout: {offload: optimizer}}", "raise zero_stage to 1 or more"),
    "more problems than there are": ("evaluate: {problems: 701}", "evaluate.problems 701 is more than the 700"),
}


@pytest.mark.parametrize("case", RECIPE_ERRORS)
def test_bad_recipes_are_one_sentence(case: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, message = RECIPE_ERRORS[case]
    Path("mine.yaml").write_text(f"extends: tiny\n{text}\n")
    code, said = run_cli("run", "mine.yaml", "--plain", capsys=capsys)
    assert code == 2
    assert len(said.strip().splitlines()) == 1
    import re

    assert re.search(message, said.strip()), said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.yaml"]  # nothing was written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "tinny"], "there is no recipe 'tinny': did you mean 'tiny'?"),
        (["run", "no/such.yaml"], "there is no recipe file 'no/such.yaml'"),
        (["run", "smoke", "--until", "pretrian"], "did you mean 'pretrain'?"),
        (["run", "smoke", "--from", "report2"], "did you mean 'report'?"),
        (["run", "smoke", "--set", "rl.steps"], "is no setting: write it as section.field=value"),
        (["run", "smoke", "--set", "seed.x=1"], "seed is a value, not a section"),
        (["run", "smoke", "--store", "s3://no-credentials-here/store"], "cannot be reached"),
        (["run", "smoke", "--store", "README"], "is a file, not a folder"),
        (["show", "rl"], "has no run"),
        (["verify"], "has no run"),
        (["chat", "rl"], "has no run"),
    ],
)
def test_bad_arguments_are_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    Path("README").write_text("a file")
    code, said = run_cli(*arguments, capsys=capsys)
    assert code == 2
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README"]


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user who may not write everywhere: root takes another's rights for the time."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_an_unwritable_store_is_refused(capsys) -> None:
    with tempfile.TemporaryDirectory() as folder:  # not pytest's own, which nobody but its maker may even enter
        locked = Path(folder)
        locked.chmod(0o555)
        with unprivileged():
            code, said = run_cli("run", "smoke", "--store", str(locked / "store"), capsys=capsys)
        assert code == 2
        assert "is not writable" in said
        assert not list(locked.iterdir())


def test_a_full_store_is_refused(tmp_path: Path) -> None:
    from gristmill.flows.store import Store

    with pytest.raises(UsageError, match="MB free and the plan needs"):
        Store(tmp_path).check_usable(needed_bytes=10**18)


def test_an_empty_source_is_refused(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("")
    source = {"type": "files", "name": "mine", "paths": ["empty.txt"]}
    Path("mine.yaml").write_text(
        yaml.safe_dump({"extends": "smoke", "ingest": {"sources": [source]}, "mix": {"weights": {}}})
    )
    code, said = run_cli("plan", "mine.yaml", capsys=capsys)
    assert code == 2
    assert "hold no text: give it some" in said


def test_a_port_in_use_is_refused(capsys, tmp_path: Path, monkeypatch) -> None:
    import socket

    monkeypatch.chdir(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, said = run_cli("ui", "--port", str(taken.getsockname()[1]), capsys=capsys)
    assert code == 2
    assert "is in use" in said
