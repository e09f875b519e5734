"""The subcommand `penchant serve`: makes an operator's folder, and runs and stops its server. Light to import."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

from penchant.common.cli import EXIT_ERROR, Command, Parser
from penchant.common.errors import InvalidConfig


def _configure(parser: argparse.ArgumentParser) -> None:
    from penchant.server.init import configure_init, run_init

    commands = parser.add_subparsers(dest="serve", metavar="COMMAND", required=True, parser_class=Parser)
    sub = commands.add_parser(
        "init", help=(words := "Make an operator's folder."), description=words, allow_abbrev=False
    )
    configure_init(sub)
    sub.set_defaults(run_serve=run_init, parser=sub)
    for name, summary, run in (
        ("up", "Run the server: Flower's SuperLink, services, the proxy, and the round loop.", _up),
        ("down", "Stop a server that runs in the background, and whatever a killed one left.", _down),
    ):
        sub = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.add_argument("folder", type=Path, metavar="DIR", help="the operator's folder")
        if name == "up":
            sub.add_argument("--detach", action="store_true", help="run in the background; return once it is up")
        sub.set_defaults(run_serve=run, parser=sub)


def _run(args: argparse.Namespace) -> int:
    code: int = args.run_serve(args)
    return code


def _up(args: argparse.Namespace) -> int:
    from penchant.server import logs
    from penchant.server.folder import Folder
    from penchant.server.supervisor import Supervisor

    folder = Folder(args.folder)
    if args.detach:
        return _detached(folder.path)
    logs.configure("supervisor", folder.logs / "supervisor.jsonl")
    supervisor = Supervisor(folder)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: supervisor.stop())
    at = folder.settings.addresses
    supervisor.up(
        on_ready=lambda: print(
            f"up: devices reach {at.public}, the operator http://{at.operator}/ui; Ctrl-C stops it", flush=True
        )
    )
    return 0


def _detached(path: Path) -> int:
    from penchant.server.folder import Folder
    from penchant.server.supervisor import held

    folder = Folder(path)
    if held(folder.run / "supervisor.lock"):
        raise InvalidConfig(f"{path} is up already: penchant serve down {path}")
    out = folder.logs / "supervisor.log"
    with out.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "penchant.common.cli", "serve", "up", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    while process.poll() is None:
        said = out.read_text(errors="replace").strip()
        if said.startswith("up: "):
            print(said.splitlines()[0].replace("Ctrl-C stops it", f"penchant serve down {path} stops it"))
            return 0
        time.sleep(0.1)
    print(out.read_text(errors="replace").strip() or f"the server ended; see {out}", file=sys.stderr)
    return process.returncode or EXIT_ERROR


def _down(args: argparse.Namespace) -> int:
    from penchant.server.folder import Folder
    from penchant.server.supervisor import down

    if not down(Folder(args.folder)):
        raise InvalidConfig(f"{args.folder} is not up")
    print("down")
    return 0


serve = Command(
    "Make an operator's folder, and run its server.",
    "  penchant serve init prod/ --host films.example\n  penchant serve up prod/ --detach\n  penchant serve down prod/",
    _configure,
    _run,
)
