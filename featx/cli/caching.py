"""Owns the commands about what is there: backbones, completion, and the cache's own."""

from __future__ import annotations

import click

from featx.cli._base import DONE, cli, emit, json_option


@click.command()
@click.argument("pattern", default="")
@json_option
def backbones(pattern: str, as_json: bool) -> int:
    """List the torchvision backbones; PATTERN keeps the names that contain it.

    timm networks (timm/NAME) and factories of your own (package.module:function) come on top.
    """
    from featx.backbones import listing

    rows = [row for row in listing() if pattern in row["name"]]
    if as_json:
        emit(rows)
        return DONE
    width = max([len(row["name"]) for row in rows], default=8)
    click.echo(f"{'backbone':<{width}}  features  parameters  input  weights")
    for row in rows:
        size, millions = row["features"], row["parameters"] / 1e6
        click.echo(
            f"{row['name']:<{width}}  {size:>8}  {millions:>8.1f} M  {row['crop']:>5}  {', '.join(row['weights'])}"
        )
    return DONE


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print a shell's completion script: eval "$(featx completion bash)"."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "featx", "_FEATX_COMPLETE").source())
    return DONE
