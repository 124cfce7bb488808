"""`Head`: the one affine map that every fitted head is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from featx import metrics
from featx.errors import HeadError
from featx.features import Rows
from featx.records import TENSOR_SEAL, convert, tensor_metadata
from featx.seals import escape, seal
from featx.state import ordinary
from featx.text import from_json

Activation = Literal["softmax", "sigmoid"]
BLOCK = 8192  # rows per slice of a table that is read by slices
MULTILABEL = 0.5
"""A sigmoid head answers with every class whose probability is at least this."""


def answers(probabilities: np.ndarray, activation: str) -> np.ndarray:
    """The classes that probabilities `[N, C]` answer with, `bool [N, C]`: with `softmax` the likeliest one, with
    `sigmoid` each of at least `MULTILABEL`.
    """
    if activation == "sigmoid":
        return np.asarray(probabilities >= MULTILABEL)
    return np.asarray(np.arange(probabilities.shape[1]) == probabilities.argmax(axis=1)[:, None])


@ordinary()
def probabilities(logits: np.ndarray, activation: Activation) -> np.ndarray:
    """Logits `[N, C]` -> probabilities `float32 [N, C]` in [0, 1]; softmax rows add up to 1."""
    z = np.asarray(logits, np.float64)
    if activation == "sigmoid":
        return np.asarray(0.5 * (1.0 + np.tanh(0.5 * z)), np.float32)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True), np.float32)


def right(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether logits `[N, C]` answer with the label, `int [N]`, or exactly the labels, 0/1 `[N, C]`: `bool [N]`."""
    if y.ndim == 2:
        return np.asarray((answers(probabilities(logits, "sigmoid"), "sigmoid") == (y > 0)).all(axis=1))
    return np.asarray(logits.argmax(axis=1) == y)


def columns(names: Sequence[str], known: Sequence[str]) -> np.ndarray:
    """`int64 [L]`: where each of L `names` stands among `known`, -1 for one that is not there."""
    place = {name: i for i, name in enumerate(known)}
    return np.array([place.get(name, -1) for name in names], np.int64)


@dataclass(frozen=True, eq=False)
class Head:
    """`logits = X @ weight.T + bias`; a scaler, a temperature and binary classes are folded in."""

    weight: np.ndarray
    """`float32 [C, D]`."""
    bias: np.ndarray
    """`float32 [C]`."""
    class_names: tuple[str, ...]
    """C names, in the order of the rows."""
    activation: Activation = "softmax"
    """`softmax` (one class per image) or `sigmoid` (any number of classes per image)."""
    threshold: float | None = None
    """An answer whose highest probability is below this is rejected; None accepts all. In [0, 1]."""

    def __post_init__(self) -> None:
        shape = (len(self.class_names), *self.weight.shape[1:2])
        if self.weight.ndim != 2 or self.weight.shape != shape or self.bias.shape != shape[:1]:
            raise HeadError(
                f"weight {list(self.weight.shape)} and bias {list(self.bias.shape)} do not map features "
                f"to {len(self.class_names)} classes"
            )
        if not self.class_names or len(set(self.class_names)) != len(self.class_names):
            raise HeadError("a head has one class or more, each with a name of its own")
        if self.activation not in get_args(Activation):
            raise HeadError(f"activation is softmax or sigmoid, not {self.activation!r}")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise HeadError(f"a threshold is a probability in [0, 1], not {self.threshold}")
        if not (np.isfinite(self.weight).all() and np.isfinite(self.bias).all()):
            raise HeadError("the head holds NaN or infinite weights; its fit did not converge")

    @ordinary()
    def __call__(self, X: Rows) -> np.ndarray:
        """Features `[N, D]`, an array or a table that is read by slices -> logits `float32 [N, C]`.

        Raises `HeadError` for another shape.
        """
        if len(X.shape) != 2 or X.shape[1] != self.weight.shape[1]:
            raise HeadError(f"expected features [N, {self.weight.shape[1]}], got {list(X.shape)}")
        if isinstance(X, np.ndarray):
            return np.asarray(np.asarray(X, np.float32) @ self.weight.T + self.bias)
        parts = [self(np.asarray(X[i : i + BLOCK])) for i in range(0, X.shape[0], BLOCK)]
        return np.concatenate([np.zeros((0, len(self.bias)), np.float32), *parts])

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Logits `[N, C]` -> probabilities `float32 [N, C]` in [0, 1]; softmax rows add up to 1."""
        return probabilities(logits, self.activation)

    def answers(self, probabilities: np.ndarray) -> np.ndarray:
        """The classes that probabilities `[N, C]` answer with, `bool [N, C]`: one per image, or any number with
        `sigmoid`.
        """
        return answers(probabilities, self.activation)

    def accuracy(self, X: Rows, y: np.ndarray, class_names: Sequence[str]) -> float:
        """The share, in [0, 1], of images whose label, or labels, are all answered. X: `[N, D]`; y: `int [N]`, or 0/1
        `[N, L]`, of L `class_names`.
        """
        logits, column = self(X), columns(class_names, self.class_names)
        if self.activation == "sigmoid":
            known = column >= 0
            return float(right(logits[:, column[known]], y[:, known]).mean())
        return float(right(logits, column[y]).mean())

    def aligned(self, logits: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
        """This head's logits `[N, C]` in columns for L `class_names`, `float64 [N, L]`.

        A class that the head does not know gets a logit below all others, of a probability of nearly 0.
        """
        column = columns(class_names, self.class_names)
        out = np.full((len(logits), len(class_names)), np.log(metrics.SMALLEST) + min(0.0, logits.min(initial=0.0)))
        out[:, column >= 0] = logits[:, column[column >= 0]]
        return out

    def to_bytes(self) -> bytes:
        """`head.safetensors`: `weight` and `bias`, with names, activation and threshold as metadata."""
        from safetensors.numpy import save

        metadata = TENSOR_SEAL | {
            "class_names": escape(json.dumps(list(self.class_names))),
            "activation": self.activation,
            "threshold": json.dumps(self.threshold),
        }
        tensors = {"weight": np.ascontiguousarray(self.weight), "bias": np.ascontiguousarray(self.bias)}
        return seal(save(tensors, metadata))

    @classmethod
    def from_bytes(cls, data: bytes) -> tuple[Head, bool]:
        """The head in `to_bytes`, and whether it carries a digest. Raises `ValueError`."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        metadata, sealed = tensor_metadata(data)
        try:
            values: dict[str, Any] = load(data) | {"activation": metadata["activation"]}
            values |= {name: from_json(metadata[name]) for name in ("class_names", "threshold")}
            kinds = {values[name].dtype for name in ("weight", "bias")}
        except (SafetensorError, KeyError, TypeError) as error:
            raise HeadError(f"it lacks {error}" if isinstance(error, KeyError) else str(error)) from error
        if kinds != {np.dtype(np.float32)}:
            raise HeadError(f"its weights are {', '.join(sorted(map(str, kinds)))}, not float32")
        return convert(values, cls), sealed


@dataclass(frozen=True, eq=False)
class Fitted:
    """A fitted head, and how the fit went."""

    head: Head
    info: dict[str, Any] = field(default_factory=dict)
    """JSON values: the strength chosen, cross-validated losses, whether the solver converged; the head's own keys."""
