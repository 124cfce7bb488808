"""The backbone that the user wants (`BackboneRequest`), and what is known once it is loaded (`BackboneInfo`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from featx.errors import BackboneError
from featx.features import FeatureSpec
from featx.identity import Identity
from featx.options import Precision, StoredDtype, home
from featx.pixels.preprocess import Preprocess
from featx.records import convert
from featx.text import near


@dataclass(frozen=True)
class BackboneRequest:
    """What the user requested. Nothing here is checked before the network is loaded."""

    name: str
    """`resnet18`, `timm/vit_small_patch14_dinov2.lvd142m`, `package.module:factory`."""
    weights: str = "pretrained"
    """`pretrained`, an enum name (`IMAGENET1K_V2`), `random`, or the path of a .pth / .safetensors file."""
    layer: str = "features"
    """`features` (the input of the last Linear), `logits`, or a module's dotted name."""
    seed: int = 0
    """Seeds `random` weights."""
    preprocess: tuple[tuple[str, Any], ...] = ()
    """Fields of `Preprocess` to override, such as `(("resize", 232),)`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", str(home(self.weights)))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "preprocess": dict(self.preprocess)}

    @classmethod
    def from_dict(cls, values: Any) -> BackboneRequest:
        """Raises `ValueError`."""
        values = convert(values, dict[str, Any])
        given = convert(values.get("preprocess", {}), dict[str, Any]).items()
        pairs = tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in given)
        return convert({**values, "preprocess": pairs}, cls)

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

    def spec(
        self, *, view: str = "center", precision: Precision = "fp32", dtype: StoredDtype = "float32"
    ) -> FeatureSpec:
        """The identity of the features that this backbone gives."""
        return FeatureSpec(self.name, self.weights_digest, self.layer, self.preprocess, view, precision, dtype)
