"""Benchmarks gate nothing; that they still run is tested, at a size that measures nothing."""

from __future__ import annotations

import os
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


def test_the_benchmark_of_people_together_has_a_line_for_each_sequence_model() -> None:
    command = [sys.executable, str(FOLDER / "together.py"), "--people", "6", "--items", "300", "--turns", "1"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[0] for line in printed] == ["gru", "lstm", "cnn-lstm", "transformer"]
    assert all(line.endswith("times as fast") for line in printed)


def test_the_clients_benchmark_has_a_line_for_each_size_and_learner() -> None:
    command = [sys.executable, str(FOLDER / "client.py"), "--sizes", "50,80", "--events", "20"]
    here = {**os.environ, "PYTHONPATH": os.pathsep.join((str(FOLDER.parent), os.environ.get("PYTHONPATH", "")))}
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=here).stdout.splitlines()
    assert [line.split()[0] for line in printed if line.strip()[:2] in ("50", "80")] == ["50", "80"]
    learners = printed[printed.index("contribution of 200 interactions, 3,706 items, p50 and p99 ms, KiB sent") + 1 :]
    assert [line.split()[:-3] for line in learners[:3]] == [["cooccurrence"], ["als"], ["fedavg", "mf"]]
    assert [line.split()[0] for line in learners[-2:]] == ["fedavg", "sealing"]
