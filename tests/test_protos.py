"""What was generated from each .proto is what its text gives now."""

from __future__ import annotations

from pathlib import Path

from scripts import protos


def test_generated_messages_are_those_of_the_proto(tmp_path: Path) -> None:
    for made in protos.generate(tmp_path):
        kept = protos.ROOT / "common" / made.relative_to(tmp_path)
        assert made.read_text(encoding="utf-8") == kept.read_text(encoding="utf-8"), "run scripts/protos.py"
