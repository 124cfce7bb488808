"""Dataclasses whose JSON is hashed and kept: a field that is added to one later leaves every old digest as it is."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self, get_type_hints

from featx.errors import FeatxError, NewerError
from featx.records import convert

# The metadata of a field that was not there in version 1: `field(default=..., metadata=ADDED)`.
ADDED = {"added": True}


@dataclass(frozen=True)
class Identity:
    """To and from JSON. A field that was `ADDED` is left out at its default; all others are always there.

    JSON's lists become tuples, and the object of a field that is an `Identity` becomes one.
    """

    def to_dict(self) -> dict[str, Any]:
        kept = [f for f in fields(self) if "added" not in f.metadata or getattr(self, f.name) != f.default]
        values = {f.name: getattr(self, f.name) for f in kept}
        return {name: v.to_dict() if isinstance(v, Identity) else v for name, v in values.items()}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Raises `NewerError` for unknown fields, and `FeatxError` where fields are missing or of another type."""
        values = convert(values, dict[str, Any])
        first = {f.name for f in fields(cls) if "added" not in f.metadata}
        lacking, unknown = first - values.keys(), values.keys() - {f.name for f in fields(cls)}
        if lacking:
            raise FeatxError(f"{cls.__name__} lacks {', '.join(sorted(lacking))}")
        if unknown:
            raise NewerError(
                f"{cls.__name__} has fields that this featx does not know ({', '.join(sorted(unknown))}): "
                "it was written by a newer one; update featx to read it"
            )
        made = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        try:
            for name, kind in get_type_hints(cls).items():
                if name in made and isinstance(kind, type) and issubclass(kind, Identity):
                    made[name] = kind.from_dict(made[name])
            convert(made, cls)  # only to check: it would turn 0 into 0.0, which has another digest
        except NewerError:
            raise
        except ValueError as error:
            raise FeatxError(f"{cls.__name__}: {error}") from None
        return cls(**made)
