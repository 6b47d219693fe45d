"""GRPO as a job: a policy and problems in, a policy that earns more reward out (R1 section 2.2.1).

A step asks some questions, samples G responses to each, judges them by rule, and takes one or more optimizer steps.
Questions and draws are functions of (seed, step), so a resumed run asks and samples what the undisturbed one did.
"""

from __future__ import annotations

import copy
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gristmill.kernels.cross_entropy import linear_log_probs
from gristmill.model.chat import Chat
from gristmill.model.costs import flops_per_token
from gristmill.model.generate import Sample, Sampling, sample, thought_tokens
from gristmill.model.rl.config import MICRO_TOKENS, GRPOConfig
from gristmill.model.rl.losses import group_advantages, policy_loss
from gristmill.model.rl.rewards import Judged, judge, reference_answer
from gristmill.model.stage_types import Metrics, Progress
from gristmill.model.training.batches import numpy_generator, torch_seed
from gristmill.model.training.checkpoints import CheckpointWriter, last_checkpoint
from gristmill.model.training.fused import fused_of
from gristmill.model.training.loop import Row, write_rows
from gristmill.model.training.models import load_model, own_tensors, save_model
from gristmill.model.training.optimizers import MuonAdamW
from gristmill.model.training.schedules import factor
from gristmill.model.transformer import Batch, Transformer


@dataclass(frozen=True)
class Rollout:
    """The responses of one step, question by question: R = Q · G of them."""

    prompts: list[list[int]]
    samples: list[Sample]
    judged: list[Judged]
    advantage_R: Tensor
    kept: list[int]  # responses of groups that have a spread of rewards


