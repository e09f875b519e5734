"""The subcommand `penchant enrol`: tokens that let devices in, how many are in, and taking one out. Light to import."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from penchant.common.cli import Command, Parser
from penchant.common.errors import InvalidConfig

if TYPE_CHECKING:
    from penchant.server.enrolment import Registry
    from penchant.server.folder import Folder

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def seconds(text: str) -> int:
    """A duration such as 24h, in seconds.

    >>> seconds("24h"), seconds("15m"), seconds("7d"), seconds("30s")
    (86400, 900, 604800, 30)

    Raises:
        InvalidConfig: none that is written so, or 0.
    """
    found = re.fullmatch("([1-9][0-9]{0,8})([smhd])", text)
    if found is None:
        raise InvalidConfig(f"{text!r} is no duration: write a whole number and s, m, h or d, such as 24h")
    return int(found[1]) * _UNITS[found[2]]


def command(registry: Callable[[Folder], Registry]) -> Command:
    """
    Args:
        registry: Flower's nodes of a folder's server; that which raises Unreachable where the server is not up.
    """

    def configure(parser: argparse.ArgumentParser) -> None:
        commands = parser.add_subparsers(dest="enrol", metavar="COMMAND", required=True, parser_class=Parser)

        def add(name: str, summary: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
            sub = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
            sub.add_argument(
                "folder", type=Path, nargs="?", default=Path(), metavar="DIR", help="of the server (default: this one)"
            )
            sub.set_defaults(run_enrol=run, parser=sub)
            return sub

        sub = add("token", "Print a new token, by which a device enrols.", _token)
        sub.add_argument("--ttl", default="24h", metavar="TIME", help="how long it is taken (default: 24h)")
        sub.add_argument("--uses", type=int, default=1, metavar="N", help="devices that it lets in (default: 1)")
        sub.add_argument(
            "--subject-stdin",
            action="store_true",
            help="read from stdin what your backend calls the person: who enrols again gets the same place",
        )
        sub = add("ls", "Show how many places are taken and how many tokens are open.", _ls)
        sub.add_argument("--json", action="store_true", help="one JSON object on stdout")
        sub = add("revoke", "Take a device out, for ever.", lambda args: _revoke(args, registry))
        sub.add_argument("--place", type=int, required=True, metavar="N", help="which, as its person was told")

    return Command(
        "Let devices into a population, or take one out.",
        "  penchant enrol token prod/ --ttl 24h\n  penchant enrol ls prod/\n  penchant enrol revoke prod/ --place 7",
        configure,
        lambda args: int(args.run_enrol(args)),
    )


def _token(args: argparse.Namespace) -> int:
    from penchant.server.enrolment import NotRunning, Roster
    from penchant.server.folder import Folder

    subject = sys.stdin.read().strip() if args.subject_stdin else None
    if subject == "":
        raise InvalidConfig("stdin held no subject: what your backend calls the person, on one line")
    made = Roster.of(Folder(args.folder), NotRunning()).mint(ttl_s=seconds(args.ttl), uses=args.uses, subject=subject)
    print(made.text)
    times = "once" if args.uses == 1 else f"{args.uses} times"
    again = "" if subject is None else "; the same person's device gets the same place"
    print(f"it is taken {times} within {args.ttl}, and shown only here{again}", file=sys.stderr)
    return 0


def _ls(args: argparse.Namespace) -> int:
    from penchant.server.enrolment import NotRunning, Roster
    from penchant.server.folder import Folder

    found = Roster.of(Folder(args.folder), NotRunning()).funnel()
    if args.json:
        print(json.dumps({**asdict(found), "revoked": found.revoked, "free": found.free}))
        return 0
    print(f"places   {found.taken} of {found.places} taken, {found.free} free")
    waiting = f", {found.unregistered} of them not registered with Flower yet" if found.unregistered else ""
    print(f"devices  {found.live} enrolled{waiting}, {found.revoked} revoked")
    print(f"tokens   {found.tokens} open, for {found.uses} devices")
    return 0


def _revoke(args: argparse.Namespace, registry: Callable[[Folder], Registry]) -> int:
    from penchant.server.enrolment import Roster
    from penchant.server.folder import Folder

    folder = Folder(args.folder)
    told = Roster.of(folder, registry(folder)).revoke_place(args.place)
    rest = "Flower took the node out" if told else "Flower is not running and takes the node out when it starts"
    print(f"no round asks the device on place {args.place} any more; {rest}", file=sys.stderr)
    return 0


def _flower(folder: Folder) -> Registry:
    from penchant.server.registrar import Registrar

    return Registrar(folder)


enrol = command(_flower)
