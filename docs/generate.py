"""Write `docs/cli.md` from the commands themselves; `make docs`. A test compares the page with them."""

from __future__ import annotations

from pathlib import Path

import click

from featx import learning
from featx.cli import cli
from featx.cli.base import SHOWN

PAGE = Path(__file__).parent / "cli.md"


def pages(command: click.Command, words: list[str]) -> list[str]:
    """One section for a command and each command in it."""
    context = click.Context(command, info_name=" ".join(words), terminal_width=100, **SHOWN)
    text = f"## {' '.join(words)}\n\n```text\n{command.get_help(context)}\n```\n"
    if not isinstance(command, click.Group):
        return [text]
    return [text, *(page for name, sub in command.commands.items() for page in pages(sub, [*words, name]))]


ANSWERS = (
    "`threshold=0.8` rejects an answer whose probability is below 0.8. `reject=0.95` finds the threshold from which on",
    "answers are right 95 times in 100, on held-out folds of the training images: give the accuracy that you want, not",
    "the share of images to reject. The pretrained head finds the network's class by a label's name, or by its WordNet",
    "id (`n02219486`) where the network knows ImageNet's 1,000 classes.",
)


def settings() -> str:
    """What `--set` takes, head by head, with the defaults."""
    rows = ["## Settings of the heads", "", "`--set NAME=VALUE`, repeatable; each is explained in the docstring of"]
    rows += ["`featx.heads.<head>.fit`.", "", *ANSWERS, "", "| head | settings and defaults |", "|---|---|"]
    for name in learning.names():
        shown = []
        for key, parameter in learning.settings_of(name).items():
            default = parameter.default
            some = f"{len(default)} values" if isinstance(default, tuple) and len(default) > 4 else repr(default)
            shown.append(f"`{key}` ({some})")
        rows.append(f"| `{name}` | {', '.join(shown)} |")
    return "\n".join([*rows, ""])


def render() -> str:
    """The whole page."""
    head = "# Command line\n\nWritten by `make docs` from `featx --help` and its commands; do not edit.\n"
    return "\n".join([head, *pages(cli, ["featx"]), settings()])


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
