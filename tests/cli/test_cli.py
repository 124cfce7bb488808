"""The command line: exit codes, what goes to which stream, and messages that help."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from conftest import ColourEngine, write_images
from PIL import Image

import featx
from featx.cli import cli
from featx.cli.base import Commands
from featx.errors import FeatxWarning


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_extract_reports_json_on_standard_output_and_nothing_else(
    tiny: Path, here: Path, everywhere: ColourEngine
) -> None:
    result = run("extract", tiny, "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    counts = ("found", "ignored", "cached", "extracted", "duplicate", "skipped")
    assert [report[name] for name in counts] == [12, 0, 0, 12, 0, 0]
    assert (here / "cache").is_dir()


def test_a_dry_run_counts_and_writes_no_feature(tiny: Path, here: Path, everywhere: ColourEngine) -> None:
    shutil.copy(tiny / "cold" / "000.png", tiny / "cold" / "copy.png")
    planned = json.loads(run("extract", tiny, "--dry-run", "--json").stdout)
    assert [planned[name] for name in ("found", "cached", "missing", "duplicate")] == [13, 0, 12, 1]
    assert planned["bytes"] >= 12 * 48 * 4 and planned["enough"]
    assert not (here / "cache" / "features").exists()
    assert run("extract", tiny).exit_code == 0
    after = run("extract", tiny, "--dry-run")
    assert after.exit_code == 0 and "found 13  ignored 0  cached 12  missing 0  duplicate 1" in after.stderr


def test_prose_goes_to_standard_error(tiny: Path, here: Path, everywhere: ColourEngine) -> None:
    result = run("extract", tiny)
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "found 12  ignored 0  cached 0  extracted 12" in result.stderr


def test_skipped_images_are_named_and_end_in_exit_code_3(tiny: Path, here: Path, everywhere: ColourEngine) -> None:
    (tiny / "cold" / "broken.png").write_bytes(b"broken")
    for command in (["extract", tiny], ["fit", tiny, "-o", "run"]):
        result = run(*command)
        assert result.exit_code == 3
        assert "skipped: cold/broken.png:" in result.stderr
    assert json.loads((here / "run" / "report.json").read_text())["extract"]["skipped"] == 1


def test_extract_names_all_that_is_odd_in_a_file(tiny: Path, here: Path, everywhere: ColourEngine) -> None:
    shutil.copy(tiny / "cold" / "000.png", tiny / "warm" / "copy.png")
    (tiny / "warm" / "broken.png").write_bytes(b"broken")
    (here / "mine.jsonl").write_text("mine")
    refused = run("extract", tiny, "--findings", "mine.jsonl")
    assert refused.exit_code == 1 and "mine.jsonl holds no findings of featx" in refused.stderr
    assert everywhere.images == 0 and (here / "mine.jsonl").read_text() == "mine"
    assert run("extract", tiny, "--dry-run", "--findings", "odd.jsonl").exit_code == 2
    assert run("extract", tiny, "--findings", "odd.jsonl").exit_code == 3
    rows = [json.loads(line) for line in (here / "odd.jsonl").read_text().splitlines()]
    assert [(row["what"], row.get("id")) for row in rows] == [
        ("skipped", "warm/broken.png"),
        ("duplicate", "warm/copy.png"),
        ("conflict", "cold/000.png"),
        ("conflict", "warm/copy.png"),
    ]


def test_ignored_files_leave_the_exit_code_0(tiny: Path, here: Path, everywhere: ColourEngine) -> None:
    (tiny / "cold" / "animation.gif").write_bytes(b"GIF89a")
    result = run("extract", tiny)
    assert result.exit_code == 0
    assert "ignored: cold/animation.gif (a GIF is read only where a manifest or a command names it)" in result.stderr


def test_pictures_by_newer_names_are_read_or_named(tiny: Path, here: Path, everywhere: ColourEngine) -> None:
    picture = next((tiny / "cold").glob("*.png"))
    Image.open(picture).rotate(90).save(tiny / "cold" / "new.jfif", "JPEG")
    (tiny / "cold" / "new.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 500)
    (tiny / "cold" / "new.psd").write_bytes(b"8BPS")
    result = run("extract", tiny)
    assert result.exit_code == 3
    assert "found 14  ignored 1  cached 0  extracted 13  duplicate 0  skipped 1" in result.stderr
    assert "ignored: cold/new.psd (featx does not read .psd; convert it to JPEG or PNG)" in result.stderr
    if importlib.util.find_spec("pillow_heif") is None:
        assert "skipped: cold/new.heic: a HEIC (HEIF) image, which featx reads after `pip install" in result.stderr


def test_fit_makes_a_run_named_after_data_backbone_head_and_configuration(
    tiny: Path, here: Path, everywhere: ColourEngine
) -> None:
    result = run("fit", tiny, "--backbone", "tiny", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    path = Path(report["run"])
    assert path.parent == Path("export")
    data, _backbone, head, digest = path.name.split("-")
    assert (data, head) == ("tiny", "logreg") and len(digest) == 8 and int(digest, 16) >= 0
    assert report["accuracy"] == 1.0
    assert {p.name for p in path.iterdir()} >= {"config.json", "head.safetensors", "report.json"}


def test_people_have_the_answer_before_its_page_is_drawn(tiny: Path, here: Path, everywhere: ColourEngine) -> None:
    run("fit", tiny, "-b", "tiny", "-o", "run")
    (here / "run" / "plots").symlink_to(here)  # which no page is written into
    for flags in ([], ["--json"]):
        (here / "run" / "report.json").unlink()
        result = run("fit", tiny, "-b", "tiny", "-o", "run", "--report", *flags)
        assert result.exit_code == 1 and result.stdout == ""  # what a program reads comes when all is there
        assert "plots is a link" in result.stderr.partition("Error: ")[2]
        assert ("accuracy" in result.stderr.partition("Error: ")[0]) == (not flags)
    (here / "run" / "plots").unlink()
    assert run("report", "run").exit_code == 0 and (here / "run" / "report.html").is_file()


def test_a_finished_run_is_never_overwritten_in_silence(tiny: Path, here: Path, everywhere: ColourEngine) -> None:
    assert run("fit", tiny, "-o", "run").exit_code == 0
    before = {p.name: p.read_bytes() for p in (here / "run").iterdir() if p.is_file()}
    second = run("fit", tiny, "-o", "run")
    assert second.exit_code == 1
    assert "--overwrite" in second.stderr
    assert {p.name: p.read_bytes() for p in (here / "run").iterdir() if p.is_file()} == before
    (here / "run" / "curve.json").write_text("{}")
    (here / "run" / "my.onnx").write_text("mine")
    replaced = run("fit", tiny, "-o", "run", "--overwrite", "--json")
    assert replaced.exit_code == 0 and json.loads(replaced.stdout)["run"] == "run"
    assert replaced.stderr.splitlines() == ["removed with the former run: curve.json"]
    assert {p.name for p in (here / "run").iterdir()} == {*before, "my.onnx"}
    assert "removed" not in run("fit", tiny, "-o", "run", "--overwrite").stderr


@pytest.mark.parametrize("name", ["", ".", "..", "*", "engines/..", "/"])
def test_cache_remove_takes_no_blank_and_no_path(tiny: Path, here: Path, everywhere: ColourEngine, name: str) -> None:
    run("extract", tiny)
    before = sorted((here / "cache").rglob("*"))
    result = run("cache", "remove", name, "--yes")
    assert result.exit_code == 1 and f"there is no entry {name!r}" in result.stderr
    assert sorted((here / "cache").rglob("*")) == before


def test_an_unfinished_run_is_continued_and_another_one_is_not(
    tiny: Path, here: Path, everywhere: ColourEngine
) -> None:
    run("fit", tiny, "-o", "run")
    (here / "run" / "report.json").unlink()
    other = run("fit", tiny, "-o", "run", "--seed", "1")
    assert other.exit_code == 1 and "unfinished run with another configuration" in other.stderr
    assert run("fit", tiny, "-o", "run").exit_code == 0
    assert (here / "run" / "report.json").exists()


def test_a_folder_that_is_not_a_run_is_never_touched(tiny: Path, here: Path, everywhere: ColourEngine) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "thesis.txt").write_text("years of work")
    for flags in ([], ["--overwrite"]):
        result = run("fit", tiny, "-o", "mine", *flags)
        assert result.exit_code == 1 and "not a run of featx" in result.stderr
    assert (here / "mine" / "thesis.txt").read_text() == "years of work"


def test_evaluate_measures_a_run_on_other_data(tiny: Path, here: Path, everywhere: ColourEngine) -> None:
    run("fit", tiny, "-b", "tiny", "-o", "run")
    other = write_images(here / "other", per_class=4, seed=7)
    shutil.copy(next((other / "cold").iterdir()), other / "warm" / "wrong.png")
    result = run("evaluate", "run", other, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["count"] == 9 and report["accuracy"] == pytest.approx(8 / 9)
    assert report["confusion"] == [[4, 0], [1, 4]]
    assert "accuracy" in run("evaluate", "run", other).stderr


def test_fitting_where_the_photographs_lie_gives_the_same_classes_again(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, everywhere: ColourEngine
) -> None:
    monkeypatch.chdir(tiny)
    for _ in range(2):
        report = json.loads(run("fit", ".", "-b", "tiny", "--overwrite", "--json").stdout)
        assert report["labels"] == ["cold", "warm"] and report["extract"]["found"] == 12
        (tiny / report["run"] / "plots").mkdir(exist_ok=True)
        shutil.copy(tiny / "cold" / "000.png", tiny / report["run"] / "plots" / "confusion.png")  # as its page draws it
    assert report["extract"]["notes"][0].startswith("left out, since featx wrote them: cache/")
    monkeypatch.chdir(tiny.parent)
    refused = run("fit", ".", "-b", "tiny")
    assert refused.exit_code == 1 and "are 'tiny', and a classifier needs at least two classes" in refused.stderr
    assert "if its folders (cold, warm) are the classes, give ./tiny)" in refused.stderr


def test_backbones_are_listed_with_their_sizes() -> None:
    rows = {row["name"]: row for row in json.loads(run("backbones", "--json").stdout)}
    assert rows["resnet18"]["features"] == 512 and rows["vgg16"]["features"] == 4096
    assert "resnet18" in run("backbones").stdout
    assert "vgg16" not in run("backbones", "resnet").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["extract", "nowhere"], 1, "there is no"),
        (["extract", "empty"], 1, "image"),
        (["extract", "data", "--backbone", "resnet19"], 1, "Did you mean resnet18"),
        (["fit", "data", "--head", "logerg"], 1, "Did you mean logreg"),
        (["fit", "data", "--set", "strength"], 2, "NAME=VALUE"),
        (["fit", "one-class"], 1, "at least two classes"),
        (["fit", "flat"], 1, "no labels"),
        (["evaluate", "no-run", "data"], 1, "is not a run"),
        (["predict", "no-model.onnx", "x.jpg"], 1, "there is no file no-model.onnx"),
        (["extract"], 2, "Missing argument"),
        (["extract", "data", "--batch-size", "0"], 2, "batch-size"),
        (["frobnicate"], 2, "No such command"),
    ],
)
def test_mistakes_get_a_message_and_an_exit_code(
    arguments: list[str], code: int, words: str, here: Path, request: pytest.FixtureRequest
) -> None:
    if not any("resnet19" in argument for argument in arguments):
        request.getfixturevalue("everywhere")
    write_images(here / "data")
    write_images(here / "one-class", classes=("only",))
    shutil.copytree(here / "one-class" / "only", here / "flat")
    (here / "empty").mkdir()
    result = run(*arguments)
    assert result.exit_code == code
    assert words in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""


def test_an_interrupt_ends_with_130_and_a_usable_cache(tiny: Path, here: Path, everywhere: ColourEngine) -> None:
    everywhere.interrupt_at = 8
    result = run("extract", tiny)
    assert result.exit_code == 130 and "Interrupted" in result.stderr
    everywhere.interrupt_at = None
    report = json.loads(run("extract", tiny, "--json").stdout)
    assert report["cached"] == 4 and report["extracted"] == 8


def test_a_name_that_is_not_utf8_survives_the_way_to_the_terminal(
    tiny: Path, here: Path, everywhere: ColourEngine
) -> None:
    try:
        os.rename(tiny / "cold" / "000.png", os.fsencode(tiny / "cold") + b"/caf\xe9.png")
        (tiny / "cold" / "bad.png").write_bytes(b"")
        os.rename(tiny / "cold" / "bad.png", os.fsencode(tiny / "cold") + b"/bad\xe9.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    result = run("extract", tiny, "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["skipped_images"][0]["id"] == "cold/bad\udce9.png"
    assert run("fit", tiny, "-o", "run").exit_code == 3
    assert featx.evaluate("run", tiny).accuracy == 1.0


def test_control_characters_in_a_name_reach_the_terminal_as_escapes(
    tiny: Path, here: Path, everywhere: ColourEngine
) -> None:
    for name, data in (("title\x1b]0;x\x07.png", b""), ("two\nlines.txt", b"no image")):
        (tiny / "cold" / name).write_bytes(data)
    words = run("extract", tiny).stderr
    assert "skipped: cold/title\\x1b]0;x\\x07.png: an empty file" in words
    assert "ignored: cold/two\\x0alines.txt (not an image)\n" in words
    assert not set(words) & set("\x1b\x07")
    report = json.loads(run("extract", tiny, "--json").stdout)
    assert report["skipped_images"][0]["id"] == "cold/title\x1b]0;x\x07.png"
    assert run("fit", tiny, "-o", "an ordinary, ünï name").stdout == "an ordinary, ünï name\n"
    assert run("fit", tiny, "-o", "a\x1b[31mname").stdout == "a\\x1b[31mname\n"
    missing = run("extract", "no\x1b[31m\nfolder").stderr
    assert "there is no no\\x1b[31m\\x0afolder" in missing


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii", "utf-8"])
def test_names_reach_a_stream_of_any_encoding(tiny: Path, here: Path, everywhere: ColourEngine, encoding: str) -> None:
    (tiny / "cold" / "ü 🐜 \u202e.png").write_bytes(b"bad")
    (tiny / "warm").rename(tiny / "warm ü 🐜")
    runner, ant = CliRunner(charset=encoding), "ü 🐜".encode(encoding, "backslashreplace")
    done = runner.invoke(cli, ["fit", str(tiny), "-o", "run ü 🐜"])
    assert done.exit_code == 3 and done.stdout_bytes == b"run " + ant + b"\n"
    assert b"skipped: cold/" + ant + b" \\u202e.png: " in done.stderr_bytes
    assert b"\n  warm " + ant in done.stderr_bytes
    done = runner.invoke(cli, ["evaluate", "run ü 🐜", str(tiny), "--json"])
    assert json.loads(done.stdout_bytes.decode(encoding))["labels"] == ["cold", "warm ü 🐜"]
    for arguments in (["extract", "ü 🐜"], ["cache", "info", "ü 🐜"], ["ü 🐜"]):
        done = runner.invoke(cli, arguments)
        assert done.exit_code in (1, 2) and ant in done.stderr_bytes


def test_control_characters_in_an_option_reach_the_terminal_as_escapes() -> None:
    refused = run("extract", "data", "--dtype", "a\x1b[31m", "--seed", "\u202eb")
    assert refused.exit_code == 2 and "\\x1b[31m" in refused.stderr + run("fit", "--\x1b[31m").stderr
    assert not set(refused.stderr + run("\x1b[31m").stderr + run("fit", "--\x1b[31m").stderr) & set("\x1b\u202e")


def test_a_tilde_is_the_home_folder_on_the_command_line_and_in_the_environment(
    tiny: Path, here: Path, everywhere: ColourEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = here.parent / "home"
    shutil.copytree(tiny, home / "photos")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("FEATX_FIT_CACHE", "~/cache")
    assert run("fit", "~/photos", "--output=~/run").stdout == f"{home / 'run'}\n"
    assert run("evaluate", "~/run", "~/photos").exit_code == 0
    assert {path.name for path in home.iterdir()} == {"photos", "cache", "run"} and not list(here.iterdir())
    assert "there is no user for '~nobody-here/x'" in run("extract", "~nobody-here/x").stderr
    (here / "~").mkdir()
    assert run("extract", "~/photos", "--cache", "./~/cache").exit_code == 0
    assert {path.name for path in (here / "~").iterdir()} == {"cache"}


def test_a_tilde_is_the_home_folder_in_python(
    tiny: Path, here: Path, everywhere: ColourEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tiny.parent))
    run = featx.fit("~/tiny", output="~/run", cache=Path("~/cache"))
    assert run.path == tiny.parent / "run" and (tiny.parent / "cache").is_dir() and not list(here.iterdir())
    assert featx.evaluate("~/run", Path("~/tiny")).accuracy == 1.0
    assert featx.BackboneRequest("resnet18", "~/w.pth").weights == str(tiny.parent / "w.pth")


def test_every_option_is_set_by_the_variable_that_its_flag_names(
    tiny: Path, here: Path, everywhere: ColourEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def variables(command: click.Command, prefix: str) -> Iterator[tuple[str, object]]:
        prefix = f"{prefix}_{command.name}".upper()
        for option in command.params:
            if isinstance(option, click.Option):
                flag = next(flag for flag in option.opts if flag.startswith("--"))
                yield f"{prefix}_{flag[2:].replace('-', '_').upper()}", option.envvar
        for inner in getattr(command, "commands", {}).values():
            yield from variables(inner, prefix)

    found = [pair for command in cli.commands.values() for pair in variables(command, "FEATX")]
    assert all(name == variable for name, variable in found) and len(found) > 100
    assert {"FEATX_SWEEP_BACKBONE", "FEATX_FIT_SET", "FEATX_CACHE_EXPORT_BACKBONE"} <= dict(found).keys()
    monkeypatch.setenv("FEATX_FIT_SET", "strengths=[0.5] 'folds = 3'")
    refused = run("fit", tiny)
    assert refused.exit_code == 1 and "'folds '" in refused.stderr
    monkeypatch.setenv("FEATX_FIT_SET", "strengths=[0.5] folds=3")
    monkeypatch.setenv("FEATX_FIT_JSON", "1")
    assert json.loads(run("fit", tiny).stdout)["run"].startswith("export/")
    monkeypatch.setenv("FEATX_SWEEP_BACKBONE", "resnet19")
    assert "Did you mean resnet18" in run("sweep", tiny).stderr


def test_the_module_and_the_script_are_one_program() -> None:
    version = f"featx, version {featx.__version__}\n"
    script = Path(sys.executable).parent / "featx"
    for command in ([sys.executable, "-m", "featx"], [str(script)]):
        if Path(command[0]).exists():
            assert subprocess.run([*command, "--version"], capture_output=True, text=True).stdout == version


def test_a_closed_pipe_ends_without_an_error(here: Path) -> None:
    command = f"{sys.executable} -m featx backbones | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_every_command_has_help() -> None:
    assert len(cli.commands) >= 6
    for name, command in cli.commands.items():
        assert command.help, name
        assert run(name, "--help").exit_code == 0
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.opts[0].startswith("-")


TELLTALE = """
import sys, time
from click.testing import CliRunner
from featx.cli import cli
from featx.cli.base import Commands
from featx.errors import FeatxWarning

