"""Holds the direction of imports: common ← client, common ← server; only simulations may import all three.

Read from the syntax tree, so an import inside a function or behind TYPE_CHECKING counts like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "common": {"common"},
    "client": {"client", "common"},
    "server": {"server", "common"},
    "simulations": {"simulations", "common", "client", "server"},
}


def sources(root: Path) -> list[Path]:
    """Every module of the four parts, as paths relative to `root`."""
    return sorted(p.relative_to(root) for part in MAY_IMPORT for p in root.glob(f"{part}/penchant/**/*.py"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything that a module imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)


def refused(path: Path, name: str) -> str | None:
    """Why the module at `path` may not import `name`; None when it may."""
    part, (top, *rest) = path.parts[0], name.split(".")
    if not top:
        return "imports are absolute"
    if top == "penchant" and rest[0] not in MAY_IMPORT[part]:
        return f"{part} may not import {rest[0]}"
    if top == "torch" and part != "simulations" and path.parts[:5] != _NEURAL:
        return "torch is only for common/penchant/common/learners/neural and simulations"
    if top == "flwr" and path.name != "_flower.py":
        return "flwr is only for _flower.py"
    return None


_NEURAL = ("common", "penchant", "common", "learners", "neural")


def breaches(root: Path) -> list[str]:
    """Each import that breaks a rule, as "path:line: name: rule"."""
    return [
        f"{path.as_posix()}:{line}: {name}: {why}"
        for path in sources(root)
        for line, name in imported(root / path)
        if (why := refused(path, name))
    ]


def test_imports_go_in_one_direction_and_extras_stay_in_their_place() -> None:
    assert sources(ROOT)
    assert breaches(ROOT) == []


def test_a_planted_breach_of_each_rule_is_caught(tmp_path: Path) -> None:
    planted = {
        "common/penchant/common/a.py": "import penchant.client.store",
        "common/penchant/common/wire.py": "def read():\n    import torch",
        "common/penchant/common/learners/neural/mf.py": "import torch.nn\nfrom flwr import client",
        "client/penchant/client/b.py": "from penchant import server",
        "client/penchant/client/_flower.py": "import flwr",
        "server/penchant/server/c.py": "from penchant.simulations.data import dataset",
        "server/penchant/server/d.py": "from . import c",
        "simulations/penchant/simulations/e.py": "import torch\nimport penchant.server, penchant.client",
    }
    for path, text in planted.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text + "\n")
    assert [breach.split(": ")[0] for breach in breaches(tmp_path)] == [
        "client/penchant/client/b.py:1",
        "common/penchant/common/a.py:1",
        "common/penchant/common/learners/neural/mf.py:2",
        "common/penchant/common/wire.py:2",
        "server/penchant/server/c.py:1",
        "server/penchant/server/d.py:1",
    ]


def test_the_wire_imports_neither_torch_nor_flower() -> None:
    names = {
        name.split(".")[0]
        for path in sources(ROOT)
        if path.stem == "wire" or "wire" in path.parts
        for _, name in imported(ROOT / path)
    }
    assert not names & {"torch", "flwr"}


def test_penchant_is_a_namespace_that_no_part_owns() -> None:
    assert not list(ROOT.glob("*/penchant/__init__.py"))
