"""Owns the commands about what is there: cache, backbones, completion."""

from __future__ import annotations

import click

from featx.cli._base import DONE, cache_option, cli, emit, json_option, say


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print the completion script of a shell: eval "$(featx completion bash)"."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "featx", "_FEATX_COMPLETE").source())
    return DONE
