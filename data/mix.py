"""The `mix` stage: documents packed into sequences, and which source each position of the run reads.

Shard by shard it packs each stream of the token shards (data/packing.py), having hashed the shard first; then the
weights, caps and epochs of the sources become exact numbers of sequences in each phase of the run. The run itself is
not written down: `mixture.json` holds a few numbers, and data/order.py computes every position from them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from gristmill.data.config import Config
from gristmill.data.documents import write_json_lines
from gristmill.data.executor import Task, remove_work, run_tasks
from gristmill.data.mixture import COUNT, FORMAT
from gristmill.data.order import MOST, Order, Phase
from gristmill.data.packing import FIRST, PIECE, Counts, best_fit, concatenate
from gristmill.data.shards import CHUNK, TokenShards
from gristmill.data.stage_types import ConfigRefused, Metrics, Progress

HELD_OUT = 1 << 20  # positions of the held-out order: more than a check ever reads
PACKINGS = ("best_fit", "concatenate")


class MixPhase(Config):
    """Weights of the sources up to a point of the run."""

    until: float = Field(gt=0, le=1, title="Until", description="End of the phase, as a fraction of the run.")
    weights: dict[str, float] = Field(
        default_factory=dict, title="Weights", description="Weight of each source; empty takes sources by their size."
    )

    @model_validator(mode="after")
    def _weights(self) -> Self:
        _check_weights(self.weights, f"in the phase until {self.until}, ")
        return self


class MixSection(Config):
    """How documents are packed, and how much of each source the run sees, when: a recipe's section."""

    packing: Literal["best_fit", "concatenate"] = Field(
        default="best_fit",
        title="Packing",
        description="best_fit cuts no document that fits a sequence; concatenate lays them end to end.",
    )
    window: int = Field(
        default=0,
        ge=0,
        le=1 << 31,
        title="Window",
        description="Tokens of a shard that best_fit packs together, 0 for all. Some hundred sequences keep what a "
        "sequence is made of near each other, for reading from S3, at the price of some padding.",
    )
    weights: dict[str, float] = Field(
        default_factory=dict,
        title="Weights",
        description="Share of the run's sequences from each source, in proportion; empty takes sources by their size.",
    )
    temperature: float = Field(
        default=1.0,
        ge=0.1,
        le=100,
        title="Temperature",
        description="T of weights in proportion to size^(1/T), where weights are by size; above 1 favours the small.",
    )
    epochs: dict[str, float] = Field(
        default_factory=dict,
        title="Epochs",
        description="How often at most the run reads a source; what it then lacks goes to the others by their weights.",
    )
    caps: dict[str, int] = Field(
        default_factory=dict,
        title="Caps",
        description="Tokens of a source that are used at most; each epoch reads the same ones.",
    )
    phases: tuple[MixPhase, ...] = Field(
        default=(),
        title="Phases",
        description="Weights that change over the run; the last ends at 1. Empty: one phase of the weights above.",
    )

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        _check_weights(self.weights, "")
        for name, limits in (("epochs", self.epochs), ("caps", self.caps)):
            for source, limit in limits.items():
                if not 0 < limit < float("inf"):
                    raise ValueError(f"{name} gives {source!r} {limit}: give a number above 0, or the weight 0")
        ends = [phase.until for phase in self.phases]
        if ends and (ends != sorted(set(ends)) or ends[-1] != 1):
            raise ValueError(f"phases end at {ends}: let them ascend, and the last end at 1")
        if self.phases and self.weights:
            raise ValueError("mix has weights and phases: put the weights into the phases")
        return self

    @property
    def named(self) -> dict[str, list[str]]:
        """The sources that each field names."""
        fields = {"weights": list(self.weights), "epochs": list(self.epochs), "caps": list(self.caps)}
        return fields | {f"phases.{i}.weights": list(phase.weights) for i, phase in enumerate(self.phases)}


class MixConfig(MixSection):
    """A mixture for a run of so many sequences of one length; a recipe takes both from `pretrain`."""

    sequence_length: int = Field(
        default=128, ge=8, le=1 << 20, title="Sequence", description="Tokens of a packed sequence."
    )
    sequences: int = Field(
        default=12_800, ge=1, le=MOST, title="Sequences", description="Sequences of the run: its steps times its batch."
    )

    @model_validator(mode="after")
    def _caps_hold_a_sequence(self) -> Self:
        for source, cap in self.caps.items():
            if cap < self.sequence_length:
                raise ValueError(f"caps gives {source!r} {cap} tokens, less than a sequence of {self.sequence_length}")
        return self


