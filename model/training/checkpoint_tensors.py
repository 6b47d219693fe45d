"""The tensors of a checkpoint by name and shape, as a folder of a model has them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from pydantic import ValidationError
from torch import Tensor

from gristmill.model.config import ModelConfig
from gristmill.model.hugging_face.folders import row_slices
from gristmill.model.hugging_face.names import layout
from gristmill.model.training.checkpoints import Checkpoint


def model_of(checkpoint: Checkpoint) -> tuple[ModelConfig, int]:
    """The configuration of the model that a checkpoint is of, and the rows of its vocabulary.

    Raises:
        ValueError: its manifest does not say.
    """
    described = dict(checkpoint.manifest["owner"])
    try:
        vocab_size = int(described.pop("vocab_size"))
        return ModelConfig.model_validate(described), vocab_size
    except (KeyError, ValidationError) as error:
        raise ValueError(f"{checkpoint.folder}: its manifest describes no model of this version ({error})") from error


class CheckpointTensors:
    """All that a checkpoint holds, moments and averages too: `<kind>/<name>`, laid flat."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._size = {f"{kind}/{name}": size for (kind, name), size in checkpoint.held().items()}

    def names(self) -> set[str]:
        return set(self._size)

    def shape(self, name: str) -> tuple[int, ...]:
        return (self._size[name],)

    def dtype(self, name: str) -> torch.dtype:
        kind, _, rest = name.partition("/")
        return self.checkpoint.dtype(kind, rest)

    def parts(self, name: str) -> Iterator[Tensor]:
        for rows in row_slices(self.shape(name)):
            yield self.read(name, None, (rows,))

    def read(self, name: str, dtype: torch.dtype | None = None, place: tuple[int | slice, ...] = ()) -> Tensor:
        """Raises DamagedCheckpoint where some of its numbers are lacking."""
        kind, _, rest = name.partition("/")
        start, stop = stretch(self.shape(name), place)
        found = self.checkpoint.read(kind, rest, start, stop)
        return found if dtype is None else found.to(dtype)


class CheckpointModel:
    """The model in a checkpoint: its parameters and expert biases, in their shapes.

    Raises:
        ValueError: the checkpoint is of no model, or lacks one of its tensors.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._flat, held = CheckpointTensors(checkpoint), checkpoint.held()
        self._shape = {name: shape for name, (shape, _) in layout(*model_of(checkpoint)).items()}
        self._kind = {name: "parameter" if ("parameter", name) in held else "buffer" for name in self._shape}
        for name, shape in self._shape.items():
            if (size := held.get((self._kind[name], name), 0)) != math.prod(shape):
                raise ValueError(f"{checkpoint.folder} holds {size} numbers of {name}, expected {shape}")

    def names(self) -> set[str]:
        return set(self._shape)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._flat.dtype(f"{self._kind[name]}/{name}")

    def parts(self, name: str) -> Iterator[Tensor]:
        for rows in row_slices(self.shape(name)):
            yield self.read(name, None, (rows,))

    def read(self, name: str, dtype: torch.dtype | None = None, place: tuple[int | slice, ...] = ()) -> Tensor:
        """Raises DamagedCheckpoint where some of its numbers are lacking."""
        start, stop = stretch(self._shape[name], place)
        found = self._flat.read(f"{self._kind[name]}/{name}", dtype, (slice(start, stop),))
        return found.view(-1, *self._shape[name][len(place) or 1 :])


def stretch(shape: tuple[int, ...], place: tuple[int | slice, ...]) -> tuple[int, int]:
    """The flat numbers [start, stop) at `place`: indices of the first axes and then a slice of rows; nothing is all.

    Raises:
        ValueError: the place is not one stretch.
    """
    *first, rows = place or (slice(None),)
    if not isinstance(rows, slice) or any(isinstance(index, slice) for index in first):
        raise ValueError(f"{place} of a tensor of shape {shape} is not one stretch of rows")
    start = 0
    for axis, index in enumerate(first):
        assert isinstance(index, int)
        start += index * math.prod(shape[axis + 1 :])
    a, b, _ = rows.indices(shape[len(first)])
    size = math.prod(shape[len(first) + 1 :])
    return start + a * size, start + b * size
