"""A run whose weights file has moved: found by its content, or named by `--weights` at every command that needs it."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import write_images
from small import normed

import featx
from featx.cli import cli
from featx.errors import SourceError, WeightsError
from featx.measuring.curve import learning_curve
from featx.runs import open_run

FACTORY = "small:backbone_normed"


def state(factor: float = 1.0) -> dict[str, torch.Tensor]:
    return {name: tensor * factor for name, tensor in normed().state_dict().items()}


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data/`, `cache/`, `run/`, fitted on the averaged weights of `w/best.pth`, with a rule of its own for pixels."""
    root = tmp_path_factory.mktemp("moved")
    for split, count, seed in (("train", 8, 0), ("val", 4, 1)):
        write_images(root / "data" / split, count, seed=seed)
    (root / "w").mkdir()
    torch.save({"state_dict": state(1.1), "state_dict_ema": state()}, root / "w" / "best.pth")
    weights = ["-b", FACTORY, "--weights", f"{root}/w/best.pth#state_dict_ema"]
    seen = ["--size", "64", "--crop-mode", "border", "--crop-pct", "1.15", "--mean", "0.5", "--std", "0.25,0.25,0.3"]
    places = ["--cache", root / "cache", "-o", root / "run", "--no-gain"]
    fitted = run("fit", root / "data", *weights, *seen, *places, "--no-report")
    assert fitted.exit_code == 0, fitted.stderr
    exported = run("export", root / "run", "--factory", FACTORY)
    assert exported.exit_code == 0, exported.stderr
    return root


def test_the_run_has_the_weights_and_the_pixels_that_were_asked_for(project: Path) -> None:
    config = open_run(project / "run").config
    preprocess = featx.Preprocess(55, 64, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.3), crop_mode="border")
    assert config.spec.preprocess == preprocess
    assert config.backbone.weights_note == "local file best.pth#state_dict_ema"
    described = featx.Model(project / "run" / "model.onnx").metadata
    assert "the long side to 55 pixels" in described["contract"]
    assert "64 x 64 on a ground of RGB (128, 128, 128)" in described["contract"]
    answers = list(featx.predict(project / "run" / "model.onnx", project / "data" / "val"))
    classifier = featx.load(project / "run", factory=FACTORY)
    for answer in answers:
        wanted = classifier.probabilities(preprocess(Path(answer.id).read_bytes())[None])[0]
        assert answer.probabilities == pytest.approx(wanted, abs=1e-4)


def test_a_renamed_file_is_found_in_its_folder_by_its_content(project: Path, tmp_path: Path) -> None:
    (project / "w" / "best.pth").rename(project / "w" / "renamed.pth")
    (project / "w" / "about.pth").write_text("no weights")
    torch.save({"state_dict_ema": state(2)}, project / "w" / "a-other.pth")
    try:
        result = run("evaluate", project / "run", project / "data", "--factory", FACTORY)
        assert result.exit_code == 0, result.stderr
        assert "best.pth is not there" in result.stderr and "renamed.pth#state_dict_ema is the same" in result.stderr
    finally:
        (project / "w" / "renamed.pth").rename(project / "w" / "best.pth")


