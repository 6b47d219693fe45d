"""A step of GRPO, ours against TRL's GRPOTrainer: sampling, judging and one optimizer step. JSON at the end.

    python -P bench/rl.py [--steps 6] [--rounds 3] [--shapes tiny small]
                       [--theirs grouped_mm/32 grouped_mm/256 eager/32]

Both start from the same model, fine-tuned here on worked sums until it answers in the form that is asked for, and are
asked the same questions in the same order: 32 a step, 8 responses each, at temperature 1. Rewards are those of the
same rules, the loss is GRPO's mean of means with the same clipping, without a KL term; AdamW's rate is so low that the
responses stay what they are, since sides that draw other numbers would drift apart. Float32 on both sides; groups
whose rewards are all equal are trained on as well, as TRL does (ours would leave them out). Every run is a process of
its own; sides take turns. Theirs samples by `generate`, since transformers' continuous batching (5.23) has no cache for
keys and values of different widths, and trains without gradient checkpointing; --theirs names the way of its experts
and how many responses go through a forward, and its fastest counts. `tiny` is the recipe's model (1.2 M parameters),
`small` has the widths of bench/pretrain.py's (22 M). TRL is installed by pip install -c constraints.txt -e '.[peers]'.
Keys of the last line, of each shape:

    ratio               seconds a sampled token of their fastest over ours (medians of the steps)
    sampling_ratio      the same of the sampling alone
    training_ratio      the same of the rest: judging, forward, backward, optimizer, records
    memory_ratio        most memory of our process over that of their fastest
    tokens_per_second   sampled by ours over whole steps
    length_ratio        mean length of our responses over theirs, which draw other numbers
    norm_apart          how far the two gradients' norms are apart, over the norm, where theirs is given the responses
                        that ours sampled; exit code 1 where it is above a thousandth, since the work was not the same
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gristmill.model.config import ModelConfig
    from gristmill.model.rl.config import GRPOConfig
    from gristmill.model.rl.training import Rollout

QUESTIONS, SAMPLES, LONGEST, VOCAB = 32, 8, 56, 1024
LESSONS = 3000  # that the tokenizer is trained on; twice as many worked sums are there for fine-tuning
RATE = 1e-6
WARM = 2  # steps that are run and not counted
SHAPES = {"tiny": 300, "small": 150}  # and the steps of fine-tuning after which most responses keep the form
THEIRS = ("grouped_mm/32", "grouped_mm/256", "eager/32", "eager/256")
APART = 1e-3  # float32 sums of other orders; a norm of half the gradient, or of another weighting, is far from it


def shape(name: str) -> ModelConfig:
    """The model of this name, without what the other side has not."""
    from gristmill.flows.recipe import load_recipe
    from gristmill.model.config import ModelConfig

    given = load_recipe("tiny").pretrain.model.model_dump()
    if name == "small":
        given |= {
            "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "moe_intermediate_size": 128,
            "intermediate_size": 1024, "n_routed_experts": 32, "num_experts_per_tok": 4,
        }  # fmt: skip
    return ModelConfig(**given | {"num_nextn_predict_layers": 0, "balance_loss_alpha": 0.0, "bias_update_speed": 0.0})


def prepare(folder: Path, name: str, threads: int) -> None:
    """Problems, a tokenizer, and a model that answers in form, in our folder and in transformers'."""
    import torch

    from gristmill.data.arithmetic import lesson
    from gristmill.data.documents import write_rows
    from gristmill.data.problems import ProblemsConfig, make_problems
    from gristmill.data.stage_types import silent
    from gristmill.data.tokenize import TokenizeConfig, tokenize
    from gristmill.model.chat import Chat
    from gristmill.model.hugging_face.export import write_folder
    from gristmill.model.sft import fine_tune
    from gristmill.model.training.config import LayoutConfig, OptimizerConfig, ScheduleConfig, SFTConfig
    from gristmill.model.training.models import load_model, save_model
    from gristmill.model.transformer import Transformer

    for part in ("problems", "tokens", "model", "theirs"):
        (folder / part).mkdir()
    make_problems(ProblemsConfig(cold_start=2 * LESSONS, train=2000, test=100), folder / "problems", 0, progress=silent)
    metadata = {"source": "lessons", "kind": "lessons"}
    rows = [{"text": lesson(0, i), "id": f"lessons/{i}", "metadata": metadata} for i in range(LESSONS)]
    write_rows(folder / "lessons" / "documents" / "00000.jsonl.zst", rows)
    config = TokenizeConfig(vocab_size=VOCAB, sample_bytes=3_000_000)
    tokenize(config, folder / "lessons", folder / "tokens", 0, workers=0, progress=silent)
    model = Transformer(shape(name), VOCAB)
    model.initialise(0)
    save_model(folder / "base" / "model", model)
    tuning = SFTConfig(
        steps=SHAPES[name], sequence_length=128, batch_sequences=16, evaluate_every=10**6, checkpoint_every=10**6,
        optimizer=OptimizerConfig(muon_learning_rate=0.02, adam_learning_rate=0.003, weight_decay=0.0),
        schedule=ScheduleConfig(warmup_steps=5, decay_fraction=0.8, final_ratio=0.05),
    )  # fmt: skip
    fine_tune(
        tuning, folder / "base", folder / "problems", folder / "tokens", folder / "model", 0, threads=threads, ranks=1,
        device="cpu", layout=LayoutConfig(), progress=silent,
    )  # fmt: skip
    tuned = load_model(folder / "model" / "model", torch.device("cpu"), mtp=False)
    tokenizer = folder / "tokens" / "tokenizer"
    write_folder(tuned, Chat(tokenizer), tokenizer, folder / "theirs", 2000)