def _check_weights(weights: Mapping[str, float], where: str) -> None:
    for source, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{where}the weight of {source!r} is {weight}: give each source a number from 0")
    if weights and not any(weights.values()):
        raise ValueError(f"{where}the weight of every source is 0: give at least one more")


def mix(config: MixConfig, tokens: Path, out: Path, seed: int, *, workers: int, progress: Progress) -> Metrics:
    """Write the packing of every stream and mixture.json; packing.jsonl and sources.jsonl are for the card.

    Raises:
        ConfigRefused: a source that there is not, or limits that leave fewer sequences than the run has.
        ValueError: a damaged shard.
    """
    shards = TokenShards(tokens / "tokens")
    _check_sources(config, shards)
    work = out / "work"
    work.mkdir(exist_ok=True)
    tasks = [
        Task(
            _pack_shard,
            (tokens / "tokens", out, split, source, number, config),
            _tally(out, split, source, number),
        )
        for split, source in _streams(shards)
        for number in range(len(shards.entries(split, source)))
    ]
    run_tasks(tasks, workers, progress, 0, len(tasks) + 1)
    packed = {stream: _gather_stream(out, shards, *stream) for stream in _streams(shards)}
    orders = _orders(config, shards, packed)
    described = {
        "format": FORMAT,
        "seed": seed,
        "sequence_length": config.sequence_length,
        "packing": config.packing,
        "sequences": config.sequences,
        "tokens_index_sha256": shards.index_sha256,
        "orders": orders,
        "streams": [
            {"split": split, "source": source, "shards": [entry["index"] for entry in entries]}
            for (split, source), entries in packed.items()
        ],
    }
    _write(out / "mixture.json", (json.dumps(described, indent=1, sort_keys=True) + "\n").encode())
    train = _order(seed, "train", orders, packed)
    rows = _packing_rows(packed, config.sequence_length)
    write_json_lines(out / "packing.jsonl", rows)
    by_source = [_source_row(out, shards, packed, train, s) for s in range(len(train.sources))]
    write_json_lines(out / "sources.jsonl", by_source)
    metrics = _metrics(config, rows, by_source, train)
    progress(len(tasks) + 1, len(tasks) + 1)
    remove_work(work)
    return metrics


def _streams(shards: TokenShards) -> list[tuple[str, str]]:
    return [(split, source) for split in ("held_out", "train") for source in shards.streams(split)]


def _check_sources(config: MixConfig, shards: TokenShards) -> None:
    there = shards.streams("train")
    named = [("weights", config.weights), ("epochs", config.epochs), ("caps", config.caps)]
    named += [(f"the phase until {phase.until}", phase.weights) for phase in config.phases]
    for where, sources in named:
        unknown = sorted(set(sources) - set(there))
        if unknown:
            raise ConfigRefused(
                f"mix: {where} names {unknown[0]!r}, and the train shards have only {', '.join(there)}: correct it"
            )


def _tally(out: Path, split: str, source: str, number: int) -> Path:
    return out / "work" / f"{split}.{source}.{number:05d}.json"


def _pack_shard(tokens: Path, out: Path, split: str, source: str, number: int, config: MixConfig) -> None:
    """Check a shard's hashes, pack it, count its token ids; the tally, with what either packing does, comes last."""
    shards = TokenShards(tokens)
    shards.check_hashes(split, source, number)
    shard = shards.shard(split, source, number)
    if shard.entry.tokens > 1 << 31:
        raise ValueError(
            f"shard {number} of {split}/{source} has {shard.entry.tokens} tokens, more than 2³¹: lower shard_tokens"
        )
    edges = np.append(np.asarray(shard.starts[0 : shard.entry.documents]).astype(np.int64), shard.entry.tokens)
    length = config.sequence_length
    made = {"best_fit": best_fit(edges, length, config.window), "concatenate": concatenate(edges, length)}
    chosen = made[config.packing]
    folder = out / split / source
    files = {"pieces": chosen.pieces.astype(PIECE), "firsts": chosen.firsts.astype(FIRST)}
    hashes = {f"{name}_sha256": _write(folder / f"{number:05d}.{name}", a.tobytes()) for name, a in files.items()}
    counts = np.zeros(shards.vocab_size, COUNT)
    for start in range(0, shard.entry.tokens, CHUNK):
        counts += np.bincount(shard.tokens[start : start + CHUNK], minlength=shards.vocab_size).astype(COUNT)
    _write(_tally(out, split, source, number).with_suffix(".counts"), counts.tobytes())
    index = {"sequences": chosen.counts.sequences, "pieces": len(chosen.pieces), **hashes}
    tally = {"index": index, "packing": {name: vars(p.counts) for name, p in made.items()}}
    _write(_tally(out, split, source, number), json.dumps(tally).encode())