def test_a_moved_file_is_named_at_every_command_and_its_digest_must_fit(project: Path, tmp_path: Path) -> None:
    moved = Path(shutil.move(project / "w" / "best.pth", tmp_path / "moved.pth"))
    torch.save({"state_dict_ema": state(2)}, tmp_path / "other.pth")
    try:
        folder, model = project / "run", project / "run" / "model.onnx"
        for command in (
            ["evaluate", folder, project / "data"],
            ["check", model, folder],
            ["export", folder],
            ["curve", folder],
        ):
            for weights, message in (
                (project / "w" / "best.pth", "best.pth is not there; --weights FILE"),
                (tmp_path / "other.pth", "other.pth holds other weights than"),
            ):
                refused = run(*command, "--factory", FACTORY, "--weights", weights)
                assert refused.exit_code == 1 and message in refused.stderr
            if command[0] != "curve":  # which draws a page
                assert run(*command, "--factory", FACTORY, "--weights", moved).exit_code == 0
        assert learning_curve(folder, sizes=[8, 16], repeats=1, factory=FACTORY, weights=moved).points[-1].images == 16
        classifier = featx.load(project / "run", factory=FACTORY, weights=moved)
        assert classifier.backbone.info.weights_note == "local file moved.pth#state_dict_ema"
        report = featx.evaluate(project / "run", project / "data", factory=FACTORY, weights=f"{moved}#state_dict_ema")
        assert report.count == 24
        with pytest.raises(WeightsError, match=r"moved.pth#state_dict holds other weights"):
            featx.evaluate(project / "run", project / "data", factory=FACTORY, weights=f"{moved}#state_dict")
        assert featx.export(open_run(project / "run", FACTORY), weights=moved).passed
        torch.save(state(), tmp_path / "saved again.pt")  # the tensors count, not the file
        again = featx.load(project / "run", factory=FACTORY, weights=tmp_path / "saved again.pt")
        assert again.preprocess.crop == 64
    finally:
        shutil.move(moved, project / "w" / "best.pth")


def test_what_cannot_run_is_refused_before_any_image_is_listed(project: Path, tmp_path: Path) -> None:
    class Unlisted(featx.Source):
        """Images that must not be looked at."""

        def __len__(self) -> int:
            raise AssertionError("the images were listed")

    data = Unlisted(uri="x", root=tmp_path, ids=["a"])
    for name, weights in (("squeezenet1_11", "random"), ("squeezenet1_1", "gone.pth"), ("timm/resnet99", "random")):
        with pytest.raises(
            WeightsError if "gone" in weights else featx.FeatxError, match=r"gone.pth is not|Did you mean"
        ):
            featx.extract(data, name, weights=weights, cache=tmp_path / "cache")
        with pytest.raises(featx.FeatxError, match=r"gone.pth is not|Did you mean"):
            featx.sweep(data, [f"{name}={weights}"], cache=tmp_path / "cache", output=tmp_path / "sweep")
    with pytest.raises(SourceError, match="there is no"):
        featx.extract(tmp_path / "nowhere", "squeezenet1_1", weights="random", cache=tmp_path / "cache")
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_tells_files_of_one_network_apart(project: Path, tmp_path: Path) -> None:
    for name, factor in (("a", 1.0), ("b", 1.05)):
        (tmp_path / name).mkdir()
        torch.save(state(factor), tmp_path / name / "best.pth")
    files = [f"{FACTORY}={tmp_path}/{name}/best.pth" for name in "ab"]
    options = {"size": 64, "cache": tmp_path / "cache", "output": tmp_path / "sweep"}
    found = featx.sweep(project / "data", files, ["ncm"], **options)
    wanted = {"a/best.pth", "b/best.pth"}
    assert {point.weights for point in found.points} == wanted
    with open(tmp_path / "sweep" / "sweep.csv", newline="") as file:
        assert {row["weights"] for row in csv.DictReader(file)} == wanted
    assert all(name in found.text() for name in wanted)
    assert {open_run(tmp_path / "sweep" / point.run).config.spec.preprocess.crop for point in found.points} == {64}
    from featx.reporting.comparison import write

    write(found)
    page = (tmp_path / "sweep" / "sweep.html").read_text()
    assert all(name in page for name in wanted) and str(tmp_path) not in page


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--mean", "123.7,116.3,103.5"], "Divide by 255"),
        (["--mean", "0.5,0.5"], "mean is three numbers"),
        (["--std", "a"], "numbers separated by commas"),
        (["--crop-mode", "zoom"], "zoom"),
        (["--size", "0"], "0 is not in the range"),
        (["--crop-pct", "1.2"], "crop modes border and pad"),
    ],
)
def test_options_of_preprocessing_that_cannot_be_say_why(option: list[str], message: str, project: Path) -> None:
    result = run("extract", project / "data", "-b", "squeezenet1_1", "--weights", "random", *option)
    assert result.exit_code in (1, 2) and message in result.stderr.replace("\n", " ")
