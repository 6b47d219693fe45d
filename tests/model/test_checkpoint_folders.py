"""Checkpoints of a run as models: converted, compared, averaged; on a disk and on S3."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gristmill.flows.mirror import Mirror
from gristmill.flows.remote import Remote
from gristmill.model import model_folders
from gristmill.model.config import ModelConfig
from gristmill.model.hugging_face import conversion, folders
from gristmill.model.training.checkpoint_tensors import stretch
from gristmill.model.training.checkpoints import CheckpointWriter
from gristmill.model.training.models import load_model, save_model
from gristmill.model.transformer import Transformer
from tests.model.checkpoint_command import gristmill

SMALL = ModelConfig(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, intermediate_size=48, n_routed_experts=4, moe_intermediate_size=16,
)  # fmt: skip


def built(seed: int, config: ModelConfig = SMALL) -> Transformer:
    model = Transformer(config, 64)
    model.initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    for mixture in model.mixtures():
        mixture.gate.e_score_correction_bias.normal_(0, 0.1, generator=generator)
    return model


def checkpoint(work: Path, step: int, model: Transformer, ranks: int = 1) -> Path:
    """As a run of so many ranks saves it: parameters and a moment in equal stretches, biases by the first rank."""
    owner = {**model.config.model_dump(mode="json"), "vocab_size": model.vocab_size}
    writers = [CheckpointWriter(work, owner, rank=rank, ranks=ranks, keep=9) for rank in range(ranks)]
    for rank, writer in enumerate(writers):
        held = {f"buffer/{name}@0": buffer for name, buffer in model.named_buffers()} if rank == 0 else {}
        for name, parameter in model.named_parameters():
            flat, size = parameter.detach().flatten(), -(-parameter.numel() // ranks)
            part = flat[rank * size : (rank + 1) * size]
            held[f"parameter/{name}@{rank * size}"] = part
            held[f"momentum/{name}@{rank * size}"] = (part * step).bfloat16()
        writer.begin(step, held, {"optimizer_steps": step})
    for writer in writers:
        writer.wait()
    for writer in reversed(writers):
        writer.publish()
    return work / f"checkpoint-{step:08d}"


def same(one: Transformer, other: Transformer) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_checkpoint_becomes_the_hugging_face_folder_of_its_model(ranks: int, tmp_path: Path) -> None:
    model = built(0)
    saved = checkpoint(tmp_path / "work", 2, model, ranks)
    save_model(tmp_path / "ours", model)
    for source in (saved, tmp_path / "ours"):
        assert gristmill("convert", source, tmp_path / f"of {source.name}", "--mtp")[0] == 0
    one, other = tmp_path / f"of {saved.name}", tmp_path / "of ours"
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in other.iterdir()}
    assert same(conversion.load(one), model)
    assert gristmill("diff", saved, tmp_path / "ours") == (0, "no tensor differs\n")  # the model in it is compared


def test_the_model_in_a_tied_checkpoint_is_read(tmp_path: Path) -> None:
    model = built(1, SMALL.model_copy(update={"tie_word_embeddings": True, "num_nextn_predict_layers": 0}))
    assert gristmill("convert", checkpoint(tmp_path, 1, model), tmp_path / "out")[0] == 0
    assert same(conversion.load(tmp_path / "out"), model)


def test_two_checkpoints_are_compared_with_their_optimizers_state(tmp_path: Path) -> None:
    model = built(0)
    one, other = checkpoint(tmp_path / "a", 2, model), checkpoint(tmp_path / "b", 2, model, ranks=3)
    assert gristmill("diff", one, other) == (0, "no tensor differs\n")  # whoever wrote which piece
    later = checkpoint(tmp_path / "c", 3, model)
    rows = {row["tensor"]: row for row in model_folders.differences(one, later)}
    assert set(rows) == {f"momentum/{name}" for name, p in model.named_parameters() if p.any()}
    for name, row in rows.items():  # three times against twice, each rounded to bfloat16's 8 bits
        assert abs(row["relative"] - 0.5) < 2**-7, name


def test_an_average_of_checkpoints_is_a_model(tmp_path: Path) -> None:
    models = [built(seed) for seed in range(3)]
    saved = [checkpoint(tmp_path / "work", seed + 1, model) for seed, model in enumerate(models)]
    assert gristmill("average", *saved, tmp_path / "mean", "--weights", "1,1,2")[0] == 0
    assert gristmill("verify", tmp_path / "mean")[0] == 0
    for name, tensor in load_model(tmp_path / "mean", torch.device("cpu")).state_dict().items():
        parts = [model.state_dict()[name].double() for model in models]
        expected = parts[0] / 4 + parts[1] / 4 + parts[2] / 2
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-8)  # three roundings of float32
    save_model(tmp_path / "last", models[2])  # a folder of a model beside a checkpoint
    assert gristmill("average", saved[0], tmp_path / "last", tmp_path / "both")[0] == 0
    other = checkpoint(tmp_path / "other", 1, built(0, SMALL.model_copy(update={"n_routed_experts": 8})))
    code, said = gristmill("average", saved[0], other, tmp_path / "none")
    assert (code, "another shape or form" in said) == (2, True)


def test_a_damaged_checkpoint_is_not_converted(tmp_path: Path) -> None:
    checkpoint(tmp_path / "work", 1, built(0))
    saved = checkpoint(tmp_path / "work", 2, built(0))
    file = saved / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    for arguments in (("convert", saved, tmp_path / "out"), ("diff", saved, saved), ("average", saved, saved, "out")):
        code, said = gristmill(*arguments)
        assert code == 2
        assert "has another hash than what was written; the last good one is checkpoint-00000001" in said
    assert not (tmp_path / "out").exists()


def test_tensors_of_other_types_are_compared_in_equal_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(0)
    saved = checkpoint(tmp_path / "work", 1, model)
    assert gristmill("convert", saved, tmp_path / "32")[0] == 0
    assert gristmill("convert", saved, tmp_path / "16", "--dtype", "bfloat16")[0] == 0
    assert gristmill("convert", saved, tmp_path / "8", "--fp8", "--dtype", "bfloat16")[0] == 0
    monkeypatch.setattr(folders, "PART_NUMBERS", 50)  # a row or two
    for other in ("16", "8"):
        rows = list(model_folders.differences(tmp_path / "32", tmp_path / other))
        # Half a step of the mantissa at the most: 2⁻⁹ of bfloat16, 2⁻⁴ of E4M3 whose small values are coarser.
        assert rows
        assert all(row["relative"] < {"16": 2**-8, "8": 2**-3}[other] for row in rows)


def test_places_that_are_no_stretch_are_refused() -> None:
    assert stretch((4, 6, 5), ()) == (0, 120)
    assert stretch((4, 6, 5), (slice(1, 3),)) == (30, 90)
    assert stretch((4, 6, 5), (2, slice(3, 5))) == (75, 85)
    for place in ((slice(0, 2), slice(0, 2)), (1,)):
        with pytest.raises(ValueError, match="is not one stretch of rows"):
            stretch((4, 6, 5), place)


def test_all_four_commands_on_s3(s3: str, tmp_path: Path) -> None:
    models = [built(seed) for seed in range(2)]
    saved = [checkpoint(tmp_path / "run" / "work", seed + 1, model) for seed, model in enumerate(models)]
    far = Remote(f"{s3}/copied")
    for folder in saved:
        for file in folder.iterdir():
            far.put(file, f"{folder.name}/{file.name}")
    # what a run that was killed has left on its store: a snapshot, whose files are named by what they hold
    key = "0123456789abcdef"
    assert Mirror(Remote(f"{s3}/store"), f"pretrain/{key}.partial", tmp_path / "run", print).send()
    for place in (f"{s3}/copied", f"{s3}/store/pretrain/{key}/work"):
        out = tmp_path / place.rsplit("/", 1)[-1]
        one, other = (f"{place}/{folder.name}" for folder in saved)
        code, said = gristmill("verify", one)
        assert (code, "checkpoint of step 1 by 1 ranks" in said) == (0, True)
        assert gristmill("diff", one, saved[0]) == (0, "no tensor differs\n")
        assert gristmill("diff", one, f"{other}/")[0] == 1
        assert gristmill("convert", other, out / "theirs", "--mtp")[0] == 0
        assert same(conversion.load(out / "theirs"), models[1])
        assert gristmill("average", one, other, out / "mean")[0] == 0
        name = "embed_tokens.weight"
        mean = load_model(out / "mean", torch.device("cpu")).state_dict()[name]
        assert torch.equal(mean, sum(model.state_dict()[name] / 2 for model in models))  # halves add exactly here
        assert gristmill("convert", one, f"{s3}/out")[1].endswith("write to a local folder, and copy it there")
        code, said = gristmill("verify", f"{place}/checkpoint-00000009")
        assert (code, "holds nothing" in said) == (2, True)
