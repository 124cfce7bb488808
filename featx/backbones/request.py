"""The backbone that the user wants (`BackboneRequest`), and what is known once it is loaded (`BackboneInfo`)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from featx.errors import BackboneError
from featx.features import FeatureSpec
from featx.identity import Identity
from featx.options import Preprocessing, fields_of, home, plain
from featx.pixels.preprocess import Preprocess
from featx.records import convert
from featx.text import near

MISSING = "the weights file {} is not there; --weights FILE (weights= in Python) says where it is now"
ASSUMED = ", preprocessed as "
"""In a note on local weights: whose preprocessing they are given, as it is not known which they were trained with."""
SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".pth.tar", ".index.json")


@dataclass(frozen=True)
class BackboneRequest:
    """What the user requested. Nothing here is checked before the network is loaded."""

    name: str
    """`resnet18`, `timm/vit_small_patch14_dinov2.lvd142m`, `package.module:factory`."""
    weights: str = "pretrained"
    """`pretrained`, an enum name (`IMAGENET1K_V2`), `random`, or a file: .pth, .safetensors and the like, one of its
    shards, an `*.index.json`, or a folder with these. After `#` comes the part to take: `best.pth#state_dict_ema`."""
    layer: str = "features"
    """`features` (the input of the last Linear), `logits`, or a module's dotted name."""
    seed: int = 0
    """Seeds `random` weights."""
    preprocess: tuple[tuple[str, Any], ...] = ()
    """Fields of `Preprocess` to override, such as `(("resize", 232),)`; also `size`, the crop with a resize in
    proportion, and `crop_pct`, the crop as a share of the resize. A dict will do, and numpy's numbers."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            given = type(self.name).__name__
            raise BackboneError(f"a backbone goes by its name, or package.module:factory, not as {given}")
        pairs = [(name, plain(value)) for name, value in dict(self.preprocess).items()]
        pairs = [(name, tuple(value) if isinstance(value, list) else value) for name, value in pairs]
        object.__setattr__(self, "preprocess", tuple(pairs))
        object.__setattr__(self, "weights", str(home(self.weights)))

    @property
    def file(self) -> Path | None:
        """The file or folder of local weights, which may be missing; None for published and random ones."""
        place = self.weights[: len(self.weights) - len(self.part) - 1] if self.part else self.weights
        local = place.endswith(SUFFIXES) or "/" in place or "\\" in place or os.path.exists(place)
        return Path(place) if local and place not in ("pretrained", "random") else None

    @property
    def part(self) -> str:
        """The part of the file to take; empty for all of it, or the one that featx takes by itself."""
        return "" if os.path.exists(self.weights) else self.weights.rpartition("#")[2] * ("#" in self.weights)

    def assumed(self, weights: str) -> str:
        """For a note on local weights: that these published ones' preprocessing is assumed; empty where it is said."""
        return "" if {name for name, _ in self.preprocess} - {"pixels"} else f"{ASSUMED}{weights}"

    def at(self, file: str | Path) -> BackboneRequest:
        """The same with its weights in another file; a part named there counts instead of this one's."""
        moved = replace(self, weights=os.fspath(file))
        return moved if moved.part or not self.part else replace(self, weights=f"{file}#{self.part}")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "preprocess": dict(self.preprocess)}

    @classmethod
    def from_dict(cls, values: Any) -> BackboneRequest:
        """Raises `ValueError`."""
        values = convert(values, dict[str, Any])
        given = convert(values.get("preprocess", {}), dict[str, Any]).items()
        return convert({**values, "preprocess": tuple(given)}, cls)

    def override(self, preprocess: Preprocess) -> Preprocess:
        """`preprocess` with the request's own fields. Raises `FeatxError` for an unknown field or a wrong value."""
        known = [*(field.name for field in fields(Preprocess)), "size", "crop_pct"]
        for name, _ in self.preprocess:
            if name not in known:
                raise BackboneError(
                    f"unknown preprocessing field {name!r}; there are {', '.join(known)}.{near(name, known)}"
                )
        given = dict(self.preprocess)
        for name, other in (("size", "crop"), ("crop_pct", "resize")):
            if name in given and other in given:
                raise BackboneError(f"{name} decides the {other}: give one of them")
            fields_of(Preprocessing)[name].check(given.get(name))
        size, share = given.pop("size", None), given.pop("crop_pct", None)
        crop = given.get("crop", preprocess.crop) if size is None else size
        if share is not None:
            given["resize"] = math.floor(crop / share)
        elif size is not None:
            given.setdefault("resize", crop * preprocess.resize // preprocess.crop)
        return Preprocess.from_dict({**preprocess.to_dict(), "crop": crop, **given})


def preprocessing(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of preprocessing that are given, for `BackboneRequest.preprocess`. Raises `BackboneError`."""
    given = {name: plain(options[name]) for name in fields_of(Preprocessing) if options.get(name) is not None}
    for name in given.keys() & {"mean", "std"}:
        value = list(given[name]) if isinstance(given[name], list | tuple) else [given[name]]
        value *= 3 if len(value) == 1 else 1
        if len(value) != 3 or not all(isinstance(v, int | float) and 0 <= v <= 1 for v in value):
            raise BackboneError(
                f"{name} is three numbers from 0 to 1, of red, green and blue, or one for all; got {given[name]!r}. "
                "Divide by 255 what is meant for 0 to 255"
            )
        given[name] = tuple(map(float, value))
    return given


@dataclass(frozen=True)
class BackboneInfo(Identity):
    """All that is known about a loaded backbone without loading it again."""

    name: str
    """`torchvision/resnet18`, `timm/...`, `custom/package.module:factory`."""
    weights_digest: str
    """`tensors_digest` of the network's state, in hex; a custom factory's source is hashed with it."""
    layer: str
    """As in the request."""
    preprocess: Preprocess
    row_shape: tuple[int, ...]
    """The shape of one image's row: `(D,)`."""
    class_names: tuple[str, ...] | None
    """The classes of the network's own classifier, in its order; None where they are not known."""
    affine: bool
    """The network's own classifier is one Linear on `features`, whatever `layer` is."""
    parameters: int
    """How many the whole network has, its classifier included."""
    weights_note: str
    """For people: `pretrained IMAGENET1K_V1`, `random, seed 0`, `local file squeezenet.pth`."""
    license: str = ""
    """The weights' licence, where their publisher states one."""

    def spec(self, **computed: Any) -> FeatureSpec:
        """The identity of the features that this backbone gives. computed: the other fields of `FeatureSpec`."""
        return FeatureSpec(self.name, self.weights_digest, self.layer, self.preprocess, **computed)
