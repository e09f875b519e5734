"""docs/operate.md does what it says: its commands run in order against a real server, its tables list what is there."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from penchant.common.cli import parser
from penchant.server.database import Database
from tests.system.production import ROOT, free_ports
from tests.test_repository import Fence, commands, fences, make_targets, refusals

TEXT = (ROOT / "docs" / "operate.md").read_text(encoding="utf-8")
NOT_RUN = {
    "needs root",
    "needs root and systemd",
    "needs a container engine",
    "needs another machine",
    "tests/system/test_production.py runs a server and such devices for several minutes",
}
PORT = 8443
"""The first of four in the document; where it is run, four free ones take their places."""


class Terminal:
    """Somebody's, in an empty folder: it stops at the first command that fails."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_ports(4)
        programs = folder.parent / "programs"
        programs.mkdir()
        parts = os.pathsep.join(str(ROOT / part) for part in ("common", "client", "server", "simulations"))
        (programs / "penchant").write_text(f'#!/bin/sh\nexec {sys.executable} -m penchant.common.cli "$@"\n')
        (programs / "penchant").chmod(0o755)
        self.environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": parts}

    def run(self, code: str) -> str:
        for n in range(4):
            code = code.replace(str(PORT + n), str(self.port + n))
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{self._logs()}"
        return done.stdout

    def _logs(self) -> str:
        return "\n".join(
            f"{path}:\n{path.read_text(errors='replace')[-2000:]}" for path in self.folder.glob("*/logs/*")
        )


def names_of_files(text: str) -> list[str]:
    """What the lines of each CSV block are to be called, in order."""
    return re.findall(r"these\s+lines as `(\w+\.csv)`", text)


def test_every_command_does_its_work_in_order(tmp_path: Path) -> None:
    (folder := tmp_path / "empty").mkdir()
    terminal, files = Terminal(folder), iter(names_of_files(TEXT))
    said, began = dict[str, str](), time.monotonic()
    try:
        for block in fences(TEXT):
            if block.language == "csv":
                (folder / next(files)).write_text(block.code, encoding="utf-8")
            if block.language == "sh" and not block.not_run:
                started = time.monotonic()
                said[block.code] = terminal.run(block.code)
                print(f"line {block.line}: {time.monotonic() - started:.1f} s")
    finally:
        for path in folder.glob("*/server.toml"):
            down = ["penchant", "serve", "down", str(path.parent)]
            subprocess.run(down, env=terminal.environment, capture_output=True, timeout=60, check=False)
    print(f"all in {time.monotonic() - began:.0f} s")
    check(said)


def check(said: dict[str, str]) -> None:
    """What the commands printed, by their blocks."""

    def of(words: str) -> str:
        (found,) = [out for code, out in said.items() if words in code]
        return found

    assert "Not safe yet" in of("serve init")
    assert len(re.findall(r"\bpt_[\w-]{43}\b", of("enrol token"))) == 2
    assert re.fullmatch(r'\{"token": "pt_[\w-]{43}", "expires_ms": \d+\}\n', of("/v1/tokens"))
    assert "no more rounds are wanted" in of("round pause")
    assert of("model promote").count("stable has version 3") == 2
    assert "OK" in of("restore prod.backup --verify")
    assert "restored" in of("--to again/")
    assert "rounds are paused" not in of("--to again/"), "the newest ledger goes on"
    assert "serial 3" in of("keys compromised")
    assert "MEND" not in "".join(out for code, out in said.items() if "doctor" in code)
    printed = {re.sub(r"_(total|info)$", "", name) for name in re.findall(r"^penchant_(\w+)", of("/metrics"), re.M)}
    (table,) = re.findall(r"each beginning with `penchant_` \| \|\n\|---\|---\|\n((?:\|.*\n)+)", TEXT)
    listed = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert printed - listed == set()
    assert listed - printed <= {"epsilon_budget"}, "which a server without a budget has not"


def test_what_is_not_run_says_why() -> None:
    shell = [block for block in fences(TEXT) if block.language == "sh"]
    assert {block.not_run for block in shell if block.not_run} == NOT_RUN
    assert sum(not block.not_run for block in shell) == 13


def test_what_is_not_run_is_at_least_a_command_that_there_is() -> None:
    blocks = [replace(block, not_run="") for block in fences(TEXT) if block.not_run]
    assert refusals(blocks, parser(), make_targets()) == []
    inside = [words for block in blocks for words in commands(block) if words[0] == "docker"]
    ours = [words[words.index(verb) :] for words in inside for verb in ("serve", "round") if verb in words]
    assert [words[:2] for words in ours] == [["serve", "init"], ["round", "status"]]
    for words in ours:
        parser().parse_args(words)


def test_a_command_that_fails_is_found(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    terminal = Terminal(tmp_path / "empty")
    block = Fence(line=1, language="sh", code="penchant doctor prod/ | cat\ntrue\n", not_run="")
    with pytest.raises(AssertionError, match="serve init"):
        terminal.run(block.code)
    assert terminal.run("echo 8443 8446") == f"{terminal.port} {terminal.port + 3}\n"


def test_every_stored_field_is_in_the_table_of_what_is_kept(tmp_path: Path) -> None:
    Database.make(tmp_path / "server.db")
    db = sqlite3.connect(tmp_path / "server.db")
    tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    stored = {name: {row[1] for row in db.execute(f"PRAGMA table_info({name})")} for name in tables}
    db.close()
    section = TEXT.partition("## What is kept")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)`: ([^|]+) \|", section, re.M)
    assert {name: set(re.findall(r"`(\w+)`", columns)) for name, columns in rows} == stored
