"""The subcommand `penchant audit`: what attacks on a finished run's private rows show. Light to import."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penchant.common.cli import Command
from penchant.common.errors import PrivacyRefused

if TYPE_CHECKING:
    from rich.table import Table

    from penchant.simulations.runs import RunFolder

CANARIES = 4000
CONFIDENCE = 0.999


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", dest="folder", type=Path, required=True, metavar="DIR", help="folder of a finished run"
    )
    parser.add_argument("--row", help="one private row (default: all of them)")
    parser.add_argument("--canaries", type=int, default=CANARIES, metavar="M", help=f"how many (default: {CANARIES})")
    parser.add_argument(
        "--confidence", type=float, default=CONFIDENCE, help=f"of each lower bound (default: {CONFIDENCE})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of coins and noise (default: 0)")
    parser.add_argument("--json", action="store_true", help="audit.json on stdout; talk stays on stderr")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, no table")


def _run(args: argparse.Namespace) -> int:
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # before NumPy loads: nodes run in threads, and pools within them only wait
    from penchant.simulations.runs import RunFolder

    run_audit(
        RunFolder(args.folder),
        row=args.row,
        canaries=args.canaries,
        confidence=args.confidence,
        seed=args.seed,
        as_json=args.json,
        quiet=args.quiet,
    )
    return 0


def run_audit(
    folder: RunFolder,
    *,
    seed: int,
    quiet: bool,
    as_json: bool = False,
    row: str | None = None,
    canaries: int = CANARIES,
    confidence: float = CONFIDENCE,
) -> None:
    """Audits the run and prints what was found.

    Raises:
        PrivacyRefused: a row shows more than it claims; all was written and printed before.
    """
    from rich.console import Console

    from penchant.simulations.audit.audit import audit as audit_rows

    talk = Console(stderr=True, quiet=quiet)
    record = audit_rows(
        folder,
        row=row,
        canaries=canaries,
        confidence=confidence,
        seed=seed,
        told=lambda name: talk.print(f"auditing {name}", highlight=False),
    )
    if as_json:
        print(json.dumps(record, ensure_ascii=False))
    elif not quiet:
        Console().print(_table(record))
    if broken := [one["name"] for one in record["rows"] if not one["holds"]]:
        where = folder.path / "audit.json"
        raise PrivacyRefused(f"{', '.join(broken)} shows more than it claims: do not release it (see {where})")


def _table(record: Mapping[str, Any]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from penchant.simulations.audit.bounds import rounded_down
    from penchant.simulations.tables import epsilon, guarantee, percent

    table = Table(
        title=Text("Audit", style="bold"),
        title_justify="left",
        title_style="",
        caption_justify="left",
        caption_style="",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", overflow="fold")
    for title in ("claim\nε ≤", "shown\nε ≥", "at\nmost", "one run\nε ≥", "at\nmost"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for title in ("AUC", "TPR at\n0.1 %, %"):
        table.add_column(title, justify="right", no_wrap=True)
    notes = [
        f"Shown: ε is no less, with confidence {100 * record['confidence']:g} % for each bound; at most: had every "
        "canary been told apart. AUC and TPR are of membership inference, and no bound."
    ]
    for n, one in enumerate(record["rows"], 1):
        seen, attack = one["canaries"], one["membership"]
        cells = (
            one["name"],
            f"{epsilon(one['privacy']['epsilon'])} ({n})",
            *(rounded_down(seen[k]) for k in ("epsilon_lower", "epsilon_ceiling", "one_run", "one_run_ceiling")),
            "holds" if one["holds"] else "BROKEN",
            f"{attack['auc']:.2f}",
            percent(attack["tpr"]["value"], 1),
        )
        table.add_row(*map(Text, cells))
        more = f". {attack['note']}" if attack["note"] else ""
        notes.append(f"({n}) {seen['canaries']:,} canaries against {guarantee(one['privacy'])}{more}")
    table.caption = Text("\n".join(("", *notes)))
    return table


audit = Command(
    "Attack a finished run's private rows with canaries, and hold what that shows against what they claim.",
    "  penchant audit --run runs/a\n  penchant audit --run runs/a --row co-occurrence --canaries 10000 --json",
    _configure,
    _run,
)
