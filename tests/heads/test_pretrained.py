"""The network's own classifier: labels found among its classes, all of its logits kept."""

from __future__ import annotations

import numpy as np
import pytest

from featx.errors import HeadError
from featx.head import Head
from featx.heads import pretrained

NAMES = ["ant", "bee", "elephant", "Indian elephant", "tench, Tinca tinca", "house-finch", "Butterfly", "glass"]
RNG = np.random.default_rng(0)
WEIGHT, BIAS = RNG.normal(size=(8, 5)).astype(np.float32), RNG.normal(size=8).astype(np.float32)
NETWORK = Head(WEIGHT, BIAS, tuple(NAMES))


def logits_of(names: list[str]) -> Head:
    """What a network's classifier is over its own logits."""
    return Head(np.eye(len(names), dtype=np.float32), np.zeros(len(names), np.float32), tuple(names))


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("ant", "ant"),
        ("ants", "ant"),
        ("Bees", "bee"),
        ("House_Finches", "house-finch"),
        ("butterflies", "Butterfly"),
        ("tinca tinca", "tench, Tinca tinca"),
        ("elephants", "elephant"),
        ("indian_elephant", "Indian elephant"),
        ("glass", "glass"),
    ],
)
def test_a_label_finds_its_class(label: str, expected: str) -> None:
    assert NAMES[pretrained.match(label, NAMES)] == expected


def test_all_logits_are_kept_and_mapped_rows_take_the_labels_names() -> None:
    fitted = pretrained.fit(NETWORK, ["ants", "bees"])
    assert fitted.head.class_names == ("ants", "bees", *NAMES[2:])
    X = RNG.normal(size=(4, 5)).astype(np.float32)
    assert fitted.head(X) == pytest.approx(X @ WEIGHT.T + BIAS, abs=1e-6)
    assert fitted.info["classes"] == {"ants": "ant", "bees": "bee"}


def test_restricted_it_keeps_the_labels_classes_in_their_order() -> None:
    head = pretrained.fit(NETWORK, ["bees", "ants"], restrict=True).head
    assert head.class_names == ("bees", "ants")
    assert (head.weight == WEIGHT[[1, 0]]).all() and (head.bias == BIAS[[1, 0]]).all()


def test_cached_logits_pass_through_unchanged() -> None:
    logits = RNG.normal(size=(6, 8)).astype(np.float32)
    assert (pretrained.fit(logits_of(NAMES), ["ant"]).head(logits) == logits).all()
    head = pretrained.fit(logits_of(NAMES), ["bees", "ants"], restrict=True).head
    assert (head(logits) == logits[:, [1, 0]]).all()


def test_an_ambiguous_label_lists_its_candidates_and_a_mapping_decides() -> None:
    names = ["crane", "Crane", "maillot"]
    assert pretrained.match("crane", names) == 0
    with pytest.raises(HeadError, match=r"'crane' \(0\), 'Crane' \(1\).*cranes=0"):
        pretrained.match("cranes", names)
    head = pretrained.fit(logits_of(names), ["cranes"], mapping={"cranes": 1}).head
    assert head.class_names == ("crane", "cranes", "maillot")
    by_name = pretrained.fit(logits_of(names), ["birds"], mapping={"birds": "Crane"}).head
    assert by_name.class_names == ("crane", "birds", "maillot")


def test_another_class_with_a_labels_name_is_not_mistaken_for_it() -> None:
    head = pretrained.fit(logits_of(["crane", "machine"]), ["crane"], mapping={"crane": "machine"}).head
    assert head.class_names == ("crane (0)", "crane")


@pytest.mark.parametrize(
    ("labels", "mapping", "says"),
    [
        (["unicorn"], {}, "'unicorn' matches none of the network's 8 classes"),
        (["Asian elephants"], {}, "elephant"),
        (["ant", "ants"], {}, "'ant' and 'ants' both match"),
        (["ant"], {"bug": "bee"}, "'bug', which is not a label"),
        (["ant"], {"ant": 99}, "numbered 0 to 7"),
        ([], {}, "no label"),
    ],
)
def test_what_cannot_be_matched_is_named(labels: list[str], mapping: dict[str, str | int], says: str) -> None:
    with pytest.raises(HeadError, match=says):
        pretrained.fit(NETWORK, labels, mapping=mapping)