def _write(path: Path, data: bytes) -> str:
    """Write a file under a temporary name first; its hash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    part.write_bytes(data)
    os.replace(part, path)
    return hashlib.sha256(data).hexdigest()


def _gather_stream(out: Path, shards: TokenShards, split: str, source: str) -> list[dict[str, Any]]:
    """The tallies of a stream; its token counts are summed into one file."""
    numbers = range(len(shards.entries(split, source)))
    total = np.zeros(shards.vocab_size, COUNT)
    for number in numbers:
        total += np.frombuffer(_tally(out, split, source, number).with_suffix(".counts").read_bytes(), COUNT)
    _write(out / split / source / "counts", total.tobytes())
    return [json.loads(_tally(out, split, source, number).read_text(encoding="utf-8")) for number in numbers]


# --- how many sequences of each source


Packs = dict[tuple[str, str], list[dict[str, Any]]]


def _sequences(packed: Packs, split: str, source: str) -> int:
    return sum(entry["index"]["sequences"] for entry in packed[split, source])


def _orders(config: MixConfig, shards: TokenShards, packed: Packs) -> dict[str, Any]:
    """Sources, pools and phases of both splits, as mixture.json holds them."""
    sources = [s for s in shards.streams("train") if _sequences(packed, "train", s)]
    sizes = {s: float(sum(e.tokens for e in shards.entries("train", s))) for s in sources}
    most = {s: config.caps[s] // config.sequence_length if s in config.caps else MOST for s in sources}
    pools = {s: min(_sequences(packed, "train", s), most[s]) for s in sources}
    limits = {s: int(config.epochs[s] * pools[s]) if s in config.epochs else MOST for s in sources}
    phases, first = [], 0
    for phase in config.phases or (MixPhase(until=1.0, weights=config.weights),):
        end = round(phase.until * config.sequences)
        weights = phase.weights or {s: size ** (1 / config.temperature) for s, size in sizes.items()}
        quotas = shared_out(end - first, [weights.get(s, 0.0) for s in sources], [limits[s] for s in sources])
        if quotas is None:
            raise ConfigRefused(
                f"the run asks for {end - first} sequences up to {phase.until} of it, and epochs and caps leave "
                f"{sum(limits[s] for s in sources if weights.get(s))}: raise them, or make the run shorter"
            )
        limits = {s: limits[s] - q for s, q in zip(sources, quotas, strict=True)}
        phases.append({"first": first, "end": end, "quotas": quotas})
        first = end
    used = [sum(p["quotas"][i] for p in phases) for i in range(len(sources))]
    return {
        "train": {"sources": sources, "pools": [pools[s] for s in sources], "phases": phases},
        "held_out": _held_out(shards, packed, sources, used),
    }


def _held_out(shards: TokenShards, packed: Packs, sources: list[str], used: list[int]) -> dict[str, Any]:
    """The order of checks: the sources of the whole run by their part in it, those that hold out anything."""
    parts = {s: n for s, n in zip(sources, used, strict=True) if n}
    there = [s for s in shards.streams("held_out") if s in parts and _sequences(packed, "held_out", s)]
    if not there:
        raise ConfigRefused("no source of the mixture holds out a document: give more text, or raise tokenize.held_out")
    quotas = shared_out(HELD_OUT, [float(parts[s]) for s in there], [MOST] * len(there))
    phase = {"first": 0, "end": HELD_OUT, "quotas": quotas}
    return {"sources": there, "pools": [_sequences(packed, "held_out", s) for s in there], "phases": [phase]}


def shared_out(count: int, weights: Sequence[float], limits: Sequence[int]) -> list[int] | None:
    """`count` shared out in proportion to `weights`, none above its limit; None where the limits leave too little.

    What a limit keeps from one goes to the others by their weights; parts of one go to the largest remainders, the
    earlier first.
    """
    shares = [0] * len(weights)
    open_ones = [i for i, w in enumerate(weights) if w > 0]
    left = count
    while open_ones:
        total = sum(weights[i] for i in open_ones)
        full = [i for i in open_ones if left * weights[i] / total > limits[i]]
        if not full:
            break
        for i in full:
            shares[i] = limits[i]
            left -= limits[i]
        open_ones = [i for i in open_ones if i not in full]
    if not open_ones:
        return None if left > 0 else shares
    total = sum(weights[i] for i in open_ones)
    exact = {i: left * weights[i] / total for i in open_ones}
    for i, value in exact.items():
        shares[i] = min(int(value), limits[i])
    for i in sorted(open_ones, key=lambda i: (shares[i] - exact[i], i)) * 2:
        if sum(shares) < count and shares[i] < limits[i]:
            shares[i] += 1
    return shares if sum(shares) == count else None


def _order(seed: int, split: str, orders: Mapping[str, Any], packed: Packs) -> Order:
    given = orders[split]
    phases = [Phase(p["first"], p["end"], tuple(p["quotas"])) for p in given["phases"]]
    sizes = [_sequences(packed, split, s) for s in given["sources"]]
    return Order(seed, given["sources"], sizes, given["pools"], phases)


# --- what the card shows


def _packing_rows(packed: Packs, length: int) -> list[dict[str, Any]]:
    """What each packing does to each stream."""
    rows = []
    for (split, source), entries in packed.items():
        for name in PACKINGS:
            total = {field: sum(e["packing"][name][field] for e in entries) for field in Counts.__dataclass_fields__}
            share = round(total["padding"] / max(1, total["sequences"] * length), 6)
            rows.append({"split": split, "source": source, "packing": name, **total, "padding_share": share})
    return rows


def _source_row(out: Path, shards: TokenShards, packed: Packs, order: Order, s: int) -> dict[str, Any]:
    """One source before and after: tokens in its shards, and the predictions that the run makes of them."""
    source, used, pool = order.sources[s], order.used[s], order.pools[s]
    sizes = _sequence_sizes(out, packed, source)
    whole = used // pool if pool else 0
    each = _sum_of(sizes, order, s, 0, pool) if whole else 0
    return {
        "source": source,
        "tokens": sum(e.tokens for e in shards.entries("train", source)),
        "sequences": len(sizes),
        "pool": pool,
        "run_sequences": used,
        "run_share": round(used / order.total, 6),
        "epochs": round(used / pool, 4) if pool else 0.0,
        "run_tokens": whole * each + _sum_of(sizes, order, s, whole * pool, used),
    }


def _sequence_sizes(out: Path, packed: Packs, source: str) -> np.ndarray:
    """Predictions of each sequence of a training stream, four bytes each, in a file."""
    parts = packed["train", source]
    count = _sequences(packed, "train", source)
    sizes = np.memmap(out / "work" / f"sizes.{source}", np.uint32, "w+", shape=(count,))
    at = 0
    for number, entry in enumerate(parts):
        if not entry["index"]["sequences"]:
            continue
        base = out / "train" / source / f"{number:05d}"
        pieces = np.memmap(base.with_suffix(".pieces"), PIECE, "r").reshape(-1, 2)[:, 1] & np.uint32(0x7FFFFFFF)
        firsts = np.fromfile(base.with_suffix(".firsts"), FIRST)[:-1].astype(np.int64)
        sizes[at : at + len(firsts)] = np.add.reduceat(pieces, firsts)
        at += len(firsts)
    return sizes


def _sum_of(sizes: np.ndarray, order: Order, source: int, first: int, end: int) -> int:
    """Predictions at a source's positions [first, end)."""
    total = 0
    for start in range(first, end, CHUNK):
        ranks = np.arange(start, min(end, start + CHUNK))
        total += int(sizes[order.sequences(source, ranks)].sum(dtype=np.int64))
    return total


