"""What a backbone is asked for (`BackboneRequest`) and known by (`BackboneInfo`), without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from featx.errors import BackboneError
from featx.features import FeatureSpec
from featx.options import Precision, StoredDtype
from featx.pixels.preprocess import Preprocess
from featx.text import near


@dataclass(frozen=True)
class BackboneRequest:
    """What the user asked for. Nothing here is checked before the network is loaded."""

    name: str
    """`resnet18`, `timm/vit_small_patch14_dinov2.lvd142m`, `package.module:factory`."""
    weights: str = "pretrained"
    """`pretrained`, an enum name (`IMAGENET1K_V2`), `random`, or the path of a .pth / .safetensors file."""
    layer: str = "features"
    """`features` (the input of the last Linear), `logits`, or a module's dotted name."""
    seed: int = 0
    """Of `random` weights."""
    preprocess: tuple[tuple[str, Any], ...] = ()
    """Fields of `Preprocess` to override, such as `(("resize", 232),)`."""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "preprocess": dict(self.preprocess)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BackboneRequest:
        overrides = tuple((k, _tuple(v)) for k, v in dict(values.get("preprocess", {})).items())
        return cls(**{**values, "preprocess": overrides})

    def override(self, preprocess: Preprocess) -> Preprocess:
        """`preprocess` with the request's own fields. Raises `BackboneError` for an unknown field."""
        known = [field.name for field in fields(Preprocess)]
        for name, _ in self.preprocess:
            if name not in known:
                raise BackboneError(
                    f"unknown preprocessing field {name!r}; there are {', '.join(known)}.{near(name, known)}"
                )
        return Preprocess.from_dict({**preprocess.to_dict(), **dict(self.preprocess)})


@dataclass(frozen=True)
class BackboneInfo:
    """All that is known about a loaded backbone without loading it again."""

    name: str
    """`torchvision/resnet18`, `timm/...`, `custom/package.module:factory`."""
    weights_digest: str
    """`tensors_digest` of the network's state, in hex; a custom factory's source is hashed with it."""
    layer: str
    """As in the request."""
    preprocess: Preprocess
    row_shape: tuple[int, ...]
    """Of one image's row: `(D,)`."""
    class_names: tuple[str, ...] | None
    """Of the network's own classifier, in its order; None where they are not known."""
    affine: bool
    """The network's own classifier is one Linear on `features`, whatever `layer` is."""
    parameters: int
    """Of the whole network, its classifier included."""
    weights_note: str
    """For people: `pretrained IMAGENET1K_V1`, `random, seed 0`, `local file squeezenet.pth`."""
    license: str = ""
    """Of the weights, where their publisher says so."""

    def spec(
        self, *, view: str = "center", precision: Precision = "fp32", dtype: StoredDtype = "float32"
    ) -> FeatureSpec:
        """The identity of the features that this backbone gives."""
        return FeatureSpec(
            backbone=self.name,
            weights=self.weights_digest,
            layer=self.layer,
            preprocess=self.preprocess,
            view=view,
            precision=precision,
            dtype=dtype,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BackboneInfo:
        names = values["class_names"]
        return cls(
            **{
                **values,
                "preprocess": Preprocess.from_dict(values["preprocess"]),
                "row_shape": tuple(values["row_shape"]),
                "class_names": None if names is None else tuple(names),
            }
        )


def tensors_digest(tensors: Mapping[str, Any]) -> str:
    """SHA-256, in hex, over the sorted names, dtypes, shapes and bytes (little-endian) of torch or numpy tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(json.dumps([name, dtype, list(tensor.shape)]).encode())
        if hasattr(tensor, "detach"):
            import torch  # imported already, by whoever made the tensor

            flat = tensor.detach().cpu().contiguous().reshape(-1)
            data = flat.view(torch.uint8).numpy()
        else:
            data = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        digest.update(data)
    return digest.hexdigest()


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
