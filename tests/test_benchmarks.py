"""Benchmarks gate nothing; that they still run is tested, at a size that measures nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def test_the_noise_benchmark_names_each_way_and_its_ratio() -> None:
    command = [sys.executable, str(FOLDER / "noise.py"), "--size", "100", "--repeat", "1"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(printed) == 4
    assert all(line.endswith("of NumPy's speed") for line in printed)


def test_the_store_benchmark_gives_each_figure_with_its_unit() -> None:
    command = [sys.executable, str(FOLDER / "store.py"), "--events", "60", "--repeat", "1", "--profile", "100"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(printed) == 10
    assert {line.split()[-1] for line in printed} == {"ms", "s", "bytes", "events/s"}
