"""The commands of docs/recipes.md, on tiny networks with the same layer names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_finetuning import draw

from featx.cli import cli
from featx.runs import open_run

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
# `pretrained` needs labels that the network knows: tests/heads test it on the real photographs
COMMANDS = [c for c in re.findall(r"`(featx fit photos [^`]+)`", PAGE.read_text()) if "pretrained" not in c]


def test_the_page_has_a_command_for_every_published_result() -> None:
    assert len(COMMANDS) == 9 and len(set(COMMANDS)) == 9


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("recipes")
    draw(made / "photos")
    return made


@pytest.mark.parametrize("command", COMMANDS)
def test_a_recipe_runs_as_it_stands(root: Path, tmp_path: Path, command: str) -> None:
    words = shlex.split(command)[1:]
    words[words.index("photos")] = str(root / "photos")
    kind = "vgg_like" if "vgg16" in words else "normed"
    if "--backbone" in words:
        words[words.index("--backbone") + 1] = f"small:backbone_{kind}"
    else:
        words += ["--backbone", f"small:backbone_{kind}"]
    words += ["--cache", str(root / "cache"), "--output", str(tmp_path / "run"), "--no-report", "--device", "cpu"]
    if "--finetune" in words:
        words += ["--epochs", "1", "--tune", "holdout=0.3"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    run = open_run(tmp_path / "run")
    assert 0 <= run.report["accuracy"] <= 1
    assert (run.path / "model.safetensors").is_file() == ("--finetune" in words)