def _metrics(config: MixConfig, rows: list[dict[str, Any]], by_source: list[dict[str, Any]], order: Order) -> Metrics:
    def table(field: str) -> dict[str, Any]:
        return {row["source"]: row[field] for row in by_source}

    def packings(field: str) -> dict[str, Any]:
        return {name: sum(r[field] for r in train if r["packing"] == name) for name in PACKINGS}

    train = [r for r in rows if r["split"] == "train"]
    sequences, padding = packings("sequences"), packings("padding")
    return {
        "sequence_length": config.sequence_length,
        "sequences": config.sequences,
        "phases": len(order.phases),
        "tokens": sum(table("tokens").values()),
        "run_tokens": sum(table("run_tokens").values()),
        "run_padding": round(1 - sum(table("run_tokens").values()) / (config.sequences * config.sequence_length), 6),
        "tokens_by_source": table("tokens"),
        "run_tokens_by_source": table("run_tokens"),
        "run_sequences_by_source": table("run_sequences"),
        "epochs_by_source": table("epochs"),
        "documents_cut_by_packing": packings("documents_cut"),
        "needlessly_cut_by_packing": packings("needlessly_cut"),
        "padding_share_by_packing": {
            name: round(padding[name] / max(1, sequences[name] * config.sequence_length), 6) for name in PACKINGS
        },
    }
