"""Owns timm's networks: `timm/NAME` or `timm/NAME.TAG`, their preprocessing, licences and weights."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featx.backbones.backbone import Backbone, build, without
from featx.backbones.request import BackboneRequest
from featx.backbones.weights import is_file, load_state, read_state
from featx.errors import BackboneError, WeightsError
from featx.files import file_stats
from featx.pixels.preprocess import RESAMPLE, Preprocess
from featx.text import near


def load(request: BackboneRequest, name: str) -> Backbone:
    """Load a network by its timm name. Raises `BackboneError` and `WeightsError`."""
    timm = _timm()
    bare = name.partition(".")[0]
    if not timm.is_model(bare):
        known = timm.list_models()
        raise BackboneError(f"timm has no network {bare!r}; timm.list_models() lists {len(known)}.{near(bare, known)}")
    tagged = timm.list_pretrained(f"{bare}.*")
    if name != bare and name not in tagged:
        raise BackboneError(
            f"timm has no weights {name!r}; there are {', '.join(tagged) or 'none'}.{near(name, tagged)}"
        )
    config = timm.get_pretrained_cfg(name)
    preprocess = request.override(preprocessing(name, config, dict(request.preprocess)))
    options: dict[str, Any] = {}
    if config.fixed_input_size and preprocess.crop != config.input_size[1]:
        options["img_size"] = preprocess.crop
    files: dict[str, list[int]] | None = {}
    class_names = _class_names(config)
    if request.weights == "pretrained":
        network, files = _pretrained(timm, name, config, options)
        note = f"pretrained {config.tag or 'default'}"
    elif request.weights == "random" or is_file(request.weights):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.seed)
            network = timm.create_model(name, pretrained=False, **options)
        note = f"random, seed {request.seed}"
        if is_file(request.weights):
            network, files, remark = _from_file(timm, name, network, Path(request.weights), options)
            note = f"local file {Path(request.weights).name}"
            if remark:
                note, class_names = f"{note}, {remark}", None
    else:
        raise WeightsError(
            f"timm has no weights {request.weights!r}: it picks them by the name's tag, such as "
            f"{', '.join(f'timm/{t}' for t in tagged[:3]) or 'NAME.TAG'}; --weights takes pretrained, random or a file"
        )
    network.eval()
    head = _head(network)
    cut = _features_of(network)
    return build(
        request,
        network,
        name=f"timm/{name}",
        preprocess=preprocess,
        cut=cut,
        head=head if head and _affine(network, cut, head, preprocess.crop) else None,
        class_names=class_names,
        note=note,
        files=files,
        license=config.license or "",
    )


def preprocessing(name: str, config: Any, overrides: dict[str, Any]) -> Preprocess:
    """The evaluation transform of a `PretrainedCfg`: resize to crop / crop_pct, crop the centre.

    An overridden `interpolation` or `crop` is taken into account, the latter at the same crop_pct.
    """
    channels, height, width = config.input_size
    if channels != 3 or height != width:
        raise BackboneError(f"timm/{name} takes {channels} x {height} x {width}; featx feeds square RGB")
    if config.crop_mode not in (None, "center"):
        raise BackboneError(f"timm/{name} was trained with crop mode {config.crop_mode!r}; featx crops the centre only")
    interpolation, crop = overrides.get("interpolation", config.interpolation), overrides.get("crop", height)
    if interpolation not in RESAMPLE:
        raise BackboneError(
            f"timm/{name} resizes by {interpolation!r}; featx knows {', '.join(RESAMPLE)}: "
            "override `interpolation` to accept another"
        )
    return Preprocess(
        resize=math.floor(crop / (config.crop_pct or 0.875)),
        crop=crop,
        interpolation=interpolation,
        mean=tuple(config.mean),
        std=tuple(config.std),
    )


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise BackboneError(f"timm networks need the extra: pip install featx[timm] ({error})") from error
    return timm


def _pre_logits(self: Any, pixels: Tensor) -> Tensor:
    rows: Tensor = self.forward_head(self.forward_features(pixels), pre_logits=True)
    return rows


def _features_of(network: nn.Module) -> nn.Module:
    """The network, its tensors shared, with a forward pass that stops before the classifier."""
    cut = without(network)
    # a class of its own rather than an attribute: fx and export trace the class's forward
    cut.__class__ = type(f"{type(network).__name__}Features", (type(network),), {"forward": _pre_logits})
    return cut


def _head(network: Any) -> str | None:
    """The dotted name of the classifier, where it is one Linear."""
    classifier = network.get_classifier()
    if not isinstance(classifier, nn.Linear):
        return None
    return next((path for path, module in network.named_modules() if module is classifier), None)


def _affine(network: nn.Module, cut: nn.Module, head: str, crop: int) -> bool:
    """Whether the Linear at `head`, on the features, gives the network's logits: asked of the network itself."""
    noise = np.random.default_rng(0).standard_normal((2, 3, crop, crop)).astype(np.float32)
    with torch.inference_mode():
        logits, features = network(torch.from_numpy(noise)), cut(torch.from_numpy(noise))
        last = network.get_submodule(head)
        return features.ndim == 2 and torch.allclose(last(features), logits, rtol=1e-4, atol=1e-4)


def _class_names(config: Any) -> tuple[str, ...] | None:
    if config.label_names:
        return tuple(config.label_names)
    if config.num_classes == 1000:  # every timm classifier of this size is ImageNet-1k, in its order
        from torchvision.models import ResNet18_Weights

        return tuple(ResNet18_Weights.DEFAULT.meta["categories"])
    return None


def _pretrained(timm: Any, name: str, config: Any, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    """The network with timm's weights for it, and the file they came from, where that can be told."""
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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"the weights file of timm/{name} could not be loaded ({reason}). Fetch {address} where there is a "
            "network and pass --weights FILE, or pass --weights random"
        ) from error
    files: dict[str, list[int]] | None = None
    with contextlib.suppress(Exception):  # only costs the next run its head start
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(config.hf_hub_id, file)
        if isinstance(cached, str):
            files = {cached: file_stats(Path(cached))}
    return network, files


def _from_file(
    timm: Any, name: str, network: nn.Module, path: Path, options: dict[str, Any]
) -> tuple[nn.Module, dict[str, list[int]], str]:
    """Load a file as timm writes them, or else as its authors did, through timm's own converters."""
    state, files = read_state(path)
    try:
        return network, files, load_state(network, state, f"{path} as timm/{name}", _head(network))
    except WeightsError:
        with contextlib.suppress(Exception):  # the first error says what the file and the network hold
            overlay = {"state_dict": state, "custom_load": False}
            return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options), files, ""
        raise
