"""docs/models.md does what it says: its files are taken, its commands run in order, its settings are read."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from penchant.common import config
from penchant.server.catalogue_command import catalogue
from penchant.server.folder import Folder, ModelSettings
from penchant.server.model_command import model
from tests.server.commands import run
from tests.server.models import Server
from tests.test_repository import ROOT, commands, fences

TEXT = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def test_every_command_of_the_document_does_its_work_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    server = Server.make(tmp_path / "prod")
    server.checkpoint(1)
    server.add(1)
    names, n_run = iter(re.findall(r"these(?: lines)? as `(\w+\.csv)`", TEXT)), 0
    for block in fences(TEXT):
        if block.language == "csv":
            Path(next(names)).write_text(block.code, encoding="utf-8")
        if block.language == "sh":
            for _, name, *words in commands(block):
                assert run({"model": model, "catalogue": catalogue}[name], *words) == 0, words
                n_run += 1
    assert n_run == 14
    assert server.registry().verify() == []
    found = Folder(server.folder.path).path / "catalogue.json"
    assert '"film:7"' in found.read_text(encoding="utf-8").partition('"retired"')[2]


def test_the_settings_of_the_document_are_settings() -> None:
    (block,) = [block for block in fences(TEXT) if block.language == "toml"]
    assert config.decode(ModelSettings, tomllib.loads(block.code)["models"]).promote == "automatic"
