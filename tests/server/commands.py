"""Runs one command as the `penchant` command line would, without an entry point of its own."""

from __future__ import annotations

import sys

from penchant.common import cli
from penchant.common.cli import Command, Parser
from penchant.common.errors import PenchantError


def run(command: Command, *argv: str) -> int:
    """The exit code; an error of ours is one line on stderr."""
    parser = Parser(prog="penchant", allow_abbrev=False)
    command.configure(parser)
    try:
        return command.run(parser.parse_args(argv))
    except PenchantError as error:
        return cli._fail(error)
    except SystemExit as stopped:
        print(end="", file=sys.stderr)
        return int(stopped.code or 0)
