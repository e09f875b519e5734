"""Has every fault of tests/system/faults.py happen to a real server, and writes docs/reliability.md.

    python scripts/reliability.py [--only WORDS] [--again]

What was seen is kept in runs/reliability.json after each fault, so that a run that was stopped goes on; --again forgets
it. The page's table is made of that file alone. The exit code is 1 if an invariant failed, or a fault was not run yet.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from tests.system.faults import ALL, Fault, seen  # noqa: E402  # found by the path above
from tests.system.site import N_PHONES, Site  # noqa: E402  # likewise

KEPT = ROOT / "runs" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"
MARK = "<!-- made by scripts/reliability.py: nothing below is written by hand -->"


def key(fault: Fault) -> str:
    return f"{fault.group}: {fault.name}"


def page(kept: Mapping[str, Mapping[str, Any]]) -> str:
    """The part of the page that is made: a table for each group, and how much of it holds."""
    found = [kept[key(fault)] for fault in ALL if key(fault) in kept]
    lines = [
        MARK,
        "",
        f"{sum(one['holds'] for one in found)} of {len(ALL)} faults leave every invariant true; "
        f"{len(ALL) - len(found)} were not run. {N_PHONES} devices, {platform.system()}, Python "
        f"{platform.python_version()}.",
    ]
    for group in dict.fromkeys(fault.group for fault in ALL):
        lines += ["", f"### {group[:1].upper()}{group[1:]}", "", "| fault | must hold | observed |", "|---|---|---|"]
        for fault in ALL:
            if fault.group == group:
                one = kept.get(key(fault), {"holds": False, "observed": "not run yet", "figures": ""})
                told = f"{one['observed']}. {one['figures']}".strip(" .").replace("|", "\\|").replace("\n", " ")
                lines.append(f"| {fault.name} | {fault.must} | {told if one['holds'] else f'**{told}**'} |")
    return "\n".join(lines) + "\n"


def write(kept: Mapping[str, Mapping[str, Any]]) -> None:
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps(kept, indent=1))
    before = PAGE.read_text().partition(MARK)[0] if PAGE.exists() else "# Reliability\n\n"
    PAGE.write_text(before + page(kept))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORDS", help="faults whose name has one of these, divided by |")
    parser.add_argument("--again", action="store_true", help="also what was seen before")
    args = parser.parse_args()
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    chosen = [one for one in ALL if any(words in key(one) for words in args.only.split("|"))]
    for fault in chosen if args.again else ():
        kept.pop(key(fault), None)
    left = [fault for fault in chosen if not kept.get(key(fault), {}).get("holds")]
    if left:
        with tempfile.TemporaryDirectory(prefix="penchant-faults-") as folder:
            site = Site(Path(folder) / "prod")
            try:
                site.await_round(1)
                for fault in left:
                    one = seen(site, fault)
                    print(
                        "ok  " if one.holds else "FAIL", key(fault), f"({one.seconds:.0f} s):", one.observed, flush=True
                    )
                    print("     ", one.figures, flush=True)
                    now = json.loads(KEPT.read_text()) if KEPT.exists() else {}
                    kept = {**now, key(fault): {n: v for n, v in asdict(one).items() if n != "fault"}}
                    write(kept)
                    if not one.holds:
                        print(site.logs(), file=sys.stderr)
            finally:
                site.close()
    write(kept)
    return 0 if all(kept.get(key(fault), {}).get("holds") for fault in ALL) else 1


if __name__ == "__main__":
    sys.exit(main())
