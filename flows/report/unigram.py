"""The yardstick of pretraining: how well a model does that knows no more than how frequent each token is.

It is fitted on the training streams and measured on the held-out streams, both mixed by the weights of
pretraining, so that its bits per byte are of the same text as the trained model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

MOST_TOKENS = 50_000_000  # of a stream; frequencies are known to many digits long before
CHUNK = 1 << 20


class Stream(Protocol):
    """What is asked of a token stream: its length, its tokens, and the bytes of text they stand for."""

    bytes: int

    def __len__(self) -> int: ...

    def read(self, start: int, count: int) -> tuple[Any, Any]: ...


def unigram_bits_per_byte(tokenized: Path, mixture: Mapping[str, float]) -> float | None:
    """Held-out bits per byte of token frequencies, for the shards in `tokenized/tokens`; none without shards.

    `mixture` is that of pretraining: a weight a source, or empty for sources by their size.
    """
    if not (tokenized / "tokens" / "index.json").exists():
        return None
    from gristmill.data.shards import TokenShards

    shards = TokenShards(tokenized / "tokens")
    streams = {
        split: {
            name: shards.stream(split, name)
            for name in shards.streams(split)
            if mixture.get(name, not mixture)
        }
        for split in ("train", "held_out")
    }
    if not streams["train"] or not streams["held_out"]:
        return None
    return round(bits_per_byte(streams["train"], streams["held_out"], mixture, shards.vocab_size), 5)


def bits_per_byte(
    train: Mapping[str, Stream], held_out: Mapping[str, Stream], mixture: Mapping[str, float], vocab_size: int
) -> float:
    """Cross-entropy of the held-out mixture under the frequencies of the training mixture, in bits per byte.

    Each token is counted once more than it was seen, so that one the training text lacks has a probability
    too.
    """
    import numpy as np

    counts = {name: _counts(stream, vocab_size) for name, stream in train.items()}
    weights = _weights(train, mixture)
    frequency = sum(weights[n] * c / c.sum() for n, c in counts.items())
    read = sum(float(c.sum()) for c in counts.values())
    bits = -np.log2((np.asarray(frequency) * read + 1) / (read + vocab_size))
    weights = _weights(held_out, mixture)
    each_bits = {n: float((c := _counts(s, vocab_size)) @ bits / c.sum()) for n, s in held_out.items()}
    bits_a_token = sum(weights[n] * each_bits[n] for n in held_out)
    bytes_a_token = sum(weights[n] * stream.bytes / len(stream) for n, stream in held_out.items())
    return bits_a_token / bytes_a_token


def _weights(streams: Mapping[str, Stream], mixture: Mapping[str, float]) -> dict[str, float]:
    raw = {name: mixture[name] if mixture else float(len(stream)) for name, stream in streams.items()}
    total = sum(raw.values())
    return {name: weight / total for name, weight in raw.items()}


def _counts(stream: Stream, vocab_size: int) -> Any:
    import numpy as np

    counts = np.zeros(vocab_size, dtype=np.float64)
    end = min(len(stream), MOST_TOKENS)
    starts: Sequence[int] = range(0, end, CHUNK)
    for start in starts:
        tokens, _ = stream.read(start, min(CHUNK, end - start))
        counts += np.bincount(np.asarray(tokens), minlength=vocab_size)
    return counts
