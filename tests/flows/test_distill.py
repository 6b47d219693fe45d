"""Distillation: a model of others enters the graph by what its folder holds, and learns with its own tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gristmill.data.tokenizer import CHAT_TEMPLATE
from gristmill.flows.cards import card_markdown
from gristmill.flows.cli import app, guarded
from gristmill.flows.errors import StageFailed, UsageError
from gristmill.flows.execution import Execution
from gristmill.flows.inspection import chat_folders
from gristmill.flows.plan import Plan, PlanResult
from gristmill.flows.r1 import r1
from gristmill.flows.recipe import Recipe, load_recipe
from gristmill.flows.remote import Remote
from gristmill.flows.runners import Plain
from gristmill.flows.store import Store
from gristmill.model.chat import Chat
from gristmill.model.config import ModelConfig
from gristmill.model.hugging_face import conversion
from gristmill.model.training.models import load_model
from gristmill.model.transformer import Transformer
from tests.model.in_process import jobs_here

ROWS = 320  # more than the tokenizer has tokens, as Qwen's models have
SHAPE = {
    "attention": "gqa", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "first_k_dense_replace": 2, "intermediate_size": 48, "num_nextn_predict_layers": 0,
    "max_position_embeddings": 512,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "tie_word_embeddings": True},
    "qwen3": {"qk_norm": True},
}
TRAINING = "{steps: 3, batch_sequences: 4, sequence_length: 256, checkpoint_every: 2, evaluate_every: 2}"
HERE = Execution(workers=0, threads=1, device="cpu")


def folder_of_others(folder: Path, family: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model as its makers release it: byte-level BPE, an end token that pads nothing, no marks of a thought."""
    model = Transformer(ModelConfig.model_validate({**SHAPE, **FAMILIES[family]}), ROWS)
    model.initialise(seed)
    conversion.export(conversion.of_model(model), model.config, ROWS, folder, dtype=dtype)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = ["<|begin_of_text|>", "<|endoftext|>"] if family == "llama" else ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator(["What is 12+34? Think of the sum, then answer the question."] * 9, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    told: dict[str, Any] = {"eos_token": {"content": "<|endoftext|>", "special": True}, "pad_token": None}
    told["bos_token"] = special[0] if family == "llama" else None
    (folder / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")
    (folder / "README.md").write_text("not part of the model", encoding="utf-8")
    return folder


def asked(folder: Path | str, *more: str) -> Recipe:
    """`smoke` that distils the cold start's chains, which need no reasoner."""
    return load_recipe("smoke", [f"distill={{folder: '{folder}', traces: null, training: {TRAINING}}}", *more])


def planned(store: Store, recipe: Recipe) -> PlanResult:
    return Plan(store).run(r1, recipe, until="distill")


def ran(store: Store, recipe: Recipe) -> dict[str, Path]:
    """The stages that distillation needs, run; their folders by name."""
    with jobs_here():
        Plain(store, HERE).run(r1, recipe, until="distill")
    return {p.name: store.folder(p.name, p.call.key) for p in planned(store, recipe).stages if p.state == "cached"}


def test_no_recipe_distils_unless_it_says_so(tmp_path: Path) -> None:
    plain = Plan(Store(tmp_path / "store")).run(r1, load_recipe("smoke"))
    assert not {"student", "distill"} & {p.name for p in plain.stages}
    more = Plan(Store(tmp_path / "store")).run(r1, asked(folder_of_others(tmp_path / "others", "llama")))
    keys = {p.name: p.call.key for p in more.stages}
    assert {p.name: p.call.key for p in plain.stages}.items() < keys.items()  # and changes no other stage
    assert keys.keys() - {p.name for p in plain.stages} == {"student", "distill"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_model_of_others_learns_with_its_own_tokenizer(family: str, tmp_path: Path) -> None:
    others, store = folder_of_others(tmp_path / "others", family), Store(tmp_path / "store")
    folders = ran(store, asked(others))

    given = conversion.load(others)
    taken = load_model(folders["student"] / "model", torch.device("cpu"))
    assert taken.config == given.config
    for name, tensor in given.state_dict().items():
        assert torch.equal(tensor, taken.state_dict()[name]), name
    chat, own = Chat(folders["student"] / "tokenizer"), Tokenizer.from_file(str(others / "tokenizer.json"))
    assert (
        chat.prompt("1+1=?")
        == own.encode(
            ("<|begin_of_text|>" if family == "llama" else "") + "<｜User｜>1+1=?<｜Assistant｜><think>\n",
            add_special_tokens=False,
        ).ids
    )
    response = chat.response("1+1=2", "2")
    assert response[-1] == chat.pad == own.token_to_id("<|endoftext|>")
    assert chat.text(response) == "1+1=2\n</think>\n2"
    with pytest.raises(ValueError, match="no token '</think>'"):
        print(chat.thought_end)

    manifest = store.manifest("distill", folders["distill"].name)
    assert manifest is not None
    metrics = manifest["metrics"]
    assert metrics["conversations"] + metrics["held_out_conversations"] > 100
    curves = [json.loads(line)["main_loss"] for line in (folders["distill"] / "curves.jsonl").open()]
    assert curves[-1] < curves[0]
    learnt = load_model(folders["distill"] / "model", torch.device("cpu"))
    assert learnt.config == taken.config
    assert not torch.equal(learnt.lm_head.weight, taken.lm_head.weight)
    assert chat_folders(store, str(folders["distill"])) == (
        folders["distill"] / "model", folders["student"] / "tokenizer",
    )  # fmt: skip
    assert "Tokens a second and utilisation" in card_markdown(manifest, folders["distill"])


def test_the_key_follows_what_the_folder_holds(tmp_path: Path) -> None:
    others, store = folder_of_others(tmp_path / "others", "llama"), Store(tmp_path / "store")
    first = planned(store, asked(others)).named("student").call
    assert set(first.sources) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    (others / "README.md").write_text("other words", encoding="utf-8")
    assert planned(store, asked(others)).named("student").call.key == first.key
    folder_of_others(others, "llama", seed=1)
    changed = planned(store, asked(others)).named("student").call
    assert {n for n, held in changed.sources.items() if first.sources[n] != held} == {"model.safetensors"}
    assert changed.key != first.key


def test_a_folder_on_s3_gives_the_same_model(s3: str, tmp_path: Path, bytes_of) -> None:
    others = folder_of_others(tmp_path / "others", "qwen2")
    fsspec.filesystem("s3").put(str(others), f"{s3}/models/", recursive=True)
    here, there = asked(others), asked(f"{s3}/models/others/")
    store = Store(tmp_path / "store")
    with jobs_here():
        for recipe in (here, there):
            Plain(store, HERE).run(r1, recipe, until="student")
    one, other = (planned(store, recipe).named("student").call for recipe in (here, there))
    assert one.sources.keys() == other.sources.keys()
    folders = [store.folder("student", call.key) for call in (one, other)]
    for part in ("model", "tokenizer"):
        assert bytes_of(folders[0] / part) == bytes_of(folders[1] / part)
    fsspec.filesystem("s3").pipe_file(f"{s3}/models/others/tokenizer.json", b"{}")
    assert planned(store, there).named("student").call.key != other.key


def test_of_a_folder_on_s3_only_the_models_files_are_fetched(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = folder_of_others(tmp_path / "others", "llama")
    (others / "original").mkdir()
    (others / "original" / "consolidated.safetensors").write_bytes(b"the same in another form")
    fsspec.filesystem("s3").put(str(others), f"{s3}/models/", recursive=True)
    asked_for: list[str] = []
    get = Remote.get
    monkeypatch.setattr(Remote, "get", lambda far, name, path: asked_for.append(name) or get(far, name, path))
    recipe = asked(f"{s3}/models/others")
    with jobs_here():
        Plain(Store(tmp_path / "store"), HERE).run(r1, recipe, until="student")
    assert sorted(asked_for) == list(planned(Store(tmp_path / "store"), recipe).named("student").call.sources)


@pytest.mark.parametrize(
    ("name", "data"), [("tokenizer_config.json", b"{}"), ("model-of-others.safetensors", b"one more")]
)
def test_a_folder_on_s3_that_changes_on_its_way_makes_no_student(
    name: str, data: bytes, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind its last file: what was fetched is a sound model, of which nobody knows when it was one."""
    others, store = folder_of_others(tmp_path / "others", "llama"), Store(tmp_path / "store")
    fsspec.filesystem("s3").put(str(others), f"{s3}/models/", recursive=True)
    get = Remote.get

    def fetching(far: Remote, fetched: str, path: Path) -> None:
        get(far, fetched, path)
        if fetched == "tokenizer_config.json":
            fsspec.filesystem("s3").pipe_file(f"{s3}/models/others/{name}", data)

    monkeypatch.setattr(Remote, "get", fetching)
    with jobs_here(), pytest.raises(StageFailed, match=f"source '{name}' changed while stage student read it"):
        Plain(store, HERE).run(r1, asked(f"{s3}/models/others"), until="student")
    assert store.manifests("student") == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), r"lacks tokenizer\.json: name a model's folder"),
        (lambda f: shutil.rmtree(f), r"lacks config\.json, tokenizer\.json, .*\*\.safetensors"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "gpt2"}'),
            r"others'?: model_type 'gpt2' is not one of",
        ),
        (lambda f: (f / "config.json").write_text("{"), r"others'?: Expecting"),
    ],
)
def test_what_is_no_such_folder_is_refused_before_anything_runs(spoil: Any, message: str, tmp_path: Path) -> None:
    others = folder_of_others(tmp_path / "others", "llama")
    spoil(others)
    with pytest.raises(UsageError, match=rf"distill\.folder '.*{message}"):
        planned(Store(tmp_path / "store"), asked(others))


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    others = folder_of_others(tmp_path / "others", "llama")
    tokenizer = Tokenizer.from_file(str(others / "tokenizer.json"))
    tokenizer.add_tokens([f"word{i}" for i in range(ROWS)])
    tokenizer.save(str(others / "tokenizer.json"))
    with jobs_here(), pytest.raises(Exception, match=r"has a token \d+, and its model 320 rows of embeddings"):
        Plain(Store(tmp_path / "store"), HERE).run(r1, asked(others), until="student")


@pytest.mark.parametrize("remote", [False, True], ids=["disk", "s3"])
def test_conversations_beyond_the_students_positions_are_refused_before_anything_runs(
    remote: bool, s3: str, tmp_path: Path
) -> None:
    others, store = folder_of_others(tmp_path / "others", "llama"), Store(tmp_path / "store")
    if remote:
        fsspec.filesystem("s3").put(str(others), f"{s3}/models/", recursive=True)
    longer = asked(f"{s3}/models/others" if remote else others, "distill.training.sequence_length=513")
    message = "stage distill: sequence_length 513 is longer than the 512 positions of the model: choose at most 512 "
    with pytest.raises(UsageError, match=message):
        planned(store, longer)
    with pytest.raises(UsageError, match=message):
        Plain(store, HERE).run(r1, longer, until="distill")
    assert not store.manifests("problems")
    Plan(store).run(r1, longer, until="student")  # and what does not distil is not refused


def test_the_command_line_refuses_them_as_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = (
        f"distill={{folder: '{folder_of_others(tmp_path / 'others', 'llama')}', training: {{sequence_length: 4096}}}}"
    )
    arguments = ["plan", "smoke", f"--store={tmp_path / 'store'}", f"--set={more}"]
    assert guarded(lambda: app(arguments, standalone_mode=False)) == 2
    assert "choose at most 512 tokens" in capsys.readouterr().err


def test_chains_that_are_too_long_for_a_sequence_are_left_out(tmp_path: Path) -> None:
    others, store = folder_of_others(tmp_path / "others", "llama"), Store(tmp_path / "store")
    folders = ran(store, asked(others, "distill.training.sequence_length=64"))
    manifest = store.manifest("distill", folders["distill"].name)
    assert manifest is not None
    metrics = manifest["metrics"]
    learned = metrics["conversations"] + metrics["held_out_conversations"]
    chains = sum(1 for _ in (folders["problems"] / "cold_start.jsonl").open(encoding="utf-8"))
    assert 0 < metrics["left_out_too_long"] == chains - learned < chains


def test_conversations_are_asked_for_in_the_form_of_r1(tmp_path: Path) -> None:
    assert asked(tmp_path).distill.student.chat_template == CHAT_TEMPLATE  # type: ignore[union-attr]


def test_the_reasoners_own_chains_are_learned_unless_they_are_left_out(tmp_path: Path) -> None:
    others = folder_of_others(tmp_path / "others", "llama")
    recipe = load_recipe("smoke", [f"distill={{folder: '{others}', training: {TRAINING}}}", "distill.traces.samples=3"])
    plan = planned(Store(tmp_path / "store"), recipe)
    assert plan.named("distill").call.inputs["problems"].stage == "traces"
    assert plan.named("traces").call.inputs["model"].stage == "rl"
    assert plan.named("traces").estimate.seconds
    assert (
        planned(Store(tmp_path / "store"), asked(others)).named("distill").call.inputs["problems"].stage == "problems"
    )
    with pytest.raises(UsageError, match=r"distill\.traces\.max_new_tokens 600 leaves no room for a prompt"):
        load_recipe("smoke", [f"distill={{folder: '{others}', traces: {{max_new_tokens: 600}}}}"])