def settings(steps: int) -> GRPOConfig:
    """What is asked of both sides."""
    from gristmill.model.rl.config import GRPOConfig
    from gristmill.model.training.config import OptimizerConfig, ScheduleConfig

    return GRPOConfig(
        steps=steps, questions_per_step=QUESTIONS, samples_per_question=SAMPLES, max_new_tokens=LONGEST,
        drop_flat_groups=False, checkpoint_every=10**6,
        optimizer=OptimizerConfig(muon_learning_rate=0.0, adam_learning_rate=RATE, weight_decay=0.0),
        schedule=ScheduleConfig(warmup_steps=0, decay_fraction=0.0),
    )  # fmt: skip


def run_ours(folder: Path, steps: int) -> dict[str, Any]:
    """The stage's code as a job runs it; what is asked, and what the first step sampled, is left for the other side."""
    import torch

    from gristmill.model.chat import Chat
    from gristmill.model.rl import training
    from gristmill.model.stage_types import silent
    from gristmill.model.training.models import load_model

    sampling: list[float] = []
    sample = training.sample

    def timed(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        made = sample(*given, **named)
        sampling.append(time.perf_counter() - began)
        return made

    problems = [json.loads(line) for line in (folder / "problems" / "train.jsonl").read_text().splitlines()]
    model = load_model(folder / "model" / "model", torch.device("cpu"), mtp=False)
    with tempfile.TemporaryDirectory() as out:
        (Path(out) / "log").mkdir()
        policy = training.Policy(settings(steps), model, Chat(folder / "tokens" / "tokenizer"), problems, 0, Path(out))
        asked = [problem for step in range(steps) for problem in policy.questions(step)]
        (folder / "asked.json").write_text(json.dumps(asked))
        (folder / "rollout.json").write_text(json.dumps(_written(policy.roll_out(0))))
        training.sample = timed
        try:
            policy.train(silent)
        finally:
            training.sample = sample
        timings = [json.loads(line) for line in (Path(out) / "log" / "timings.jsonl").read_text().splitlines()]
    return {
        "sampling": sampling,
        "seconds": [row["sampling_seconds"] + row["training_seconds"] for row in timings],
        "tokens": [row["sampled_tokens"] for row in policy.curves],
        "grad_norm": policy.curves[0]["grad_norm"],
        "reward": policy.curves[0]["reward"],
    }


def _written(rollout: Rollout) -> dict[str, Any]:
    """A rollout, a row a response."""
    return {
        "prompt_ids": [prompt for prompt in rollout.prompts for _ in range(SAMPLES)],
        "completion_ids": [sample.tokens for sample in rollout.samples],
        "logprobs": [sample.log_probs for sample in rollout.samples],
        "advantage": rollout.advantage_R.tolist(),
    }


def run_theirs(folder: Path, steps: int, experts: str, micro: int, *, given: bool = False) -> dict[str, Any]:
    """GRPOTrainer over the same questions; where they are given, one step on the responses that ours sampled."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from gristmill.model.chat import Chat
    from gristmill.model.rl.rewards import judge, reference_answer

    rows = json.loads((folder / "asked.json").read_text())
    rollout = json.loads((folder / "rollout.json").read_text())
    chat, config = Chat(folder / "tokens" / "tokenizer"), settings(steps)
    asked = [{"prompt": [{"role": "user", "content": row["question"]}], **row} for row in rows]
    found: dict[str, list[Any]] = {"ended": [], "sampling": [], "tokens": []}

    def reward(completion_ids: list[list[int]], question: list[str], answer: list[str], **_: Any) -> list[float]:
        found["tokens"].append(sum(map(len, completion_ids)))
        if given:  # the advantages of ours: TRL divides by another standard deviation (of G − 1)
            return rollout["advantage"]
        return [
            judge(chat.text(tokens), tokens[-1] == chat.eos, q, reference_answer(a), config.rewards).reward
            for tokens, q, a in zip(completion_ids, question, answer, strict=True)
        ]

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            found["ended"].append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            found["ended"].append(time.perf_counter())

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids: list[list[int]], *rest: Any, **named: Any) -> Any:
            if not found["sampling"] and prompt_ids != rollout["prompt_ids"]:
                raise ValueError("their chat template makes other prompts: the work would not be the same")
            began = time.perf_counter()
            made = super()._generate_single_turn(prompt_ids, *rest, **named)
            found["sampling"].append(time.perf_counter() - began)
            return made

    with tempfile.TemporaryDirectory() as out:
        arguments = GRPOConfig(
            output_dir=out, max_steps=1 if given else steps, per_device_train_batch_size=micro,
            gradient_accumulation_steps=QUESTIONS * SAMPLES // micro, num_generations=SAMPLES,
            max_completion_length=LONGEST, temperature=config.temperature, beta=0.0, loss_type="grpo",
            epsilon=config.clip_low, epsilon_high=config.clip_high, scale_rewards="none" if given else "group",
            learning_rate=RATE, lr_scheduler_type="constant", adam_beta2=config.optimizer.beta2, weight_decay=0.0,
            max_grad_norm=config.optimizer.gradient_clip, shuffle_dataset=False, gradient_checkpointing=False,
            bf16=False, use_cpu=True, logging_steps=1,
            report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Timed(
            model=AutoModelForCausalLM.from_pretrained(folder / "theirs", experts_implementation=experts),
            reward_funcs=reward,
            args=arguments,
            train_dataset=Dataset.from_list(asked),
            processing_class=AutoTokenizer.from_pretrained(folder / "theirs"),
            callbacks=[Clock()],
            rollout_func=(lambda *_: rollout) if given else None,
        )
        trainer.train()
    ended = found.pop("ended")
    first = trainer.state.log_history[0]
    seconds = [after - before for before, after in pairwise(ended)]
    return {**found, "seconds": seconds, "grad_norm": first["grad_norm"], "reward": first["reward"]}


def run_given(folder: Path, steps: int) -> dict[str, Any]:
    """The norm of their gradient on our responses."""
    return run_theirs(folder, steps, "grouped_mm", 32, given=True)


def measured(what: str, *arguments: str, threads: int) -> dict[str, Any]:
    """One of the functions above in a process of its own, with the most memory it held."""
    command = [sys.executable, "-P", __file__, "--threads", str(threads), "--run", what, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{what} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_mib() -> int:
    """Most memory of this process."""
    peak = next(li for li in Path("/proc/self/status").read_text().splitlines() if li.startswith("VmHWM"))
    return int(peak.split()[1]) // 1024


def compare(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both sides at one shape."""
    prepare(folder, name, arguments.threads)
    count = arguments.steps + WARM
    sides: dict[str, tuple[str, ...]] = {"ours": ("run_ours",)}
    sides |= {f"theirs {one}": ("run_theirs", *one.split("/")) for one in arguments.theirs}
    each: dict[str, dict[str, list[float]]] = {side: {"whole": [], "sampling": [], "training": []} for side in sides}
    tokens: dict[str, list[float]] = {side: [] for side in sides}
    last: dict[str, dict[str, Any]] = {}
    for _ in range(arguments.rounds):
        for side, (what, *how) in sides.items():
            run = last[side] = measured(what, str(folder), str(count), *how, threads=arguments.threads)
            steps = list(zip(run["tokens"], run["seconds"], run["sampling"], strict=True))
            for sampled, seconds, sampling in steps[WARM:]:
                tokens[side].append(sampled)
                each[side]["whole"].append(seconds / sampled)
                each[side]["sampling"].append(sampling / sampled)
                each[side]["training"].append((seconds - sampling) / sampled)
            rates = {part: 1 / statistics.median(taken[-arguments.steps :]) for part, taken in each[side].items()}
            print(
                f"{name:6s} {side:24s} {rates['whole']:7.0f} tokens/s (sampling {rates['sampling']:.0f}, training "
                f"{rates['training']:.0f}) {run['peak_mib']:6d} MiB, reward {run['reward']:.3f}, "
                f"{statistics.mean(tokens[side]) / QUESTIONS / SAMPLES:.1f} tokens a response",
                flush=True,
            )
    median = {side: {part: statistics.median(taken) for part, taken in of.items()} for side, of in each.items()}
    theirs = min((side for side in sides if side != "ours"), key=lambda side: median[side]["whole"])
    given = measured("run_given", str(folder), str(count), threads=arguments.threads)
    norm = last["ours"]["grad_norm"]
    return {
        "fastest_peer": theirs,
        "ratio": round(median[theirs]["whole"] / median["ours"]["whole"], 2),
        "sampling_ratio": round(median[theirs]["sampling"] / median["ours"]["sampling"], 2),
        "training_ratio": round(median[theirs]["training"] / median["ours"]["training"], 2),
        "memory_ratio": round(last["ours"]["peak_mib"] / last[theirs]["peak_mib"], 3),
        "tokens_per_second": round(1 / median["ours"]["whole"]),
        "length_ratio": round(statistics.mean(tokens["ours"]) / statistics.mean(tokens[theirs]), 3),
        "norm_apart": float(f"{abs(given['grad_norm'] - norm) / norm:.2g}"),
    }


def main() -> int:
    """Parse the arguments, run, print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--theirs", nargs="+", default=list(THEIRS[:3]), choices=THEIRS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        what, folder, *rest = arguments.run
        if what == "run_ours":
            from gristmill.model.worker import settle

            settle(arguments.threads)
        run: Any = {"run_ours": run_ours, "run_theirs": run_theirs, "run_given": run_given}[what]
        found = run(Path(folder), *(int(word) if word.isdigit() else word for word in rest))
        print(json.dumps({**found, "peak_mib": peak_mib()}))
        return 0
    import torch
    import transformers
    import trl

    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}"
    print(f"{libraries}, {arguments.threads} threads")
    found = {}
    for name in arguments.shapes:
        with tempfile.TemporaryDirectory(prefix="gristmill-rl-") as folder:
            found[name] = compare(name, arguments, Path(folder))
    asked = {"steps": arguments.steps, "rounds": arguments.rounds, "threads": arguments.threads}
    print(json.dumps({**found, **asked}))
    return int(not all(row["norm_apart"] <= APART for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
