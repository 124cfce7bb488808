"""Figures: what they show is what they were given, and nothing of matplotlib's own state changes."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featx.reporting import plots

HOSTILE = ["<script>alert(1)</script>", "a\"b'&c", "$x^2$", "caf\udce9"]


def texts(svg: str) -> list[str]:
    """The words of a drawing, read by an XML parser."""
    return [e.text or "" for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_a_confusion_matrix_shows_every_count_and_name():
    table = np.array([[63, 7, 1], [5, 78, 1_234]])
    shown = texts(plots.svg(plots.confusion(table, ["ants", "bees"], ["ants", "bees", "other"]), "c", "what"))
    assert [t for t in shown if t.replace(",", "").isdigit()] == ["63", "7", "1", "5", "78", "1,234"]
    assert shown.count("ants") == 2
    assert shown.count("other") == 1


@pytest.mark.parametrize("classes", [2, 20, 21, 61, 300])
def test_a_confusion_matrix_of_any_size_can_be_drawn(classes: int, tmp_path: Path):
    names = [f"class {i}" for i in range(classes)]
    figure = plots.confusion(np.eye(classes, dtype=int), names, names)
    drawn = texts(plots.svg(figure, "c", ""))
    assert drawn.count("class 0") == (2 if classes <= plots.LABELLED else 0)
    assert (drawn.count("1") >= classes) == (classes <= plots.NUMBERED)
    assert max(figure.get_size_inches()) < 16


def test_names_from_files_are_text_and_neither_markup_nor_formulas():
    drawing = plots.svg(plots.confusion(np.eye(4, dtype=int), HOSTILE, HOSTILE), "c", HOSTILE[0] + HOSTILE[1])
    shown = texts(drawing)
    assert "<script" not in drawing
    for name in HOSTILE[:3]:
        assert plots.short(name) in shown
    assert "caf\\udce9" in shown
    assert ElementTree.fromstring(drawing).get("aria-label") == HOSTILE[0] + HOSTILE[1]


def test_a_name_that_looks_like_an_attribute_is_shown_as_it_is():
    names = ['id="x"', "fill: #1f2328", 'href="#a', "url(#b)"]
    drawing = plots.svg(plots.confusion(np.eye(4, dtype=int), names, names), "confusion", "")
    assert [text for text in texts(drawing) if text in names] == names * 2
    assert "fill: var(--ink)" in drawing and 'id="confusion-' in drawing


def test_a_drawing_follows_the_pages_colours_and_has_ids_of_its_own():
    bins = [{"confidence": 0.9, "accuracy": 0.8, "count": 10}]
    first, second = (plots.svg(plots.reliability(bins), name, "") for name in ("first", "second"))
    assert "var(--ink)" in first or "var(--muted)" in first
    for colour in plots.THEME:
        assert colour not in first
    assert ("fill: #2f7de1" in first) or ("stroke: #2f7de1" in first)  # the page has no variable for it
    ids = [{e.get("id") for e in ElementTree.fromstring(s).iter() if e.get("id")} for s in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    used = {part.split(")")[0] for part in first.split("url(#")[1:]} | {
        p.split('"')[0] for p in first.split('href="#')[1:]
    }
    assert used
    assert used <= ids[0]


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path):
    for number in (1, 2):
        figure = plots.path([0.1, 1.0, 10.0], [0.5, 0.3, 0.4], 1.0, "strength")
        (tmp_path / f"{number}.svg").write_text(plots.svg(figure, "path", ""))
        plots.png(figure, tmp_path / f"{number}.png")
    assert (tmp_path / "1.svg").read_bytes() == (tmp_path / "2.svg").read_bytes()
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()


def test_drawing_leaves_matplotlib_as_it_was_and_never_imports_pyplot():
    code = (
        "import sys, matplotlib; before = dict(matplotlib.rcParams)\n"
        "from featx.reporting import plots\n"
        "plots.svg(plots.curves({'loss': {'training': [(1, .5), (2, .4)]}}), 'c', '')\n"
        "assert dict(matplotlib.rcParams) == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_map_greys_what_is_beyond_ten_groups_and_rings_mistakes():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(14), 5)
    faint, ringed = rng.random(70) < 0.5, np.zeros(70, bool)
    ringed[:3] = True
    figure = plots.feature_map(rng.normal(size=(70, 2)), group, [f"g{i}" for i in range(14)], faint, ringed)
    shown = texts(plots.svg(figure, "map", ""))
    assert [t for t in shown if t.startswith("g")] == [f"g{i}" for i in range(10)]
    assert "4 others" in shown
    assert "answered wrongly" in shown
    sizes = [len(c.get_offsets()) for c in figure.axes[0].collections]
    assert sum(sizes) == 70 + 3


def test_the_trade_off_leaves_out_what_was_not_measured():
    point = {"name": "a", "backbone": "r", "accuracy": 0.9, "low": 0.8, "high": 0.95}
    points = [
        {**point, "images_per_second": 100.0, "megabytes": None},
        {**point, "images_per_second": 100.0, "megabytes": 5.0},
    ]
    speed, size = plots.trade_off(points, winner=1).axes
    assert [len(speed.containers), len(size.containers)] == [2, 1]


def test_a_picture_grid_holds_the_pictures(tmp_path: Path):
    red = np.zeros((40, 60, 3), np.uint8)
    red[..., 0] = 255
    plots.png(plots.images([red] * 5, ["a"] * 5, [False] * 5), tmp_path / "grid.png", dpi=50)
    with Image.open(tmp_path / "grid.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert 0.2 < (pixels == [255, 0, 0]).all(axis=1).mean() < 0.7


def test_a_long_name_keeps_both_ends():
    assert plots.short("n02129165 lion, king of beasts, Panthera leo") == "n02129165 li…anthera leo"
    assert len(plots.short("x" * 100)) == 24
