"""`penchant simulate --engine fleet`: what devices did on a running server, as a table or JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from penchant.common.cli import EXIT_ERROR
from penchant.common.errors import InvalidConfig
from penchant.simulations.commands import embedded_or_synthetic
from penchant.simulations.fleet import Device, run_fleet, server_at
from penchant.simulations.settings import SimulationConfig
from penchant.simulations.simulate import load_data


def run(args: argparse.Namespace) -> int:
    """
    Raises:
        InvalidConfig: no --url, or a number that cannot be.
    """
    if not args.url:
        raise InvalidConfig("--engine fleet needs --url: an operator's folder, or https://host:port")
    if args.devices < 1 or not 0 < args.wait < float("inf"):
        raise InvalidConfig("--devices must be ≥ 1, and --wait a number of seconds > 0")
    chosen = {name: value for name in ("data", "items") if (value := getattr(args, name)) is not None}
    settings = dataclasses.replace(SimulationConfig(), **chosen)
    data = load_data(settings if "data" in chosen else embedded_or_synthetic(settings))
    server = server_at(args.url, bundle=args.bundle, token=args.token)

    def told(device: Device, line: dict[str, Any]) -> None:
        if not args.quiet and not args.json:
            print(f"user {device.user}: {_words(line)}", file=sys.stderr)

    devices = run_fleet(
        data, server, args.devices, rounds=args.rounds or _planned(server.bundle), wait_s=args.wait, told=told
    )
    if args.json:
        print(json.dumps([{**dataclasses.asdict(device), "changed": device.changed} for device in devices]))
    elif not args.quiet:
        _print(devices)
    return 0 if all(device.rounds and not device.error for device in devices) else EXIT_ERROR


def _planned(bundle: Any) -> int:
    """Rounds that one profile takes part in under the app's plan."""
    from penchant.common.artifacts.bundle import Bundle
    from penchant.common.privacy.plan import PrivacyPlan

    return PrivacyPlan.from_json(Bundle.read(bundle).manifest.plan).max_participations


def _words(line: dict[str, Any]) -> str:
    match line["said"]:
        case "list":
            return f"a list by model {line['version']}"
        case "rounds":
            return f"took part in rounds {', '.join(map(str, line['rounds']))}"
        case "error":
            return f"ended: {line['why']}"
        case said:
            return str(said)


def _print(devices: list[Device]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Devices", title_justify="left")
    for column in ("User", "Rounds", "Model", "New in its list of ten", "Ended early because"):
        table.add_column(column, justify="right" if column in ("Model", "New in its list of ten") else "left")
    for one in devices:
        rounds = ", ".join(map(str, one.rounds)) or "none"
        table.add_row(*map(Text, (one.user, rounds, str(one.version), str(one.changed), one.error)))
    Console().print(table)
