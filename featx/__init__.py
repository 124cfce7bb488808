"""Extract once. Retrain heads in milliseconds. Ship one ONNX file that behaves like what was measured."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

__version__ = "0.1.0"

# onnxruntime writes a device id into the home folder and reports to its maker, unless this is there at its first import
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
if "onnxruntime" in sys.modules:  # imported before featx: the id is written, what else it reports can be stopped
    sys.modules["onnxruntime"].disable_telemetry_events()


def _after_fork() -> None:
    if {"torch", "featx.state"} & set(sys.modules):
        importlib.import_module("featx.state").after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

# name -> module; imported when first used, so that `import featx` loads no torch, h5py or scikit-learn
_PUBLIC = {
    "BackboneRequest": "backbones.request",
    "FeatxError": "errors",
    "HeadClassifier": "estimators",
    "ImageFeatures": "estimators",
    "Model": "shipping.deployed",
    "Preprocess": "pixels.preprocess",
    "Source": "sources.source",
    "configure": "finetuning.recipes",
    "evaluate": "measuring.evaluation",
    "export": "shipping.exporting",
    "extract": "extraction.pipeline",
    "fit": "fitting",
    "load": "classifier",
    "predict": "shipping.prediction",
    "sweep": "sweeping",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'featx' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"featx.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
