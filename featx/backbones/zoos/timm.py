"""timm's networks: `timm/NAME` or `timm/NAME.TAG`, their preprocessing, licences and weights."""

from __future__ import annotations

import contextlib
import math
import os
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights

from featx.backbones.backbone import Backbone, Origin, build, is_affine, without
from featx.backbones.request import BackboneRequest
from featx.backbones.weights import Taken, first_line, load_state, read_state
from featx.errors import BackboneError, WeightsError
from featx.files import stat_row
from featx.pixels.preprocess import CROP_MODES, RESAMPLE, Preprocess
from featx.text import near


def load(request: BackboneRequest, name: str) -> Backbone:
    """Load a network by its timm name. Raises `BackboneError` and `WeightsError`."""
    timm, tagged = find(name)
    bare = name.partition(".")[0]
    config: Any = timm.get_pretrained_cfg(name)
    preprocess = request.override(preprocessing(name, config, dict(request.preprocess)))
    options: dict[str, Any] = {}
    if config.fixed_input_size and preprocess.crop != config.input_size[1]:
        options["img_size"] = preprocess.crop
    class_names = config.label_names or None
    if class_names is None and config.num_classes == 1000:  # timm's classifiers of this size are ImageNet-1k's
        class_names = ResNet18_Weights.DEFAULT.meta["categories"]

    files: dict[str, list[int]] | None = {}
    if request.weights == "pretrained":
        network, files = _pretrained(timm, name, config, options)
        note = f"pretrained {config.tag or 'default'}"
    elif request.weights == "random" or request.file:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.seed)
            network = timm.create_model(name, pretrained=False, **options)
        note = f"random, seed {request.seed}"
        if request.file:
            network, files, taken = _from_file(timm, name, network, request, options)
            note = f"local file {request.file.name}{taken.note}"
            class_names = class_names if taken.whole else None
            note += request.assumed(config.tag) if name == bare and config.tag else ""
    else:
        raise WeightsError(
            f"timm has no weights {request.weights!r}: it picks them by the name's tag, such as "
            f"{', '.join(f'timm/{t}' for t in tagged[:3]) or 'NAME.TAG'}; --weights takes pretrained, random or a file"
        )

    network.eval()
    head, cut = _head(network), _features_of(network)
    if head and not is_affine(network, cut, head, preprocess.crop):
        head = None
    class_names = tuple(class_names) if class_names else None
    origin = Origin(f"timm/{name}", preprocess, class_names, note, files, license=config.license or "")
    return build(request, origin, network, cut, head)


def find(name: str) -> tuple[Any, list[str]]:
    """timm itself, and the names of its weights for a network. Raises `BackboneError` for an unknown name."""
    try:
        import timm
    except ImportError as error:
        raise BackboneError(f"timm networks need the extra: pip install featx[timm] ({error})") from error
    bare = name.partition(".")[0]
    if not timm.is_model(bare):
        known = timm.list_models()
        raise BackboneError(f"timm has no network {bare!r}; timm.list_models() lists {len(known)}.{near(bare, known)}")
    tagged = timm.list_pretrained(f"{bare}.*")
    if name != bare and name not in tagged:
        raise BackboneError(
            f"timm has no weights {name!r}; there are {', '.join(tagged) or 'none'}.{near(name, tagged)}"
        )
    return timm, tagged


def preprocessing(name: str, config: Any, overrides: dict[str, Any]) -> Preprocess:
    """The evaluation transform of a `PretrainedCfg`: resize to crop / crop_pct, crop the centre.

    overrides: fields of `Preprocess` that the user sets; another `crop` keeps crop_pct.
    """
    channels, height, width = config.input_size
    if channels != 3 or height != width:
        raise BackboneError(f"timm/{name} takes {channels} x {height} x {width}; featx feeds square RGB")
    mode: Any = config.crop_mode or "center"
    if mode not in CROP_MODES:
        raise BackboneError(f"timm/{name} crops by {mode!r}; featx knows {', '.join(CROP_MODES)}")
    interpolation, crop = overrides.get("interpolation", config.interpolation), overrides.get("crop", height)
    crop = overrides.get("size", crop)
    crop = crop if isinstance(crop, int) else height  # the override will say what is wrong with it
    if interpolation not in RESAMPLE:
        raise BackboneError(
            f"timm/{name} resizes by {interpolation!r}; featx knows {', '.join(RESAMPLE)}: "
            "override `interpolation` to accept another"
        )

    resize = math.floor(crop / (config.crop_pct or 0.875))
    mode = "pad" if mode == "center" and crop > resize else mode
    return Preprocess(resize, crop, interpolation, tuple(config.mean), tuple(config.std), crop_mode=mode)


def _pre_logits(self: Any, pixels: Tensor) -> Tensor:
    rows: Tensor = self.forward_head(self.forward_features(pixels), pre_logits=True)
    return rows


def _features_of(network: nn.Module) -> nn.Module:
    """The network, its tensors shared, with a forward pass that stops before the classifier."""
    cut = without(network)
    # a class of its own and not an attribute: fx and export trace the class's forward
    cut.__class__ = type(f"{type(network).__name__}Features", (type(network),), {"forward": _pre_logits})
    return cut


def _head(network: Any) -> str | None:
    """The dotted name of the classifier, where it is one Linear."""
    classifier = network.get_classifier()
    if not isinstance(classifier, nn.Linear):
        return None
    return next((path for path, module in network.named_modules() if module is classifier), None)


def _pretrained(timm: Any, name: str, config: Any, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    """The network with timm's weights for it, and the `stat_row` of their file, where it can be found."""
    if not (config.hf_hub_id or config.url or config.file):
        raise WeightsError(f"timm has no weights for {name}; --weights takes random or a file")
    file = config.hf_hub_filename or "model.safetensors"
    try:
        network = timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # requests, httpx, OSError, RuntimeError: as the hub's version has it
        address = config.url
        if config.hf_hub_id:
            from huggingface_hub import hf_hub_url

            address = hf_hub_url(config.hf_hub_id, file)
        raise WeightsError(
            f"the weights file of timm/{name} could not be loaded ({first_line(error)}). Fetch {address} where there "
            "is a network and pass --weights FILE, or pass --weights random"
        ) from error

    files: dict[str, list[int]] | None = None
    with contextlib.suppress(Exception):  # without it the next run loads the network again
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(config.hf_hub_id, file)
        if isinstance(cached, str):
            files = {cached: list(stat_row(os.stat(cached)))}
    return network, files


def _from_file(
    timm: Any, name: str, network: nn.Module, request: BackboneRequest, options: dict[str, Any]
) -> tuple[nn.Module, dict[str, list[int]], Taken]:
    """Load a file as timm writes them, or else as its authors did, by timm's own converters."""
    assert request.file is not None
    found = read_state(request.file, request.part)
    try:
        return network, found.files, load_state(network, found, f"{request.file} as timm/{name}", _head(network))
    except WeightsError:
        with contextlib.suppress(Exception):  # the first error says what the file and the network hold
            overlay = {"state_dict": found.unwrapped(), "custom_load": False}
            made = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
            return made, found.files, Taken("", True)
        raise
