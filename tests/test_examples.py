"""The example applications: what each answers is what `featx predict` answers, of photographs on their side, too."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
from photo_run import photo_run
from PIL import Image, ImageCms, ImageOps

import featx
from featx.runs import open_run
from featx.shipping import exporting, reduction

ROOT = Path(__file__).resolve().parent.parent
# `featx predict` resizes with Pillow, these applications in the graph: 1 level of a pixel apart, at most
TOLERANCE = 5e-3


@pytest.fixture(scope="module")
def made(photos: Path, squeezenet_weights: Path) -> Path:
    return photo_run(photos, squeezenet_weights)


@pytest.fixture(scope="module")
def site(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return browser.build(made / "run" / "model.onnx", tmp_path_factory.mktemp("site"))


def odd_files(photograph: Path, folder: Path) -> dict[str, Path]:
    """Files of one photograph that show whether an application turns, converts and names as featx does."""
    image = ImageOps.exif_transpose(Image.open(photograph)).convert("RGB")
    sideways = Image.Exif()
    sideways[0x0112] = 6
    # sRGB with red and blue exchanged: who applies the profile gets other colours
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"rXYZ", b"?XYZ", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"?XYZ", b"bXYZ", 1)
    folder.mkdir()
    image.save(folder / "exif.jpg", exif=sideways, quality=95)
    image.save(folder / "profile.jpg", icc_profile=profile, quality=95)
    image.save(folder / "naïve 100 % #1?.png")
    image.convert("L").save(folder / "grey.png")
    deep = np.asarray(image.convert("L")).astype(np.uint16) * 230 + 3000
    Image.fromarray(deep).save(folder / "grey16.png")  # nearly white where it is clipped to 8 bits
    image.quantize(64).save(folder / "palette.png")
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    image.crop((0, 0, 333, 211)).save(folder / "odd.webp", quality=90)
    return {path.name: path for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def files(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Twenty photographs and the odd ones, by name."""
    photographs = {path.name: path for path in sorted((made / "photos" / "val").glob("*/*.jpg"))[::3]}
    assert len(photographs) == 20
    turned = [path for path in photographs.values() if Image.open(path).getexif().get(0x0112, 1) != 1]
    assert len(turned) == 2
    one = next(iter(photographs.values()))
    return photographs | odd_files(one, tmp_path_factory.mktemp("odd") / "files")


