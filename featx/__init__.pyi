"""The public names with their types, for type checkers and editors: `__init__.py` imports them when first used."""

from featx.backbones.request import BackboneRequest as BackboneRequest
from featx.classifier import load as load
from featx.errors import FeatxError as FeatxError
from featx.estimators import HeadClassifier as HeadClassifier
from featx.estimators import ImageFeatures as ImageFeatures
from featx.extraction.pipeline import extract as extract
from featx.finetuning.recipes import configure as configure
from featx.fitting import fit as fit
from featx.measuring.evaluation import evaluate as evaluate
from featx.pixels.preprocess import Preprocess as Preprocess
from featx.shipping.deployed import Model as Model
from featx.shipping.exporting import export as export
from featx.shipping.prediction import predict as predict
from featx.sources.source import Source as Source
from featx.sweeping import sweep as sweep

__version__: str
