"""The command line: each command turns its options into one library call. `--help` imports nothing heavy."""

from __future__ import annotations

from featx.cli.base import cli, name_variables
from featx.cli.caching import backbones, cache, completion
from featx.cli.shipping import check, export, inspect, predict
from featx.cli.training import curve, evaluate, extract, fit, report, sweep

learning, shipping = (extract, fit, evaluate, report, curve, sweep), (export, check, predict, inspect)
for command in (*learning, *shipping, backbones, cache, completion):
    cli.add_command(command)
    name_variables(command)
main = cli
