"""Training: ranks, resume, NaN, export; on a small corpus made here.

Runs whose process matters are jobs of their own; the others run in the test's process, and come to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gristmill.data.mix import MixConfig, mix
from gristmill.data.problems import ProblemsConfig, make_problems
from gristmill.data.shards import write_index, write_shard
from gristmill.data.stage_types import silent as quiet
from gristmill.model.chat import Chat
from gristmill.model.config import ModelConfig
from gristmill.model.hugging_face import export
from gristmill.model.launch import JobFailed
from gristmill.model.pretrain import pretrain
from gristmill.model.sft import fine_tune
from gristmill.model.stage_types import Progress, silent
from gristmill.model.training.batches import (
    IGNORED,
    Conversation,
    ConversationBatches,
    TokenBatches,
    TrainingBatch,
)
from gristmill.model.training.config import (
    BatchRampConfig,
    LayoutConfig,
    OptimizerConfig,
    PretrainConfig,
    ScheduleConfig,
    SFTConfig,
    SpikeConfig,
    TailConfig,
)
from gristmill.model.training.models import load_model
from gristmill.model.training.objective import Objective
from gristmill.model.transformer import Transformer
from tests.model.in_process import jobs_here
from tests.model.several_runs import Stopped, stopping_at

SMALL = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=16, intermediate_size=64, n_routed_experts=4, moe_intermediate_size=16,
)  # fmt: skip
CONFIG = PretrainConfig(
    model=SMALL,
    steps=10,
    sequence_length=32,
    batch_sequences=4,
    checkpoint_every=2,
    evaluate_every=5,
    held_out_sequences=4,
    schedule=ScheduleConfig(warmup_steps=2),
)


PLAIN = LayoutConfig()


@pytest.fixture(scope="module")
def tokens(lesson_tokens: Path) -> Path:
    return lesson_tokens


def mixed(tokens: Path, config: PretrainConfig, seed: int = 0, **more: Any) -> Path:
    """The mixture of a run, beside its tokens."""
    asked = MixConfig(sequence_length=config.sequence_length, sequences=config.sequences, **more)
    out = tokens.parent / f"mixture-{hashlib.sha256(f'{asked}{seed}'.encode()).hexdigest()[:8]}"
    if not (out / "mixture.json").exists():
        out.mkdir()
        mix(asked, tokens, out, seed, workers=0, progress=quiet)
    return out


def job(
    tokens: Path,
    out: Path,
    config: PretrainConfig = CONFIG,
    ranks: int = 1,
    mixture: Path | None = None,
    progress: Progress = silent,
) -> dict:
    """Pretraining in processes of its own."""
    out.mkdir(exist_ok=True)
    how: dict[str, Any] = {"threads": 1, "ranks": ranks, "device": "cpu", "layout": PLAIN, "progress": progress}
    return pretrain(config, tokens, mixture or mixed(tokens, config), out, 0, **how)


def trained(
    tokens: Path,
    out: Path,
    config: PretrainConfig = CONFIG,
    mixture: Path | None = None,
    progress: Progress = silent,
) -> dict:
    """Pretraining in this process."""
    with jobs_here():
        return job(tokens, out, config, mixture=mixture, progress=progress)


def content(out: Path) -> dict[str, str]:
    files = [p for p in sorted(out.rglob("*")) if p.is_file() and "log" not in p.relative_to(out).parts]
    return {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def base(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "out"
    trained(tokens, out)
    return out


def killed_after_a_checkpoint(out: Path) -> threading.Thread:
    """A thread that kills the training process of `out` as soon as a checkpoint is there."""

    def kill() -> None:
        while not any((out / "work").glob("checkpoint-????????")):
            time.sleep(0.005)
        pid = json.loads((out / "log" / "starts.jsonl").read_text().splitlines()[0])["pid"]
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    return killer


@pytest.mark.slow
def test_two_ranks_train_the_same_model(base: Path, tokens: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job(tokens, out, ranks=2)
    ours, theirs = load_file(out / "model" / "model.safetensors"), load_file(base / "model" / "model.safetensors")
    curves = [[json.loads(x) for x in (o / "curves.jsonl").read_text().splitlines()] for o in (out, base)]
    for a, b in zip(*curves, strict=True):
        # Gradients are summed in another order; ten steps of Muon, whose update has the same size however small the
        # gradient, let that grow to about a thousandth of the loss.
        assert math.isclose(a["main_loss"], b["main_loss"], rel_tol=5e-3), (a, b)
    assert set(ours) == set(theirs)
    norm = sum(float((ours[n] - theirs[n]).square().sum()) for n in ours) ** 0.5
    size = sum(float(t.square().sum()) for t in theirs.values()) ** 0.5
    assert norm < 0.02 * size


def test_killed_with_a_growing_batch_and_averaged_weights_it_ends_in_the_same_bytes(
    base: Path, tokens: Path, tmp_path: Path
) -> None:
    ramp = BatchRampConfig(start_sequences=2, increment=1, tokens=32 * 12)
    halves = (TailConfig(share=0.5, ratio=0.5),)
    tails = {"mtp_weight_tails": halves, "bias_speed_tails": halves}
    config = CONFIG.model_copy(update={"batch_ramp": ramp, "ema_decay": 0.8, **tails})
    straight, out = tmp_path / "straight", tmp_path / "out"
    metrics = trained(tokens, straight, config)
    # Twelve sequences of ramp in two parts: three steps of 2, two of 3, and five of 4.
    assert metrics["tokens"] == 32 * (3 * 2 + 2 * 3 + 5 * 4)
    killer = killed_after_a_checkpoint(out)
    with pytest.raises(JobFailed, match="rank 0 was ended by signal 9"):
        job(tokens, out, config)
    killer.join()
    trained(tokens, out, config)
    assert content(out) == content(straight)
    starts = [json.loads(line)["from_step"] for line in (out / "log" / "starts.jsonl").read_text().splitlines()]
    assert starts[0] == 0
    assert starts[-1] > 0

    device = torch.device("cpu")
    last, averaged = (load_model(straight / name, device) for name in ("model", "model-ema"))
    apart = [not torch.equal(a, b) for a, b in zip(last.parameters(), averaged.parameters(), strict=True)]
    assert all(apart)
    rows = [json.loads(line) for line in (straight / "curves.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "held_out_bpb_ema" in r] == [4, 9]
    assert metrics["held_out_bpb_ema"] == pytest.approx(rows[-1]["held_out_bpb_ema"], abs=1e-5)
    assert metrics["held_out_bpb_ema"] != metrics["held_out_bpb"]
    assert not (base / "model-ema").exists()
    # The rows have seven digits, and the losses differ by a third of the MTP loss, not much smaller than they.
    weights = [(row["loss"] - row["main_loss"] - row["balance_loss"]) / row["mtp_loss"] for row in rows]
    assert weights == pytest.approx([0.3] * 5 + [0.15] * 5, rel=1e-5)


def test_moments_in_bfloat16_are_saved_and_resumed_to_the_bit(base: Path, tokens: Path, tmp_path: Path) -> None:
    """Muon's of the matrices and AdamW's of the rest."""
    config = CONFIG.model_copy(update={"optimizer": OptimizerConfig(moments="bfloat16")})
    straight, out = tmp_path / "straight", tmp_path / "out"
    trained(tokens, straight, config)
    with pytest.raises(Stopped):
        trained(tokens, out, config, progress=stopping_at(7))
    kept = sorted((out / "work").glob("checkpoint-????????"))[-1]
    kinds: dict[str, set[torch.dtype]] = {}
    for name, tensor in load_file(kept / "rank-00000.safetensors").items():
        kinds.setdefault(name.partition("/")[0], set()).add(tensor.dtype)
    moments = {kind: {torch.bfloat16} for kind in ("momentum", "exp_avg", "exp_avg_sq")}
    assert {name: found for name, found in kinds.items() if name in moments} == moments
    assert kinds["parameter"] == {torch.float32}
    trained(tokens, out, config)
    starts = [json.loads(line)["from_step"] for line in (out / "log" / "starts.jsonl").read_text().splitlines()]
    assert starts == [0, int(kept.name.rpartition("-")[2])]
    assert content(out) == content(straight)
    ours, exact = (load_file(each / "model" / "model.safetensors") for each in (straight, base))
    assert any(not torch.equal(ours[name], tensor) for name, tensor in exact.items())


def test_a_tail_of_the_whole_run_is_another_weight_and_speed(base: Path, tokens: Path, tmp_path: Path) -> None:
    """To the bit, as halves of the same numbers are exact."""
    whole = (TailConfig(share=1.0, ratio=0.5),)
    doubled = SMALL.model_copy(update={"mtp_loss_weight": 0.6, "bias_update_speed": 0.002})
    for name, tails in {"mtp": (whole, ()), "bias": ((), whole), "both": (whole, whole)}.items():
        fields = dict(zip(("mtp_weight_tails", "bias_speed_tails"), tails, strict=True))
        trained(tokens, tmp_path / name, CONFIG.model_copy(update={"model": doubled, **fields}))
    ours, wanted = (load_file(out / "model" / "model.safetensors") for out in (tmp_path / "both", base))
    assert all(torch.equal(ours[name], tensor) for name, tensor in wanted.items())
    for name in ("mtp", "bias"):
        other = load_file(tmp_path / name / "model" / "model.safetensors")
        assert not all(torch.equal(other[key], tensor) for key, tensor in wanted.items())


@pytest.mark.slow
def test_averaging_leaves_the_training_alone(base: Path, tokens: Path, tmp_path: Path) -> None:
    trained(tokens, tmp_path / "out", CONFIG.model_copy(update={"ema_decay": 0.9}))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / "model" / name).read_bytes() == (base / "model" / name).read_bytes()


def test_the_loss_falls_and_is_held_against_a_unigram_model(base: Path) -> None:
    rows = [json.loads(line) for line in (base / "curves.jsonl").read_text().splitlines()]
    assert rows[-1]["main_loss"] < rows[0]["main_loss"] - 0.3
    assert rows[0]["mtp_loss"] > 0
    assert [r["step"] for r in rows if "held_out_bpb" in r] == [4, 9]
    loads = [json.loads(line) for line in (base / "expert_load.jsonl").read_text().splitlines()]
    assert all(abs(sum(r["load"]) - 1) < 1e-3 for r in loads)


def test_nan_stops_the_stage_and_keeps_the_checkpoint(tokens: Path, tmp_path: Path) -> None:
    wild = CONFIG.model_copy(
        update={
            "steps": 60,
            "checkpoint_every": 1,
            "optimizer": OptimizerConfig(muon_learning_rate=0.0, adam_learning_rate=1e6, gradient_clip=1e9),
        }
    )
    often = r"at step \d+ \(the 11th time, and spikes.at_most allows 10\)|not finite: lower"
    with pytest.raises(FloatingPointError, match=often):
        trained(tokens, tmp_path / "out", wild)
    kept = sorted((tmp_path / "out" / "work").glob("checkpoint-????????"))
    assert kept
    tensors = load_file(kept[-1] / "rank-00000.safetensors")
    assert all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point())


EACH = 7  # token ids that one document has for itself


def of_documents_apart(tokens: Path, folder: Path) -> Path:
    """The folder of a tokenize stage with this tokenizer, whose documents share no token id but bos and eos.

    Document i is of source a where it is even, and its id's hash is 1000 + i; the last four are held out.
    """
    listed = {}
    for split, numbers in (("train", range(36)), ("held_out", range(36, 40))):
        for source in range(2):
            some = [i for i in numbers if i % 2 == source]
            documents = [np.array([0, *(np.arange(10 + 3 * i) % EACH + 3 + EACH * i), 1]) for i in some]
            entry = write_shard(
                folder / "tokens", split, "ab"[source], 0, documents, [1000 + i for i in some], "uint16"
            )
            listed[split, "ab"[source]] = ([entry], 4 * entry.tokens)
    write_index(folder / "tokens", 320, "0" * 64, listed)
    shutil.copytree(tokens / "tokenizer", folder / "tokenizer")
    return folder


def test_a_step_that_is_left_out_names_the_documents_of_its_batch(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the token ids that the engine was given, each of which is one document's."""
    read: dict[int, torch.Tensor] = {}
    step_of = TokenBatches.step

    def noted(self: TokenBatches, step: int, rank: int, ranks: int) -> TrainingBatch:
        batch = step_of(self, step, rank, ranks)
        read[step] = batch.inputs.token_BS
        return batch

    monkeypatch.setattr(TokenBatches, "step", noted)
    still = OptimizerConfig(muon_learning_rate=0.0, adam_learning_rate=1e-5)
    spikes = SpikeConfig(threshold=0.5, window=16, at_most=100)  # many a step behind the first sixteen exceeds it
    config = CONFIG.model_copy(update={"steps": 24, "optimizer": still, "spikes": spikes})
    metrics = trained(of_documents_apart(tokens, tmp_path / "tokens"), tmp_path / "out", config)
    rows = [json.loads(line) for line in (tmp_path / "out" / "spikes.jsonl").read_text().splitlines()]
    assert 0 < len(rows) == metrics["steps_left_out"] < 8
    for row in rows:
        assert (row["why"], row["policy"]) == ("spike", "skip")
        assert row["score"] > 0.5
        token_BS = read[row["step"]]
        held = {(token - 3) // EACH for token in token_BS[token_BS > 2].tolist()}
        assert sorted(row["documents"]) == sorted(f"{'ab'[i % 2]}/{1000 + i:016x}" for i in held)


def test_killed_while_its_work_is_removed_it_is_not_trained_again(
    base: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The removal stops after one file of the last checkpoint: that the job had ended is still known.

    A job in a process of its own makes the bytes that one in this process makes.
    """
    out = tmp_path / "out"

    def killed(folder: Path, *_: object, **__: object) -> None:
        (folder / "rank-00000.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("gristmill.model.launch.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            job(tokens, out)
    assert (out / "work").exists()
    assert job(tokens, out)["steps"] == CONFIG.steps
    assert len((out / "log" / "starts.jsonl").read_text().splitlines()) == 1
    assert not (out / "work").exists()
    assert content(out) == content(base)


def test_ranks_share_the_responses_of_a_step() -> None:
    """The mean of the ranks' losses is the mean over all response tokens, however unevenly these fall."""
    talks = [Conversation([5, 6, 7], list(range(8, 8 + n))) for n in (2, 20, 3, 25, 4, 18, 2, 9)]
    made: dict[str, Any] = {"sequences": 4, "length": 32, "steps": 1, "seed": 0, "pad": 0}
    batches = ConversationBatches(talks, **made, device=torch.device("cpu"))
    torch.manual_seed(0)
    model = Transformer(SMALL, 64)
    model.initialise(0)

    def gradient(ranks: int) -> torch.Tensor:
        model.zero_grad()
        for rank in range(ranks):
            loss, _ = Objective(model, 0.0)(batches.step(0, rank, ranks))
            (loss / ranks).backward()
        assert model.lm_head.weight.grad is not None
        return model.lm_head.weight.grad.clone()

    # The head's gradient has no part in the balance loss; float32 sums of some dozens of terms in another order.
    for ranks in (2, 4):
        torch.testing.assert_close(gradient(ranks), gradient(1), rtol=1e-4, atol=1e-6)


def test_a_mixture_of_another_run_is_refused(tokens: Path, tmp_path: Path) -> None:
    """By the job, whose sentence its launcher passes on."""
    shorter, longer = (mixed(tokens, CONFIG.model_copy(update=u)) for u in ({"sequence_length": 16}, {"steps": 11}))
    with pytest.raises(ValueError, match=r"pretrain asks for sequence_length 32 .*made for 16"):
        trained(tokens, tmp_path / "shorter", mixture=shorter)
    with pytest.raises(JobFailed, match=r"pretrain asks for sequences 40 .*made for 44.*\(log: .*output.log\)"):
        job(tokens, tmp_path / "longer", mixture=longer)


def test_fine_tuning_learns_responses_alone(base: Path, tokens: Path, tmp_path: Path) -> None:
    problems, out = tmp_path / "problems", tmp_path / "out"
    problems.mkdir()
    out.mkdir()
    make_problems(ProblemsConfig(cold_start=60, train=10, test=5), problems, 0, progress=quiet)
    config = SFTConfig(steps=6, sequence_length=96, batch_sequences=4, checkpoint_every=2)
    with jobs_here():
        metrics = fine_tune(
            config, base, problems, tokens, out, 0, threads=1, ranks=1, device="cpu", layout=PLAIN, progress=silent
        )
    assert (metrics["conversations"], metrics["held_out_conversations"]) == (59, 1)
    assert 0 <= metrics["padding"] < 0.6
    assert not any(name.startswith("mtp.") for name in load_file(out / "model" / "model.safetensors"))

    chat = Chat(tokens / "tokenizer")
    talk = Conversation(chat.prompt("7+5=?"), chat.response("7+5=12", "12"))
    batches = ConversationBatches(
        [talk], sequences=1, length=64, steps=1, seed=0, pad=chat.pad, device=torch.device("cpu")
    )
    batch = batches.step(0, 0, 1)
    learned = [t for t in batch.target_BS[0].tolist() if t != IGNORED]
    assert learned == talk.response
    assert float(batch.weight_BS.sum()) == len(talk.response)


def test_a_folder_has_all_that_transformers_needs(tokens: Path, tmp_path: Path) -> None:
    """Its tensors and logits are tested over many shapes in test_hugging_face.py; here tokenizer and template too."""
    model = Transformer(SMALL, 320)
    model.initialise(3)
    tokenizer = tokens / "tokenizer"
    assert export.write_folder(model.eval(), Chat(tokenizer), tokenizer, tmp_path, shard_megabytes=1) >= 1
    prefill, cached = export.logits_difference(model, tmp_path)
    assert max(prefill, cached) < 2e-4  # float32, logits of order one: some hundred ulp
    from transformers import AutoTokenizer

    chat = AutoTokenizer.from_pretrained(tmp_path)
    asked = chat.apply_chat_template([{"role": "user", "content": "7+5=?"}], add_generation_prompt=True)
    assert list(asked["input_ids"] if hasattr(asked, "keys") else asked) == Chat(tokenizer).prompt("7+5=?")
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == Chat(tokenizer).eos
