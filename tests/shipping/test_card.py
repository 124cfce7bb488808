"""The model card: what a hub reads, what people read, and what must not be in it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ColourEngine, write_images

import featx
from featx.records import write_record
from featx.runs import CARD_MARK, Run, open_run, read_config, write_config
from featx.shipping import card
from featx.text import printable

ODD = ("a|b <b>x", 'he said "yes": #1', "yes", "0x10", "naïve 🐝\u202e", "[link](x) *star* `code`\nend")


@pytest.fixture
def run(tmp_path: Path, everywhere: ColourEngine) -> Run:
    """A run whose class folders and data have every name that Markdown or YAML could stumble over."""
    data = write_images(tmp_path / "secret place" / "my: data | set", classes=ODD, per_class=8)
    output = tmp_path / "secret place" / "run: one #1"
    settings = {"strengths": [0.01]}
    return featx.fit(data, "colours", settings=settings, cache=tmp_path / "cache", output=output)


def front_matter(text: str) -> dict[str, Any]:
    opening, front, _ = re.split(r"^---\n", text, maxsplit=2, flags=re.M)
    assert opening == ""
    return yaml.safe_load(front)


def changed(run: Run, **backbone: Any) -> Run:
    config = read_config(run.path)[0]
    config = replace(config, backbone=replace(config.backbone, **backbone))
    write_config(run.path, config)
    return open_run(run.path)


def test_a_hub_reads_what_the_run_is_and_what_was_measured(run: Run) -> None:
    front = front_matter(card.card(open_run(run.path)))
    assert front["library_name"] == "featx"
    assert front["pipeline_tag"] == "image-classification"
    assert front["license"] == "unknown"
    assert {"featx", "onnx"} < set(front["tags"])
    (entry,) = front["model-index"]
    (result,) = entry["results"]
    assert entry["name"] == "run: one #1"
    assert result["dataset"] == {"type": "imagefolder", "name": "my: data | set", "split": "val"}
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert list(values) == front["metrics"]
    assert values["accuracy"] == pytest.approx(run.report["accuracy"], abs=1e-6)
    assert values["log_loss"] == pytest.approx(run.report["log_loss"], abs=1e-6)
    assert all(isinstance(value, float) for value in values.values())


@pytest.mark.parametrize(
    "name", [*(name for name in ODD if "\n" not in name), "caf\udce9", "null", "1e3", "--- x", "%a: b", "'q' #", " é "]
)
def test_any_name_comes_through_the_front_matter(run: Run, name: str) -> None:
    write_config(run.path, replace(run.config, data=f"/elsewhere/{name}"))
    (entry,) = front_matter(card.card(changed(run, license=name)))["model-index"]
    assert entry["results"][0]["dataset"]["name"] == printable(name)
    assert front_matter(card.card(open_run(run.path)))["license_name"] == printable(name)


def test_the_hub_s_own_library_reads_the_card(run: Run) -> None:
    hub = pytest.importorskip("huggingface_hub")
    parsed = hub.ModelCard(card.card(open_run(run.path)))
    accuracy = next(result for result in parsed.data.eval_results if result.metric_type == "accuracy")
    assert accuracy.metric_value == pytest.approx(run.report["accuracy"], abs=1e-6)
    assert accuracy.dataset_name == "my: data | set"
    assert parsed.data.model_name == "run: one #1"


def test_every_class_name_is_shown_as_it_is_and_breaks_no_table(run: Run) -> None:
    text = card.card(open_run(run.path))
    body = text.split(CARD_MARK)[1]
    rows = [line for line in body.splitlines() if line.startswith("| ") and line.count(" | ") >= 4]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    assert cells[0] == ["class", "precision", "recall", "F1", "images"]
    assert all(len(row) == 5 for row in cells)
    shown = {re.sub(r"\\(.)", r"\1", row[0]) for row in cells[2:]}
    assert shown == {name.replace("\n", " ").replace("\u202e", r"\u202e") for name in ODD}
    assert "<b>" not in body.replace("\\<b\\>", "")


def test_the_card_names_no_place_on_this_machine(run: Run, tmp_path: Path) -> None:
    text = card.card(open_run(run.path))
    assert "run: one" in text
    assert str(tmp_path) not in text and "secret place" not in text


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("apache-2.0", {"license": "apache-2.0"}),
        ("CC-BY-NC-4.0", {"license": "cc-by-nc-4.0"}),
        ("FAIR: own terms", {"license": "other", "license_name": "FAIR: own terms"}),
    ],
)
def test_the_license_of_the_weights_is_passed_on(run: Run, stated: str, expected: dict[str, str]) -> None:
    text = card.card(changed(run, license=stated))
    front = front_matter(text)
    assert {name: front[name] for name in expected} == expected
    assert f"Backbone weights: {stated}." in text


def test_a_pretrained_timm_network_is_named_as_the_base_model(run: Run) -> None:
    name = "timm/vit_small_patch14_dinov2.lvd142m"
    note = "pretrained lvd142m"
    assert front_matter(card.card(changed(run, name=name, weights_note=note)))["base_model"] == name
    assert "base_model" not in front_matter(card.card(changed(run, name=name, weights_note="random, seed 0")))


def test_a_run_without_validation_images_claims_nothing(run: Run) -> None:
    write_record(run.path / "report.json", {**run.report, "accuracy": None, "count": 0})
    text = card.card(open_run(run.path))
    front = front_matter(text)
    assert "metrics" not in front and "model-index" not in front
    assert "there were no validation images" in text


def test_what_the_gate_found_is_stated_once_there_is_a_file(run: Run) -> None:
    assert "## Use" not in card.card(open_run(run.path))
    (run.path / "model.onnx").write_bytes(b"")
    (run.path / "plots").mkdir()
    values = {"probabilities": 2.3e-3, "same-pixel probabilities": 1e-6, "labels": 0}
    checks = {name: {"value": value, "limit": 1e-2} for name, value in values.items()}
    record = {"passed": True, "file": "model.onnx", "sha256": "", "equal_labels": 11, "images": 12, "checks": checks}
    write_record(run.path / "parity.json", record)
    text = card.card(open_run(run.path))
    assert "11 of 12 images, with probabilities at most 2.3e-03 apart" in text
    assert "short side to 36 pixels" in text and "32 x 32" in text
    listed = re.findall(r"^\| `([\w.-]+)` ", text, re.M)
    assert sorted(listed) == sorted(path.name for path in run.path.iterdir())


def test_a_card_is_kept_up_to_date_until_somebody_makes_it_their_own(run: Run) -> None:
    path = run.path / "README.md"
    card.write(run)
    assert path.read_text(encoding="utf-8") == card.card(run)
    card.write(changed(run, license="mit"))
    assert front_matter(path.read_text(encoding="utf-8"))["license"] == "mit"
    path.write_text("my own words", encoding="utf-8")
    card.write(run)
    assert path.read_text(encoding="utf-8") == "my own words"


def test_a_link_that_leads_nowhere_is_somebodys(run: Run) -> None:
    (run.path / "README.md").unlink(missing_ok=True)
    (run.path / "README.md").symlink_to("not there yet.md")
    card.write(run)
    assert (run.path / "README.md").is_symlink()
    (run.path / "README.md").unlink()


def test_many_classes_are_named_up_to_a_number(run: Run) -> None:
    report = run.report
    row = report["per_class"][0]
    report["per_class"] = [row | {"label": f"class-{i}", "support": 100 - i} for i in range(card.CLASSES + 5)]
    write_record(run.path / "report.json", report)
    text = card.card(open_run(run.path))
    assert f"class-{card.CLASSES - 1} |" in text and f"class-{card.CLASSES} |" not in text
    assert "The other 5 classes are in report.json." in text
    assert json.loads((run.path / "report.json").read_text())["per_class"]
