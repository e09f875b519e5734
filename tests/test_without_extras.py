"""A device installs the base alone: all that it runs must import, and the command line must answer, without extras."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ["torch", "flwr", "scipy", "dp_accounting", "opacus", "polars", "rich"]
BLOCK = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRAS}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

assert not set({EXTRAS}) & set(sys.modules)
sys.meta_path.insert(0, Blocked())
"""
IMPORT_ALL = (
    BLOCK
    + """
import importlib, json

missing = {}
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
    except ImportError as error:
        missing[module] = str(error)
print(json.dumps(missing))
"""
)
HELP = (
    BLOCK
    + """
import runpy

sys.argv = ["penchant", "--help"]
runpy.run_module("penchant.common.cli", run_name="__main__")
"""
)


def device_modules() -> list[str]:
    """Every module of client and common, less those that exist to use an extra: neural learners and `_flower`."""
    found = []
    for part in ("common", "client"):
        for path in sorted(ROOT.glob(f"{part}/penchant/**/*.py")):
            module = path.relative_to(ROOT / part).with_suffix("").as_posix().replace("/", ".")
            if not module.startswith("penchant.common.learners.neural") and path.stem != "_flower":
                found.append(module.removesuffix(".__init__"))
    return found


def missing(modules: list[str], path: Path = ROOT) -> dict[str, str]:
    """Which of `modules` cannot be imported without the extras, each with its error."""
    done = _python(IMPORT_ALL, *modules, path=path)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def _python(code: str, *args: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code, *args]
    return subprocess.run(command, cwd=path, capture_output=True, text=True, timeout=60, check=False)


def test_the_device_imports_every_module_without_any_extra() -> None:
    modules = device_modules()
    assert "penchant.common.interactions" in modules
    assert missing(modules) == {}


def test_a_module_that_needs_an_extra_is_reported(tmp_path: Path) -> None:
    (tmp_path / "light.py").write_text("import json\n")
    (tmp_path / "heavy.py").write_text("import json\nimport scipy.stats\n")
    assert missing(["light", "heavy"], tmp_path) == {"heavy": "scipy is blocked"}


def test_the_command_line_answers_help_without_any_extra() -> None:
    done = _python(HELP)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: penchant")
