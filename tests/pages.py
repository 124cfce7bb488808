"""Runs the examples of a Markdown page, in the order of the page, in a working folder made for it.

| block | what is done |
|---|---|
| `python`, first line `# some/file.py` | the block is written to that file of the working folder |
| `python` | it is executed; all blocks of a page share their names |
| `pycon` | doctest: it must print what stands there (`...` stands for anything) |
| `console` | each `$ featx ...` is run, and must exit with 0, or what `# exit 3` at its end says |

A line shown after a command must be in its output, numbers and the width of gaps aside; a line `...` leaves some
out. Other commands and other blocks are left alone. A trailing `\\` continues a command, `> FILE` keeps its standard
output, and globs are filled in as a shell does.
"""

from __future__ import annotations

import doctest
import glob
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner
from photo_run import photo_run

from featx import backbones, engines, heads, sources
from featx.cli import cli

PLUGINS: tuple[ModuleType, ...] = (backbones, engines, heads, sources)
NUMBER = re.compile(r"(?<![\w./-])[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?(?![\w/])")


@dataclass
class Ran:
    """How much of a page was run; a test asks for at least some of each."""

    files: int = 0
    python: int = 0
    doctests: int = 0
    commands: int = 0


def working_folder(patch: pytest.MonkeyPatch, photos: Path, weights: Path, folder: Path) -> Path:
    """Go to a fresh folder with `photos/` (100 ants and bees), the pretrained SqueezeNet 1.1 at hand.

    Files of plug-in folders (`featx/heads/x.py`) in it count as if they were featx's own. The exported
    backbone is taken over from another run of the session, for the time that it takes; no feature is.
    """
    base = photo_run(photos, weights)
    shutil.copytree(base / "photos", folder / "photos")
    shutil.copytree(base / "cache" / "engines", folder / "cache" / "engines")
    patch.chdir(folder)
    patch.setenv("TORCH_HOME", str(base / "torch"))
    patch.setattr(sys, "path", [*sys.path, str(folder)])
    for package in PLUGINS:
        mine = folder / "featx" / package.__name__.rpartition(".")[2]
        patch.setattr(package, "__path__", [*package.__path__, str(mine)])
    return folder


def run_page(page: Path) -> Ran:
    """Run a page in the current folder. Raises `AssertionError` naming the block that does not hold."""
    text, ran, names = page.read_text(encoding="utf-8"), Ran(), {"__name__": "page"}
    before = set(sys.modules)
    try:
        for block in re.finditer(r"^```(\w+)[^\n]*\n(.*?)^```$", text, re.M | re.S):
            where = f"{page.name}:{text.count(chr(10), 0, block.start()) + 1}"
            _run_block(block[1], block[2], names, where, ran)
    finally:
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).is_relative_to(Path.cwd()):
                del sys.modules[name]
    return ran


def _run_block(language: str, body: str, names: dict[str, Any], where: str, ran: Ran) -> None:
    if language == "python":
        file = re.match(r"# ([\w./-]+\.py)$", body.partition("\n")[0])
        if file:
            Path(file[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(file[1]).write_text(body, encoding="utf-8")
            ran.files += 1
        else:
            exec(compile(body, where, "exec"), names)
            ran.python += 1
    elif language == "pycon":
        ran.doctests += _doctest(body, names, where)
    elif language == "console":
        for command, shown in _commands(body):
            _run_command(command, shown, where)
            ran.commands += 1


def _doctest(body: str, names: dict[str, Any], where: str) -> int:
    test = doctest.DocTestParser().get_doctest(body, names, where, where, 0)
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    report: list[str] = []
    result = runner.run(test, out=report.append, clear_globs=False)
    names.update(test.globs)
    assert not result.failed, "".join(report)
    return result.attempted


def _commands(body: str) -> list[tuple[str, list[str]]]:
    """Each `$ featx` command of a block, with the lines shown after it."""
    found: list[tuple[str, list[str]]] = []
    ours = False
    for line in re.sub(r"\\\n\s*", "", body).splitlines():
        if line.startswith("$ "):
            ours = line.startswith("$ featx ")
            if ours:
                found.append((line.removeprefix("$ featx "), []))
        elif ours and line.strip() not in ("", "..."):
            found[-1][1].append(line)
    return found


def _run_command(command: str, shown: list[str], where: str) -> None:
    code = re.search(r"# exit (\d+)$", command)
    words = shlex.split(command, comments=True)
    file = words[-1] if words[-2:-1] == [">"] else None
    if file:
        words = words[:-2]
    arguments = [path for word in words for path in (sorted(glob.glob(word)) or [word])]
    result = CliRunner().invoke(cli, arguments)
    named = f"{where}: featx {command}\n{result.output}"
    assert result.exception is None or isinstance(result.exception, SystemExit), f"{named}{result.exception!r}"
    assert result.exit_code == (int(code[1]) if code else 0), named
    if file:
        Path(file).write_text(result.stdout, encoding="utf-8")
    printed = {_masked(line) for line in result.output.splitlines()}
    for line in shown:
        assert _masked(line) in printed, f"{named}\ndoes not say: {line}"


def _masked(line: str) -> str:
    return " ".join(NUMBER.sub("0", line).split())