def run(job: dict[str, Any], out: Path, device: torch.device, progress: Progress) -> Metrics:
    """Reinforce `job["model"]` on `train.jsonl` of `job["problems"]`."""
    config, seed = GRPOConfig.model_validate(job["config"]), int(job["seed"])
    chat = Chat(Path(job["tokenizer"]) / "tokenizer")
    with (Path(job["problems"]) / "train.jsonl").open(encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    model = load_model(Path(job["model"]) / "model", device, mtp=False)
    policy = Policy(config, model, chat, problems, seed, out)
    policy.train(progress)
    save_model(out / "model", model)
    write_rows(out / "curves.jsonl", policy.curves)
    write_rows(out / "samples.jsonl", policy.shown)
    return policy.metrics()


class Policy:
    """The policy under training, its reference, its optimizer and its curves."""

    def __init__(
        self, config: GRPOConfig, model: Transformer, chat: Chat, problems: list[Row], seed: int, out: Path
    ) -> None:
        self.config, self.model, self.chat, self.problems, self.seed, self.out = (
            config,
            model,
            chat,
            problems,
            seed,
            out,
        )
        fused, own_seed = fused_of(config.optimizer, model.config), torch_seed(seed, "moments")
        self.optimizer = MuonAdamW(model.named_parameters(), config.optimizer, fused, own_seed)
        self.owner = {**model.config.model_dump(mode="json"), "vocab_size": model.vocab_size}
        self.writer = CheckpointWriter(out / "work", self.owner)
        self.reference = copy.deepcopy(model).requires_grad_(False) if config.kl_weight else None
        self.thought_end = chat.thought_end  # refused here where there is none, and not after a step
        self.curves: list[Row] = []
        self.shown: list[Row] = []

    def train(self, progress: Progress) -> None:
        """All steps, from the last checkpoint where there is one."""
        first = self._resume()
        with (self.out / "log" / "starts.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"pid": os.getpid(), "from_step": first}) + "\n")
        for step in range(first, self.config.steps):
            began = time.perf_counter()
            rollout = self.roll_out(step)
            sampled = time.perf_counter()
            row = {**_described(rollout, self.config, self.thought_end), **self.improve(rollout, step)}
            self.curves.append({"step": step, **row})
            if step in (0, self.config.steps - 1):
                self.shown += self._shown(rollout, step)
            if self.reference is not None and (step + 1) % self.config.reference_every == 0:
                self.reference.load_state_dict(self.model.state_dict())
            self._record_time(step, sampled - began, time.perf_counter() - sampled)
            if (step + 1) % self.config.checkpoint_every == 0 and step + 1 < self.config.steps:
                self._checkpoint(step + 1)
            progress(step + 1, self.config.steps, reward=row["reward"], length=row["response_length"])
        self.writer.close()

    def questions(self, step: int) -> list[Row]:
        """The problems of a step: consecutive places of permutations of the problems, one an epoch."""
        count, total = self.config.questions_per_step, len(self.problems)
        places = range(step * count, (step + 1) * count)
        order = {e: numpy_generator(self.seed, "rl", e).permutation(total) for e in {p // total for p in places}}
        return [self.problems[order[p // total][p % total]] for p in places]

    def roll_out(self, step: int) -> Rollout:
        """Sample and judge the responses of a step."""
        config, asked = self.config, self.questions(step)
        prompts = [self.chat.prompt(p["question"]) for p in asked]
        groups = config.samples_per_question
        seeds = [torch_seed(self.seed, "rollout", step, i) for i in range(len(asked) * groups)]
        samples = sample(
            self.model,
            prompts,
            seeds,
            Sampling(config.max_new_tokens, config.temperature),
            eos=self.chat.eos,
            pad=self.chat.pad,
            copies=groups,
        )
        judged = [
            judge(
                self.chat.text(s.tokens),
                s.ended,
                asked[i // groups]["question"],
                reference_answer(asked[i // groups]["answer"]),
                config.rewards,
            )
            for i, s in enumerate(samples)
        ]
        reward_QG = torch.tensor([j.reward for j in judged], dtype=torch.float64).view(-1, groups)
        advantage_R = group_advantages(reward_QG).flatten().float()
        spread = [bool((row != row[0]).any()) for row in reward_QG]
        kept = [i for i in range(len(samples)) if spread[i // groups] or not config.drop_flat_groups]
        return Rollout(prompts, samples, judged, advantage_R, kept)

    def improve(self, rollout: Rollout, step: int) -> Row:
        """One optimizer step a minibatch of questions; numbers of the last are for the curves."""
        config = self.config
        scale = factor(config.schedule, step, config.steps)
        row: Row = {"learning_rate": scale * config.optimizer.adam_learning_rate}
        row |= {"kl": 0.0, "clip_fraction": 0.0, "grad_norm": 0.0}
        per = config.questions_per_step // config.minibatches * config.samples_per_question
        for minibatch in range(config.minibatches):
            members = [i for i in rollout.kept if i // per == minibatch]
            if members:
                row |= self._optimise(rollout, members, step, scale)
        return row

    def _optimise(self, rollout: Rollout, members: list[int], step: int, scale: float) -> Row:
        config = self.config
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        kl = clipped = 0.0
        for chunk in self._chunks(rollout, members):
            part = self._chunk_loss(rollout, chunk, len(members))
            part.loss.backward()
            kl, clipped = kl + float(part.kl), clipped + float(part.clip_fraction)
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None], foreach=True)
        if not norm.isfinite():
            raise FloatingPointError(
                f"the policy's gradient is not finite at step {step}; the last checkpoint is of step "
                f"{step // config.checkpoint_every * config.checkpoint_every}: lower the learning rate and resume"
            )
        # Clipped as it is taken up: `clip_grad_norm_` would read and write all gradients for it.
        coefficient = float((config.optimizer.gradient_clip / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.admit = lambda: coefficient
        self.optimizer.begin_step(scale)
        self.optimizer.step()
        return {"kl": kl, "clip_fraction": clipped, "grad_norm": float(norm)}

    def _chunks(self, rollout: Rollout, members: list[int]) -> list[list[int]]:
        """Responses of like length together, so that little is padded."""
        groups = self.config.samples_per_question

        def length(i: int) -> int:
            return len(rollout.prompts[i // groups]) + len(rollout.samples[i].tokens)

        chunks: list[list[int]] = []
        for i in sorted(members, key=lambda i: (-length(i), i)):
            if not chunks or length(chunks[-1][0]) * (len(chunks[-1]) + 1) > MICRO_TOKENS:
                chunks.append([])
            chunks[-1].append(i)
        return chunks

    def _chunk_loss(self, rollout: Rollout, chunk: list[int], outputs: int):
        device = self.model.lm_head.weight.device
        token_BS, place_N, target_N, row_N = self._laid_out(rollout, chunk)
        old_N = torch.tensor([p for i in chunk for p in rollout.samples[i].log_probs], device=device)
        length_B = torch.tensor([len(rollout.samples[i].tokens) for i in chunk], device=device)
        advantage_B = rollout.advantage_R[chunk].to(device)
        log_p_N = self._log_probs(self.model, token_BS, place_N, target_N)
        reference_N = None
        if self.reference is not None:
            with torch.no_grad():
                reference_N = self._log_probs(self.reference, token_BS, place_N, target_N)
        return policy_loss(
            log_p_N,
            old_N,
            advantage_B[row_N],
            1.0 / (outputs * length_B[row_N].float()),
            clip_low=self.config.clip_low,
            clip_high=self.config.clip_high,
            reference_log_p_N=reference_N,
            kl_weight=self.config.kl_weight,
        )

    def _laid_out(self, rollout: Rollout, chunk: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens (B,S) padded on the right, and of each response token its flat place, itself and its row."""
        groups, device = self.config.samples_per_question, self.model.lm_head.weight.device
        whole = [rollout.prompts[i // groups] + rollout.samples[i].tokens for i in chunk]
        width = max(map(len, whole)) - 1
        token_BS = torch.full((len(chunk), width), self.chat.pad)
        places, targets, rows = [], [], []
        for row, (i, tokens) in enumerate(zip(chunk, whole, strict=True)):
            token_BS[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
            start = len(rollout.prompts[i // groups]) - 1
            places += range(row * width + start, row * width + len(tokens) - 1)
            targets += rollout.samples[i].tokens
            rows += [row] * len(rollout.samples[i].tokens)
        return (
            token_BS.to(device),
            torch.tensor(places, device=device),
            torch.tensor(targets, device=device),
            torch.tensor(rows, device=device),
        )

    def _log_probs(self, model: Transformer, token_BS: Tensor, place_N: Tensor, target_N: Tensor) -> Tensor:
        position_BS = torch.arange(token_BS.shape[1], device=token_BS.device).expand_as(token_BS)
        hidden_BSD = model.norm(model.hidden(Batch(token_BS, position_BS)))
        x_ND = hidden_BSD.flatten(0, 1).index_select(0, place_N)
        return linear_log_probs(x_ND, model.lm_head.weight, target_N, self.config.temperature)

    def _shown(self, rollout: Rollout, step: int) -> list[Row]:
        groups = self.config.samples_per_question
        return [
            {
                "step": step,
                "question": self.chat.text(rollout.prompts[i // groups]),
                "response": self.chat.text(rollout.samples[i].tokens),
                "reward": round(rollout.judged[i].reward, 4),
                "advantage": round(float(rollout.advantage_R[i]), 4),
            }
            for i in range(0, min(len(rollout.samples), 8 * groups), max(1, groups // 2))
        ][:12]

    def _checkpoint(self, step: int) -> None:
        own = {f"buffer/{name}@0": buffer for name, buffer in self.model.named_buffers()}
        own |= {f"parameter/{piece.name}@0": tensor for tensor, piece in self.optimizer.pieces()}
        own |= {f"{kind}/{piece.name}@0": moment for kind, piece, moment in self.optimizer.moments()}
        if self.reference is not None:
            own |= {f"reference/{name}@0": tensor for name, tensor in own_tensors(self.reference).items()}
        state = {"curves": self.curves, "shown": self.shown, "optimizer_steps": self.optimizer.steps_done}
        self.writer.begin(step, own, state)
        self.writer.wait()
        self.writer.publish()

    @torch.no_grad()
    def _resume(self) -> int:
        found = last_checkpoint(self.out / "work", self.owner)
        if found is None:
            return 0

        def take(kind: str, name: str, tensor: Tensor) -> None:
            tensor.copy_(found.read(kind, name, 0, tensor.numel()).view_as(tensor))

        with found:
            for name, buffer in self.model.named_buffers():
                take("buffer", name, buffer)
            for tensor, piece in self.optimizer.pieces():
                take("parameter", piece.name, tensor)
            if self.reference is not None:
                for name, tensor in own_tensors(self.reference).items():
                    take("reference", name, tensor)
            state = found.state()
            self.optimizer.load_moments(
                lambda kind, p: found.find(kind, p.name, p.start, p.stop), state["optimizer_steps"]
            )
        self.curves, self.shown = state["curves"], state["shown"]
        return found.step

    def _record_time(self, step: int, sampling: float, training: float) -> None:
        row = {"step": step, "sampling_seconds": round(sampling, 4), "training_seconds": round(training, 4)}
        with (self.out / "log" / "timings.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> Metrics:
        """Totals of the run and the means of its last tenth."""
        last = self.curves[-max(1, len(self.curves) // 10) :]

        def mean(name: str) -> float:
            return round(sum(r[name] for r in last) / len(last), 5)

        sampled = sum(r["sampled_tokens"] for r in self.curves)
        trained = sum(r["trained_tokens"] for r in self.curves)
        each = flops_per_token(self.model.config, self.model.vocab_size, self.config.max_new_tokens, mtp=False)
        return {
            "steps": self.config.steps,
            "responses": self.config.steps * self.config.questions_per_step * self.config.samples_per_question,
            "tokens": sampled,
            "flops": each * trained + each // 3 * sampled,
            "first_reward": round(self.curves[0]["reward"], 5),
            **{name: mean(name) for name in ("reward", "accuracy", "format", "response_length", "thought_length")},
        }


def _described(rollout: Rollout, config: GRPOConfig, thought_end: int) -> Row:
    """The curves' numbers of a rollout."""
    count = len(rollout.samples)
    lengths = [len(s.tokens) for s in rollout.samples]
    thoughts = [thought_tokens(s.tokens, thought_end) for s in rollout.samples]
    groups = config.samples_per_question

    def mean(values: list[float]) -> float:
        return sum(values) / count

    return {
        "reward": mean([j.reward for j in rollout.judged]),
        "accuracy": mean([j.accuracy for j in rollout.judged]),
        "format": mean([j.format for j in rollout.judged]),
        "language": mean([j.language for j in rollout.judged]),
        "response_length": mean([float(n) for n in lengths]),
        "thought_length": mean([float(n) for n in thoughts]),
        "entropy": -sum(sum(s.log_probs) for s in rollout.samples) / sum(lengths),
        "groups_kept": len(rollout.kept) // groups,
        "sampled_tokens": sum(lengths),
        "trained_tokens": sum(len(rollout.prompts[i // groups]) + lengths[i] for i in rollout.kept),
    }