for line in sys.stdin.read().splitlines():
    done = CliRunner().invoke(cli, line.split())
    assert done.exit_code == 0, (line, done.output, done.exception)
time.sleep(float(sys.argv[1]))  # what is sent is collected first
"""
COMMANDS = """
extract data -b nets:tiny
fit data -b nets:tiny --output run
evaluate run data --factory nets:tiny
curve run --repeats 1 --factory nets:tiny
report run
sweep data -b nets:tiny --head ncm --output sweep --no-report
export run --factory nets:tiny
check run/model.onnx run --factory nets:tiny
predict run/model.onnx data
inspect run/model.onnx
backbones
cache list
cache info nets_tiny
cache verify
cache compact nets_tiny
cache export data features.h5 -b nets:tiny
cache remove memo --yes
"""
NETS = """
from torch import nn
from featx.pixels.preprocess import Preprocess

def tiny():
    return nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.AdaptiveAvgPool2d(1), nn.Flatten()), Preprocess(36, 32)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at what Linux's strace sees")
def test_no_command_asks_a_network_or_writes_into_the_home_folder(here: Path) -> None:
    (here / "nets.py").write_text(NETS)
    write_images(here / "data", per_class=20)
    home = here.parent / "home"
    home.mkdir()
    kept = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY" and not k.startswith("XDG_")}
    temporary = here.parent / "temporary"
    temporary.mkdir()
    kept.pop("MPLCONFIGDIR", None)
    kept |= {"HOME": str(home), "TMPDIR": str(temporary)}
    calls = here / "calls.txt"
    traced = ["strace", "-f", "-qq", "--seccomp-bpf", "-o", str(calls), "-e", "trace=socket,connect,sendto"]
    traces = bool(shutil.which("strace")) and not subprocess.run([*traced, "true"], capture_output=True).returncode
    command = [*(traced if traces else []), sys.executable, "-c", TELLTALE, "2" if traces else "0"]
    done = subprocess.run(command, input=COMMANDS.strip(), env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [str(path.relative_to(here.parent)) for top in (home, temporary) for path in top.rglob("*")] == []
    named = {line.split()[0] for line in COMMANDS.split("\n") if line}
    assert named == cli.commands.keys() - {"completion"} and named <= cli.commands.keys()
    if not traces:
        pytest.skip("nothing was written; what is asked of a network is seen by strace alone, which does not run here")
    assert not [line for line in calls.read_text().splitlines() if "AF_INET" in line]


def test_a_note_and_an_error_are_one_line_each_and_a_note_is_said_once() -> None:
    @click.group(cls=Commands)
    def group() -> None:
        pass

    @group.command()
    def twice() -> None:
        warnings.warn("old\nnote: forged", FeatxWarning, stacklevel=1)
        warnings.warn("old\nnote: forged", FeatxWarning, stacklevel=1)
        raise IsADirectoryError(errno.EISDIR, "Is a directory", "aside", None, "wanted\nError: forged")

    result = CliRunner().invoke(group, ["twice"])
    assert result.stderr == "note: old\\x0anote: forged\nError: Is a directory: wanted\\x0aError: forged\n"
    assert result.exit_code == 1


def test_a_full_disk_names_its_place_and_the_next_step() -> None:
    @click.group(cls=Commands)
    def group() -> None:
        pass

    @group.command()
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "export/run")

    result = CliRunner().invoke(group, ["full"])
    assert result.stderr == "Error: No space left on device: export/run; make room, then run the same command again\n"
    assert result.exit_code == 1
