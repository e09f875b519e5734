"""The `penchant` command: finds the subcommands that are installed, runs one, and turns errors into exit codes.

Each part registers its subcommands in the entry-point group "penchant.commands". An entry is a `Command`; its module is
light to import, and what it needs is loaded when it runs, so that `--help` is quick and works without the extras.

Exit codes: 0 done; 1 an error of ours that none below fits; 2 an option, config or extra to mend, nothing written;
3 data that cannot be read; 4 refused for privacy; 130 interrupted. Data goes to stdout, talk to stderr.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from penchant.common.config import did_you_mean
from penchant.common.errors import InvalidConfig, MalformedData, MissingExtra, PenchantError, PrivacyRefused

GROUP = "penchant.commands"
EXIT_ERROR, EXIT_USAGE, EXIT_DATA, EXIT_PRIVACY, EXIT_INTERRUPTED = 1, 2, 3, 4, 130


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        summary: one line for the list of commands.
        examples: command lines, shown first in its help.
        configure: adds its arguments to a parser.
        run: does it; what it returns is the exit code.
    """

    summary: str
    examples: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line that says how to mend it."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments:"):
            unknown = message.split()[2].split("=")[0]
            known = [o for action in self._actions for o in action.option_strings]
            message = f"unknown argument {unknown}"
            if unknown.startswith("-"):
                message = f"unknown option {unknown}{did_you_mean(unknown, known)}"
        if message.startswith("argument COMMAND: invalid choice:"):
            unknown = message.split("'")[1]
            known = [name for action in self._actions if isinstance(action.choices, dict) for name in action.choices]
            message = f"unknown command {unknown!r}{did_you_mean(unknown, known)}"
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)


def parser() -> argparse.ArgumentParser:
    """The whole command line, every installed subcommand in it."""
    top = Parser(
        prog="penchant",
        description="Interest models that learn what people like without collecting what they do.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"penchant {version()}")
    top.add_argument("--debug", action="store_true", help="show where an error came from")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: e.name):
        command: Command = entry.load()
        sub = commands.add_parser(
            entry.name,
            help=command.summary,
            description=f"{command.summary}\n\nexamples:\n{command.examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.configure(sub)
        sub.set_defaults(run=command.run, parser=sub)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; for errors it prints one line to stderr."""
    top = parser()
    args, unknown = top.parse_known_args(argv)
    if unknown:
        getattr(args, "parser", top).error(f"unrecognized arguments: {unknown[0]}")
    if args.command is None:
        top.print_help()
        return 0
    try:
        code: int = args.run(args)
        return code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except ModuleNotFoundError as error:
        if args.debug or (error.name or "penchant").split(".")[0] == "penchant":
            raise
        return _fail(MissingExtra("simulations", error.name or "a module"))
    except PenchantError as error:
        if args.debug:
            raise
        return _fail(error)


def version() -> str:
    """Of the installed package."""
    return importlib.metadata.version("penchant")


def _fail(error: PenchantError) -> int:
    print(f"penchant: {error}", file=sys.stderr)
    match error:
        case InvalidConfig() | MissingExtra():
            return EXIT_USAGE
        case MalformedData():
            return EXIT_DATA
        case PrivacyRefused():
            return EXIT_PRIVACY
        case _:
            return EXIT_ERROR


if __name__ == "__main__":
    sys.exit(main())
