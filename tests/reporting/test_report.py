"""The page that people look at: whole, self-contained, safe with any name, and true to report.json."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ColourEngine
from jinja2 import UndefinedError
from PIL import Image

from featx.errors import FeatxError, RunError
from featx.extraction.pipeline import extract
from featx.fitting import fit
from featx.records import write_record
from featx.reporting import gallery, page
from featx.reporting.report import write_report
from featx.runs import Run, open_run, own_folder, write_config

ANTS = "<script>alert(1)<!--"
BEES = "b&\"es'"
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """A report as an HTML parser sees it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def headings(self) -> list[str]:
        return re.findall(r"<h2>(.*?)</h2>", self.text)

    def pictures(self) -> list[np.ndarray]:
        found = [a["src"] for t, a in self.tags if t == "img"]
        data = [base64.b64decode(src.removeprefix("data:image/jpeg;base64,"), validate=True) for src in found]
        return [np.asarray(Image.open(io.BytesIO(d)).convert("RGB")) for d in data]


def photographs(root: Path) -> Path:
    """Two classes with hostile names, in train/ and val/; every fifth image carries the other class's colours."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 10)):
        for number, name in enumerate((ANTS.replace("/", ""), BEES)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                low = 120 * (number if i % 5 else 1 - number)
                pixels = rng.integers(low, low + 120, (40, 60, 3), dtype=np.uint8)
                exif = Image.Exif()
                exif[0x0112] = 6  # the camera was held upright
                Image.fromarray(pixels).save(folder / f'x" onerror="alert({i}).jpg', exif=exif)
    return root


@pytest.fixture
def run(tmp_path: Path, everywhere: ColourEngine) -> Run:
    data = photographs(tmp_path / "insects")
    return fit(data, "colours", cache=tmp_path / "cache", output=tmp_path / "run")


WRITTEN: list[Page] = []


@pytest.fixture
def seen(run: Run) -> Page:
    """The run's page, drawn once for all tests: it depends on nothing that differs between them."""
    if not WRITTEN:
        WRITTEN.append(Page(write_report(run.path)))
    return WRITTEN[0]


def test_the_page_is_whole_and_holds_all_it_shows(run: Run, seen: Page):
    assert not seen.open
    wanted = {"Confusion matrix", "Reliability", "Per class", "Most confident mistakes", "Predictions"}
    wanted |= {"A training batch", "Map of the features", "Choice of the regularisation", "Extraction", "Configuration"}
    assert wanted <= set(seen.headings)
    assert len(seen.pictures()) == len(run.report["mistakes"]) + 8 + 8
    for tag, attributes in seen.tags:
        assert tag not in ("script", "iframe", "object", "embed", "form", "base")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", seen.text)
    assert "@import" not in seen.text


def test_names_are_shown_as_they_are(seen: Page):
    words = " ".join(seen.words)
    assert ANTS in words
    assert BEES in words
    assert 'val/<script>alert(1)<!--/x" onerror="alert(' in words
    assert re.search(rf"answered {re.escape(ANTS)} \(\d+\.\d%\), labelled {re.escape(BEES)}", " ".join(words.split()))


def test_the_numbers_are_those_of_the_report(run: Run, seen: Page):
    report = run.report
    words = " ".join(" ".join(seen.words).split())
    right = round(report["accuracy"] * report["count"])
    limits = report["intervals"]["accuracy"]
    assert 0 < right < 20
    assert f"{right} of 20 validation images answered correctly: {report['accuracy']:.1%}" in words
    assert f"{limits['low']:.1%} to {limits['high']:.1%}" in words
    assert f"{report['log_loss']:.3f}" in words
    for row in report["per_class"]:
        assert f"{row['precision']:.3f}" in words
        assert f"{row['recall']:.3f}" in words