@pytest.fixture(scope="module")
def expected(made: Path, files: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Probabilities of the classes by file, best first, as `featx predict` gives them."""
    answers = featx.predict(made / "run" / "model.onnx", files.values())
    found = {name: dict(answer.top) for name, answer in zip(files, answers, strict=True)}
    assert {next(iter(top)) for top in found.values()} == {"ants", "bees"}
    return found


def test_photographs_on_their_side_count_as_upright_ones_at_every_step(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(made / "torch"))
    run, cache = made / "run", made / "cache"
    turns = {6: lambda stored: np.rot90(stored, -1), 5: lambda stored: stored.transpose(1, 0, 2)}
    for name in ("ants", "bees"):
        side = min((made / "photos" / "val" / name).iterdir())
        stored = Image.open(side)
        (tmp_path / "data" / name).mkdir(parents=True)
        shutil.copy(side, tmp_path / "data" / name / "side.jpg")
        upright = turns[stored.getexif()[0x0112]](np.asarray(stored))
        Image.fromarray(upright).save(tmp_path / "data" / name / "upright.png")
    request = open_run(run).request
    features = featx.extract(tmp_path / "data", request, cache=cache)
    assert [Path(i).name for i in features.ids] == ["side.jpg", "upright.png"] * 2
    np.testing.assert_allclose(features.X[::2], features.X[1::2], rtol=0, atol=1e-5)
    report = json.loads((run / "report.json").read_text())
    record = json.loads((run / "parity.json").read_text())
    assert record["images"] == record["equal_labels"] == report["count"] == 60
    assert record["accuracy"] == record["torch_accuracy"] == report["accuracy"]
    assert exporting.check(run / "model.onnx", run).equal_labels == 60
    tensor = featx.export(run, input="tensor", output=tmp_path / "tensor.onnx")
    assert tensor.equal_labels == 60
    faster = itertools.accumulate(itertools.cycle([0, 1, 0, 2])).__next__  # a clock by which int8 takes half the time
    int8 = reduction.export_reduced(run, "int8", output=tmp_path / "int8.onnx", clock=faster)
    assert int8.images == 60 and int8.lost <= int8.allowed and int8.equal_labels >= 56
    answers = list(featx.predict(run / "model.onnx", sorted((tmp_path / "data").glob("*/*"))))
    for side, upright in zip(answers[::2], answers[1::2], strict=True):
        assert side.label == upright.label and side.probability == pytest.approx(upright.probability, abs=1e-6)


def test_the_python_example_needs_no_featx_and_no_torch_and_answers_as_predict_does(
    made: Path, files: dict[str, Path], expected: dict[str, dict[str, float]], tmp_path: Path
) -> None:
    example = ROOT / "examples" / "classify.py"
    words = [str(example), str(made / "run" / "model.onnx"), *map(str, files.values())]
    code = f"""
import runpy, sys
sys.argv = {words!r}
for name in ("featx", "torch", "torchvision", "sklearn", "h5py", "onnx"):
    sys.modules[name] = None
runpy.run_path(sys.argv[0])
"""
    (tmp_path / "home").mkdir()
    unasked = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"} | {"HOME": str(tmp_path / "home")}
    options: dict[str, Any] = {"capture_output": True, "text": True, "encoding": "utf-8", "env": unasked}
    done = subprocess.run([sys.executable, "-X", "utf8", "-c", code], **options)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "home").iterdir())
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [path for path, _, _ in lines] == [str(path) for path in files.values()]
    for (_, label, probability), top in zip(lines, expected.values(), strict=True):
        assert label == next(iter(top))
        assert float(probability) == pytest.approx(top[label], abs=TOLERANCE)
    code_lines = [line for line in example.read_text().split('"""')[2].splitlines() if line]
    assert len(code_lines) <= 20


def test_the_page_in_chromium_answers_as_predict_does_and_names_a_file_that_is_not_an_image(
    site: Path, files: dict[str, Path], expected: dict[str, dict[str, float]], tmp_path: Path
) -> None:
    photograph = next(iter(files.values())).read_bytes()
    Image.new("RGB", (2, 300)).save(tmp_path / "sliver.png")
    bad = {
        "notes.txt": b"no image",
        "empty.jpg": b"",
        "cut.jpg": photograph[: len(photograph) // 3],
        "sliver.png": (tmp_path / "sliver.png").read_bytes(),
    }
    dropped = {name: path.read_bytes() for name, path in files.items()} | bad
    seen = browser.drive(site, dropped, tmp_path / "profile")
    assert seen.get("error") is None
    assert seen["state"] == "ready" and "ants, bees" in seen["about"] and "squeezenet1_1" in seen["about"]
    answers = dict(zip(dropped, seen["answers"], strict=True))
    for name, top in expected.items():
        answer = answers[name]
        assert answer["state"] == "done", (name, answer)
        assert answer["title"] == next(iter(top)), name
        shown = {bar["label"]: bar["probability"] for bar in answer["bars"]}
        assert shown == pytest.approx(top, abs=TOLERANCE), name
        assert [bar["shown"] for bar in answer["bars"]] == [f"{100 * p:.1f} %" for p in shown.values()]
    for name in bad:
        assert answers[name]["state"] == "error" and name in answers[name]["note"]
    assert "not an image" in answers["notes.txt"]["note"]
    assert "64 times" in answers["sliver.png"]["note"]
    assert all(origin.startswith("http://127.0.0.1:") for origin in seen["requests"])


def test_a_page_with_a_file_of_somebody_else_says_so(site: Path, tmp_path: Path) -> None:
    shutil.copytree(site, tmp_path / "site")
    (tmp_path / "site" / "model.onnx").write_bytes(b"\x08\x0a\x12\x02me")
    seen = browser.drive(tmp_path / "site", {}, tmp_path / "profile")
    assert seen["state"] == "broken" and "not exported by featx" in seen["about"]


def test_the_lock_file_of_the_page_holds_no_addresses_and_every_package_a_digest() -> None:
    lock = json.loads((browser.EXAMPLE / "package-lock.json").read_text())
    packages = {name: entry for name, entry in lock["packages"].items() if name}
    assert "node_modules/onnxruntime-web" in packages
    assert all(entry["integrity"].startswith("sha512-") for entry in packages.values())
    assert not any("resolved" in entry for entry in packages.values())
    pinned = json.loads((browser.EXAMPLE / "package.json").read_text())["dependencies"]["onnxruntime-web"]
    assert pinned == packages["node_modules/onnxruntime-web"]["version"]


def test_the_page_names_no_other_site() -> None:
    for name in ("index.html", "style.css", "page.js", "classifier.js", "build.mjs"):
        assert "://" not in (browser.EXAMPLE / name).read_text(encoding="utf-8"), name
