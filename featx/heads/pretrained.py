"""The network's own classifier as a head: its classes matched to the data's labels, nothing trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources

from featx.errors import HeadError
from featx.head import Fitted, Head
from featx.text import near

LEARNS = STREAMS = False


def fit(
    classifier: Head,
    class_names: Sequence[str],
    *,
    seed: int = 0,
    device: str = "auto",
    mapping: Mapping[str, str | int] | None = None,
    restrict: bool = False,
) -> Fitted:
    """The network's classifier, with the class of each label renamed to that label.

    classifier: where other heads are given examples, this one is given the network's last Linear, with its K
    classes; over cached logits (`layer=logits`) the identity. class_names: the data's labels.
    mapping: label -> network class (a name or its number), for labels that do not match by themselves.
    All K logits are kept, so that an answer may be a class without a label; with `restrict` only those of the
    labels are kept, in the order of `class_names`.
    `info["classes"]` maps each label to the network's class. seed, device: unused. Raises `HeadError` for a label
    that matches no class or several (candidates are listed), and for two labels that match one.
    """
    names, labels = list(classifier.class_names), class_names
    weight, bias = classifier.weight, classifier.bias
    index = matched(labels, names, mapping)
    taken = {i: label for label, i in index.items()}

    if restrict:
        rows = [index[label] for label in labels]
        head = Head(weight[rows], bias[rows], tuple(labels))
    else:
        # a class that happens to be called like a label, but is another, or is there twice, gets its number
        counts = {name: names.count(name) for name in names}
        renamed = (
            taken.get(i, name if counts[name] == 1 and name not in index else f"{name} ({i})")
            for i, name in enumerate(names)
        )
        head = Head(weight, bias, tuple(renamed))
    classes = {label: names[index[label]] for label in labels}
    return Fitted(head, {"classes": classes, "restrict": restrict, "notes": []})


def matched(
    labels: Sequence[str], names: Sequence[str], mapping: Mapping[str, str | int] | None = None
) -> dict[str, int]:
    """The number of the network's class that each label names; `mapping` as for `fit`. Raises `HeadError` as `fit`."""
    if not labels:
        raise HeadError("there is no label to match with the network's classes")
    mapping = dict(mapping or {})
    if unknown := [label for label in mapping if label not in labels]:
        raise HeadError(f"the mapping names {unknown[0]!r}, which is not a label here.{near(unknown[0], labels)}")
    index = {label: _named(label, mapping[label], names) for label in mapping}
    index |= {label: match(label, names) for label in labels if label not in mapping}

    taken: dict[int, str] = {}
    for label, i in index.items():
        if i in taken:
            raise HeadError(
                f"labels {taken[i]!r} and {label!r} both match the network's class {names[i]!r} ({i}); "
                "say with a mapping which is which"
            )
        taken[i] = label
    return index


def match(label: str, names: Sequence[str]) -> int:
    """The number of the one class that `label` names: exactly, else ignoring case, `_` and `-`, else also
    ignoring a plural; ImageNet's classes by their WordNet ids, too, such as n01440764. Raises `HeadError` with
    candidates where there is none, or more than one.
    """
    if len(names) == 1000 and _synonyms(names[0])[0] == "tench" and label in (ids := _wordnet()):
        return ids.index(label)
    for form in (str, _plain, _stem):
        found = [i for i, name in enumerate(names) if form(label) in map(form, _synonyms(name))]
        if len(found) == 1:
            return found[0]
        if found:
            listed = ", ".join(f"{names[i]!r} ({i})" for i in found)
            raise HeadError(
                f"label {label!r} could be any of the network's classes {listed}; choose with a mapping, "
                f"such as {label}={found[0]}"
            )

    word = _stem(label)
    holding = [name for name in names if word in map(_stem, _plain(name).split())]
    hint = f" Did you mean {', '.join(holding[:5])}?" if holding else near(_plain(label), names)
    raise HeadError(
        f"label {label!r} matches none of the network's {len(names)} classes.{hint} "
        f"Name one with a mapping, such as {label}=CLASS"
    )


def _named(label: str, wanted: str | int, names: Sequence[str]) -> int:
    number = int(wanted) if isinstance(wanted, int) or str(wanted).isdecimal() else None
    if number is None:
        try:
            return match(str(wanted), names)
        except HeadError:
            raise HeadError(
                f"{label}={wanted}: none of the network's {len(names)} classes is called {wanted!r}, or several are; "
                f"give its number.{near(str(wanted), names)}"
            ) from None
    if not 0 <= number < len(names):
        raise HeadError(f"{label}={number}: the network's classes are numbered 0 to {len(names) - 1}")
    return number


def _wordnet() -> list[str]:
    """The WordNet ids of ImageNet-1k's classes, in the order of networks' outputs: the sorted ids, 1,000."""
    return resources.files(__package__).joinpath("wordnet.txt").read_text("utf-8").split()


def _synonyms(name: str) -> list[str]:
    """The name, and the parts of one such as `tench, Tinca tinca`."""
    return [name, *(part.strip() for part in name.split(","))]


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())


def _stem(name: str) -> str:
    """The plain name with its last word in the singular, as far as English spelling tells."""
    word = _plain(name)
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes", "zes")):
        return word[:-2]
    if word.endswith("s") and not word.endswith("ss") and len(word) > 2:
        return word[:-1]
    return word