def test_no_folder_of_this_machine_is_in_it(run: Run, tmp_path: Path):
    config, report = run.config, run.report
    request = replace(config.request, weights=str(tmp_path / "weights" / "mine.pth"))
    backbone = replace(config.backbone, weights_note=f"local file {tmp_path}/weights/mine.pth")
    report["extract"]["notes"] = [f"something about {tmp_path}/insects/train"]
    report["notes"] = [f"{tmp_path}/cache is full"]
    write_config(run.path, replace(config, request=request, backbone=backbone))
    write_record(run.path / "report.json", report)
    text = write_report(run.path, layout="pca").read_text()
    assert str(tmp_path) not in text
    assert "something about insects/train" in text
    assert "local file mine.pth" in text or "local file weights/mine.pth" in text


def test_the_same_run_gives_the_same_page(run: Run):
    first = write_report(run.path).read_bytes()
    assert write_report(run.path).read_bytes() == first


def test_a_report_makes_no_forward_pass_and_finds_the_features_the_run_had(run: Run, everywhere: ColourEngine):
    before = everywhere.images
    material = gallery.gather(open_run(run.path))
    assert everywhere.images == before
    assert material.missing == []
    wanted = extract(run.config.data, "colours", cache=run.config.cache)
    assert gallery.gather(run, wanted).features is wanted
    assert material.features is not None
    assert material.features.ids == wanted.ids
    np.testing.assert_array_equal(material.features.X, wanted.X)


def test_mistakes_are_shown_upright(run: Run, seen: Page):
    material = gallery.gather(run)
    picture = material.picture(run.report["mistakes"][0]["id"])
    assert picture is not None
    assert picture.size == (40, 60)
    shapes = {p.shape for p in seen.pictures()}
    assert shapes == {(60, 40, 3), (32, 32, 3)}


def test_plots_are_png_files_and_those_of_a_former_report_go(run: Run):
    (run.path / "plots" / "path.svg").mkdir(parents=True)
    (run.path / "plots" / "curves.png").write_bytes(b"old")
    mine = {"holiday.png", "learning.jpg", "trade-off.png", "my-figure.txt"}
    for name in mine:
        (run.path / "plots" / name).write_bytes(b"mine")
    write_report(run.path, layout="pca")
    assert {(run.path / "plots" / name).read_bytes() for name in mine} == {b"mine"}
    (run.path / "plots" / "path.svg").rmdir()
    for name in mine:
        (run.path / "plots" / name).unlink()
    names = {p.stem for p in (run.path / "plots").iterdir()}
    assert names == {"batch", "confusion", "map", "mistakes", "path", "predictions", "reliability"}
    for path in (run.path / "plots").iterdir():
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert np.asarray(image.convert("L")).std() > 5


@pytest.mark.parametrize("name", ["plots", "checkpoints"])
def test_a_folder_that_is_a_link_is_not_written_through(run: Run, tmp_path: Path, name: str):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "holiday.png").write_bytes(b"mine")
    (run.path / name).symlink_to(tmp_path / "pictures")
    with pytest.raises(RunError, match=f"{name} is a link.*remove it"):
        write_report(run.path) if name == "plots" else own_folder(run.path, name)
    assert os.listdir(tmp_path / "pictures") == ["holiday.png"]


def test_what_is_gone_is_said(run: Run, tmp_path: Path):
    (tmp_path / "insects" / "val" / BEES / 'x" onerror="alert(1).jpg').unlink()
    assert "The data have changed since the run" in write_report(run.path, layout="pca").read_text()
    shutil.rmtree(tmp_path / "cache")
    assert "The cache does not hold" in write_report(run.path, layout="pca").read_text()
    shutil.rmtree(tmp_path / "insects")
    text = write_report(run.path, layout="pca").read_text()
    assert "The photographs are not where they were" in text
    assert text.count("not readable any more") == len(run.report["mistakes"])
    assert "Confusion matrix" in text


def test_an_unfinished_run_has_no_report(run: Run):
    (run.path / "report.json").unlink()
    with pytest.raises(RunError, match="unfinished"):
        write_report(run.path, layout="pca")


