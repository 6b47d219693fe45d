"""Checking, converting, comparing and averaging folders of models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gristmill.model import model_folders
from gristmill.model.config import ModelConfig
from gristmill.model.hugging_face.folders import TensorFolder
from gristmill.model.training.models import load_model, save_model
from gristmill.model.transformer import Transformer
from tests.model.checkpoint_command import gristmill

SMALL = ModelConfig(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, intermediate_size=48, n_routed_experts=4, moe_intermediate_size=16,
)  # fmt: skip


def saved(folder: Path, seed: int = 0) -> Transformer:
    model = Transformer(SMALL, 64)
    model.initialise(seed)
    save_model(folder, model)
    return model


def spoil(path: Path, **changes: torch.Tensor | None) -> None:
    held = load_file(path)
    for name, tensor in changes.items():
        if tensor is None:
            del held[name.replace("__", ".")]
        else:
            held[name.replace("__", ".")] = tensor
    save_file(held, path)


def test_there_and_back_is_the_same(tmp_path: Path) -> None:
    model = saved(tmp_path / "ours")
    assert gristmill("convert", tmp_path / "ours", tmp_path / "theirs", "--mtp", "--shard-megabytes", 1)[0] == 0
    assert gristmill("verify", tmp_path / "theirs")[0] == 0
    code, said = gristmill("convert", tmp_path / "theirs", tmp_path / "back", "--dtype", "float32")
    assert (code, "1 files" in said) == (0, True)
    again = load_model(tmp_path / "back", torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert gristmill("diff", tmp_path / "ours", tmp_path / "back") == (0, "no tensor differs\n")


def test_what_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    saved(tmp_path)
    code, said = gristmill("verify", tmp_path)
    assert code == 0
    assert "whole; Gristmill form" in said
    spoil(tmp_path / "model.safetensors", norm__weight=torch.ones(3), embed_tokens__weight=None, more=torch.ones(1))
    code, said = gristmill("verify", tmp_path)
    assert code == 1
    for part in (
        "3 tensors",
        "missing embed_tokens.weight (64, 32)",
        "left over more",
        "norm.weight is (3,), expected (32,)",
    ):
        assert part in said
    assert gristmill("convert", tmp_path, tmp_path / "out") == (2, model_error(tmp_path))
    assert not (tmp_path / "out").exists()


def model_error(folder: Path) -> str:
    with pytest.raises(ValueError, match="does not fit") as error:
        model_folders.verify(folder)
    return str(error.value)


def test_numbers_that_are_not_finite_are_named(tmp_path: Path) -> None:
    saved(tmp_path)
    spoil(tmp_path / "model.safetensors", norm__weight=torch.full((32,), torch.nan))
    code, said = gristmill("verify", tmp_path)
    assert code == 1
    assert "not finite in 1 tensors: norm.weight" in said


def test_a_file_cut_short(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "is not a whole safetensors file" in gristmill("verify", tmp_path)[1]
    assert "holds no config.json" in gristmill("verify", tmp_path / "nothing")[1]


def test_differences_have_a_size(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    saved(tmp_path / "b")
    before = load_file(tmp_path / "b" / "model.safetensors")["norm.weight"]
    spoil(tmp_path / "b" / "model.safetensors", norm__weight=before + 0.5, lm_head__weight=None)
    rows = list(model_folders.differences(tmp_path / "a", tmp_path / "b"))
    assert rows == [
        {"tensor": "lm_head.weight", "differs": f"only in {tmp_path / 'a'}"},
        {"tensor": "norm.weight", "largest": 0.5, "relative": 0.5},
    ]
    code, said = gristmill("diff", tmp_path / "a", tmp_path / "b")
    assert (code, "2 tensors differ" in said) == (1, True)


def test_an_average_is_that_of_the_numbers(tmp_path: Path) -> None:
    models = [saved(tmp_path / str(seed), seed) for seed in range(3)]
    places = [tmp_path / str(seed) for seed in range(3)]
    assert gristmill("average", *places, tmp_path / "mean", "--weights", "1,1,2")[0] == 0
    mean = load_model(tmp_path / "mean", torch.device("cpu")).state_dict()
    for name, tensor in mean.items():
        parts = [model.state_dict()[name].double() for model in models]
        expected = parts[0] / 4 + parts[1] / 4 + parts[2] / 2
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-8)  # three roundings of float32


def test_averages_that_cannot_be(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    saved(tmp_path / "b")
    other = Transformer(SMALL.model_copy(update={"n_routed_experts": 8}), 64)
    other.initialise(0)
    save_model(tmp_path / "c", other)
    for arguments, message in (
        (("a", "out"), "takes two folders or more"),
        (("a", "c", "out"), "another shape or form"),
        (("a", "b", "c"), "is not an empty folder"),
        (("a", "b", "out", "--weights", "1"), "for 2 folders"),
        (("a", "b", "out", "--weights", "x,y"), "are not numbers"),
    ):
        placed = [tmp_path / a if len(a) < 4 and "," not in a and a != "1" else a for a in arguments]
        code, said = gristmill("average", *placed)
        assert code == 2
        assert message in said


def test_an_average_of_fp8_folders_is_a_whole_bfloat16_one(tmp_path: Path) -> None:
    for seed in (0, 1):
        saved(tmp_path / f"ours{seed}", seed)
        assert gristmill("convert", tmp_path / f"ours{seed}", tmp_path / str(seed), "--fp8")[0] == 0
    assert gristmill("average", tmp_path / "0", tmp_path / "1", tmp_path / "mean")[0] == 0
    assert gristmill("verify", tmp_path / "mean")[0] == 0
    assert "quantization_config" not in (tmp_path / "mean" / "config.json").read_text()
    mean = load_file(tmp_path / "mean" / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    with TensorFolder(tmp_path / "0") as one, TensorFolder(tmp_path / "1") as other:
        expected = (one.read(name).float() + other.read(name).float()) / 2
    assert torch.equal(mean[name], expected.bfloat16())


def test_what_lies_beside_the_tensors_goes_along(tmp_path: Path) -> None:
    saved(tmp_path / "ours")
    assert gristmill("convert", tmp_path / "ours", tmp_path / "theirs")[0] == 0
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 5, "bos_token_id": 3}))
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    for sampling in ({"temperature": 0.6, "eos_token_id": 7}, None):  # what it says itself stays
        beside = tmp_path / "theirs" / "generation_config.json"
        beside.unlink() if sampling is None else beside.write_text(json.dumps(sampling))
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        assert gristmill("convert", tmp_path / "theirs", tmp_path / "again")[0] == 0
        expected = {"bos_token_id": 3, "eos_token_id": 5} | (sampling or {})
        assert json.loads((tmp_path / "again" / "generation_config.json").read_text()) == expected
    assert gristmill("convert", tmp_path / "again", tmp_path / "back")[0] == 0
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == 5


def test_a_tokenizers_files_and_how_to_sample_go_along_as_they_are(tmp_path: Path) -> None:
    """There and back, byte by byte, spaces and unknown fields too; the ids of special tokens get into config.json."""
    sampling = '{"eos_token_id": [5, 7],  "temperature": 0.6, "top_p": 0.95, "transformers_version": "4.33.1"}'
    files = {
        "generation_config.json": sampling.encode(),
        "tokenizer.json": b'{"version": "1.0"}',
        "tokenizer_config.json": b'{"chat_template": "{{ messages }}",\r\n "model_max_length": 131072}',
        "special_tokens_map.json": b"{}\n",
        "chat_template.jinja": "{% if not add_generation_prompt %}<｜Assistant｜>{% endif %}".encode(),
    }
    saved(tmp_path / "ours")
    for name, held in files.items():
        (tmp_path / "ours" / name).write_bytes(held)
    assert gristmill("convert", tmp_path / "ours", tmp_path / "theirs")[0] == 0
    assert gristmill("convert", tmp_path / "theirs", tmp_path / "again")[0] == 0
    for folder in ("theirs", "again"):
        assert {name: (tmp_path / folder / name).read_bytes() for name in files} == files
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["eos_token_id"] == [5, 7]


def test_an_interrupted_conversion_looks_like_none_and_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "ours")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(model_folders, "_copy_beside", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model_folders.convert(tmp_path / "ours", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "left").write_text("by one that was killed")
    model_folders.convert(tmp_path / "ours", tmp_path / "out")
    assert not (tmp_path / "out" / "left").exists()
    assert model_folders.verify(tmp_path / "out")["tensors"] > 10
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not an empty folder"):
        model_folders.convert(tmp_path / "ours", tmp_path / "file")


def test_a_tied_model_is_kept_and_taken_up(tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"tie_word_embeddings": True, "num_nextn_predict_layers": 0})
    model = Transformer(config, 64)
    model.initialise(1)
    save_model(tmp_path, model)
    other = load_model(tmp_path, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    spoil(tmp_path / "model.safetensors", norm__weight=None)
    with pytest.raises(ValueError, match=r"does not fit its config.json: missing \['norm.weight'\]"):
        load_model(tmp_path, torch.device("cpu"))
