"""Every error that featx raises on purpose: what was given, what was expected, what to do."""

from __future__ import annotations


class FeatxError(ValueError):
    """The base of all of them; the command line prints its text and exits with 1."""


class FeatxWarning(UserWarning):
    """What does not end a command and the user should know; the command line prints it as a note."""


class SourceError(FeatxError):
    """A data set that cannot be listed: a missing folder, a manifest without its columns."""


class ImageError(FeatxError):
    """One image that cannot be used. A run counts it, names it, skips it and goes on."""


class BackboneError(FeatxError):
    """An unknown backbone, layer or factory."""


class WeightsError(BackboneError):
    """Weights that are missing, or are another network's."""


class StoreError(FeatxError):
    """A feature cache that cannot be read or written as asked."""


class DamageError(StoreError):
    """Bytes in a cache that differ from those committed, or that featx would never have committed."""


class NewerError(FeatxError):
    """A newer featx's data, with fields that this one does not know: not damaged, but not readable here."""


class HeadError(FeatxError):
    """A head that cannot be fitted or read: one class, NaN features, an unknown setting."""


class TrainingError(FeatxError):
    """Fine-tuning that cannot start as asked or cannot go on: a loss that is NaN, a full disk, no memory."""


class RunError(FeatxError):
    """A run folder that is missing, unfinished, or would be overwritten."""


class ExportError(FeatxError):
    """An ONNX file that could not be made, or is not what was measured."""


class UnexportableError(ExportError):
    """A network that no exporter of the installed torch supports: trying again gives the same error."""


class ParityError(ExportError):
    """An exported file that answers differently from the classifier it came from."""