def test_an_unknown_layout_is_refused(run: Run):
    with pytest.raises(FeatxError, match="tsne or pca"):
        write_report(run.path, layout="umap")


def test_several_labels_per_image(tmp_path: Path, everywhere: ColourEngine):
    rng = np.random.default_rng(0)
    lines = ["path,label,split"]
    for i in range(48):
        dark, wide = i % 2, i // 2 % 2
        pixels = rng.integers(0, 100 + 150 * dark, (40, 40 + 30 * wide, 3), dtype=np.uint8)
        pixels[..., 0] //= 1 + 3 * wide
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        label = "|".join(name for name, there in (("dark", dark), ("wide", wide)) if there) or "|"
        lines.append(f"{i}.png,{label},{'val' if i % 3 == 0 else 'train'}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    run = fit(tmp_path / "list.csv", "colours", cache=tmp_path / "cache", output=tmp_path / "run")
    seen = Page(write_report(run.path, layout="pca"))
    assert {"Per class", "Predictions", "Map of the features"} <= set(seen.headings)
    assert "Confusion matrix" not in seen.headings
    assert "Mean average precision" in seen.words
    assert "dark, wide" in " ".join(seen.words)


def test_without_validation_images_it_says_so(run: Run):
    report = run.report
    kept = {k: report[k] for k in ("fit", "extract", "train_accuracy")}
    write_record(run.path / "report.json", {"accuracy": None, "count": 0, "split": "val", "notes": [], **kept})
    assert "nothing was measured" in write_report(run.path, layout="pca").read_text()


def test_training_curves_are_drawn_from_the_metrics_of_each_epoch(run: Run):
    rows: list[dict[str, Any]] = [{"epoch": 0, "held_loss": 0.7, "held_accuracy": 0.5}]
    rows += [{"epoch": e, "loss": 1 / e, "accuracy": 0.9, "lr": {"stem": 1e-4, "head": 1e-3}} for e in (1, 2, 3)]
    run.report["fit"]["finetune"] = {"epochs": rows}
    write_record(run.path / "report.json", run.report)
    seen = Page(write_report(run.path, layout="pca"))
    assert "Training curves" in seen.headings
    assert {"held out", "training", "stem", "learning rate"} <= set(seen.words)
    assert (run.path / "plots" / "curves.png").is_file()


def test_the_projection_keeps_distances_and_does_not_change():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(40, 2)) @ rng.normal(size=(2, 30)).astype(np.float32)
    Z = (X - X.mean(axis=0)) / X.std(axis=0)
    points = gallery.project(X, "pca")
    # two components hold all of it, so that distances in the plane are those in the features
    for a, b in ((0, 1), (3, 30)):
        assert np.linalg.norm(points[a] - points[b]) == pytest.approx(np.linalg.norm(Z[a] - Z[b]), rel=1e-4)
    np.testing.assert_array_equal(gallery.project(X, "tsne"), gallery.project(X, "tsne"))
    assert np.isfinite(gallery.project(np.ones((6, 1)), "pca")).all()


def test_a_table_escapes_and_aligns(tmp_path: Path):
    rows = [["<b>", 1234, "0.9 (0.8 to 1.0)", "no (number)"], ["caf\udce9\n", None, None, "x"]]
    table = page.Table(["name", "n", "score", "text"], rows, "c & d", mark=1)
    values = {"title": "a", "chosen": "b", "best": "c", "runs": table, "failed": ["<i>"]}
    html = page.write_page(tmp_path / "sweep.html", {}, **values).read_text(encoding="utf-8")
    body = re.sub(r"\s*\n\s*", "", html[html.index("<table>") :])
    assert '<th scope="col">name</th><th scope="col" class="n">n</th>' in body
    assert '<tr><th scope="row">&lt;b&gt;</th><td class="n">1,234</td>' in body
    assert '<td class="n">0.9<br><small>(0.8 to 1.0)</small></td><td>no (number)</td></tr>' in body
    assert '<tr class="mark"><th scope="row">caf\\udce9\\x0a</th><td class="n">–</td>' in body
    assert "<caption>c &amp; d</caption>" in body
    assert "<li>&lt;i&gt;</li>" in body


def test_a_misspelt_value_stops_the_page(tmp_path: Path):
    with pytest.raises(UndefinedError, match="chosen"):
        page.write_page(tmp_path / "sweep.html", {}, title="a", choosen="b")
    assert not (tmp_path / "sweep.html").exists()


def test_folders_of_this_machine_go_from_any_sentence():
    said = "/data/my photos/a.jpg and /opt/weights/w.pth differ; see https://host/page/x, a/b or and/or"
    assert page.strip_paths(said, ["/data/my photos"]) == (
        "a.jpg and w.pth differ; see https://host/page/x, a/b or and/or"
    )


def test_ridge_shows_how_it_chose_its_penalty(tmp_path: Path, everywhere: ColourEngine):
    data = photographs(tmp_path / "insects")
    run = fit(data, "colours", "ridge", cache=tmp_path / "cache", output=tmp_path / "run")
    seen = Page(write_report(run.path, layout="pca"))
    assert "Choice of the regularisation" in seen.headings
    assert {"held-out mean squared error", "penalty (larger = more regularisation)"} <= set(seen.words)
    found = run.report["fit"]
    losses = (found.get("leave_one_out") or found["cross_validation"])["mean_squared_error"]
    assert f"the least is {min(losses):.3f}" in " ".join(seen.words)


class Browser:
    """Headless Chromium, spoken to over two pipes in its DevTools protocol; no port, no package."""

    def __init__(self, folder: Path) -> None:
        name = next((n for n in ("chromium", "chromium-browser", "google-chrome") if shutil.which(n)), None)
        if name is None:
            pytest.skip("no chromium, chromium-browser or google-chrome on the PATH")
        theirs, self.write = os.pipe()
        self.read, answers = os.pipe()
        command = [name, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command += ["--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={folder}"]
        # the browser reads commands from descriptor 3 and answers on 4
        move = "import os, sys; os.dup2(int(sys.argv[1]), 100); os.dup2(int(sys.argv[2]), 101)"
        move += "; os.dup2(100, 3); os.dup2(101, 4); os.execvp(sys.argv[3], sys.argv[3:])"
        self.process = subprocess.Popen(
            [sys.executable, "-c", move, str(theirs), str(answers), *command],
            pass_fds=(theirs, answers),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(answers)
        self.events: list[dict[str, Any]] = []
        self.rest = b""
        self.number = 0
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": params}
        if hasattr(self, "session"):
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                part = os.read(self.read, 1 << 16)
                assert part, "the browser ended"
                self.rest += part
            line, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def value(self, expression: str) -> Any:
        return self("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.write)
        os.close(self.read)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    opened = Browser(tmp_path / "profile")
    yield opened
    opened.close()


def test_a_browser_shows_every_picture_and_fetches_nothing(run: Run, browser: Browser):
    path = write_report(run.path)
    for domain in ("Network", "Log", "Page", "Runtime"):
        browser(f"{domain}.enable")
    browser("Page.navigate", url=path.as_uri())
    deadline = time.monotonic() + 30
    while browser.value("document.readyState") != "complete" or not browser.value("document.images.length"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    sizes = browser.value("[...document.images].map(i => [i.complete, i.naturalWidth])")
    assert len(sizes) == len(run.report["mistakes"]) + 16
    assert all(complete and width > 0 for complete, width in sizes)
    drawings = browser.value("[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height)")
    assert len(drawings) == 4
    assert min(drawings) > 100
    for width in (1280, 380):  # nothing runs out of the page, on a telephone either
        browser("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        assert browser.value("document.documentElement.scrollWidth") <= width
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert path.as_uri() in asked
    assert all(url == path.as_uri() or url.startswith("data:") for url in asked)
    complaints = [e for e in browser.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
    assert complaints == []
    assert browser.value("document.querySelectorAll('script').length") == 0
