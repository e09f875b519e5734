"""The benchmark runs what it says it runs and counts it exactly. How fast is nobody's test."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penchant.common import cli
from penchant.common.arrays import Float32, Int64
from penchant.common.errors import InvalidConfig, PenchantError
from penchant.common.interactions import Interactions
from penchant.common.learners.neural.fedavg import FedAvg
from penchant.server.rounds import RoundRecord
from penchant.simulations.bench import histories, machine
from penchant.simulations.bench.histories import SHORTEST, Shape
from penchant.simulations.bench.measure import Clock, Where, flop_per_example
from penchant.simulations.bench.workloads import WORKLOADS, workload
from penchant.simulations.plans import Federated

ML_1M = WORKLOADS["w1"].shape
SMALL = Shape(users=300, items=200, interactions=9_000)
DOCUMENT = Path(__file__).parents[2] / "docs" / "bench.md"

# --------------------------------------------------------------------------------------------------------- histories


def popularity(people: Interactions) -> Int64:
    return np.sort(people.counts())[::-1]


def test_the_histories_of_w1_have_movielens_counts_exactly_and_its_shape() -> None:
    people = histories.in_memory(ML_1M, seed=0)
    lengths = people.lengths
    assert (people.n_users, people.n_items, len(people)) == (6040, 3706, 1_000_000)
    assert SHORTEST <= lengths.min() < 25
    assert 2000 < lengths.max() <= ML_1M.longest
    assert 170 < lengths.std() < 210  # 193 in MovieLens-1M
    assert 95 < np.median(lengths) < 120  # 96
    first, middle = popularity(people)[[0, 1853]]
    assert 10 < first / middle < 30  # 3428 / 124
    assert people.items.min() >= 0
    assert people.items.max() < 3706


@pytest.mark.parametrize("shape", [ML_1M, SMALL, Shape(users=50, items=40, interactions=50 * 24)])
def test_nobody_has_an_item_twice_and_everybody_has_at_least_twenty(shape: Shape) -> None:
    people = histories.in_memory(shape, seed=1)
    cells = people.rows.astype(np.int64) * shape.items + people.items
    assert len(np.unique(cells)) == len(cells) == shape.interactions
    assert SHORTEST <= people.lengths.min() <= people.lengths.max() <= shape.longest
    assert all(np.all(np.diff(h.times) > 0) for h in people)


def test_a_seed_gives_the_same_histories_in_memory_and_in_files_and_another_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(histories, "_CELLS", 7 * SMALL.items)  # many blocks, the last of them short
    one, files = histories.in_memory(SMALL, seed=0), histories.on_disk(SMALL, 0, tmp_path)
    assert (tmp_path / "items.npy").stat().st_size >= 4 * SMALL.interactions
    for column in ("offsets", "items", "times", "strengths", "n_items"):
        np.testing.assert_array_equal(getattr(files, column), getattr(one, column))
    other = histories.in_memory(SMALL, seed=1)
    assert not np.array_equal(other.lengths, one.lengths)
    assert not np.array_equal(popularity(other), popularity(one))


def test_ranks_follow_the_law_that_the_module_states() -> None:
    n_items, n = 100, 200_000
    counts = np.bincount(histories._draw(n_items, n, np.random.default_rng(0)), minlength=n_items)
    edges = 1 / (n_items / 8 + np.arange(n_items + 1))
    law = (edges[:-1] - edges[1:]) / (edges[0] - edges[-1])
    assert np.abs(counts / n - law).max() < 5 * np.sqrt(law.max() / n)
    assert np.abs(counts / n - law[::-1]).max() > 0.01


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ({"users": 0, "items": 100, "interactions": 1000}, "raise --users or --items"),
        ({"users": 10, "items": 30, "interactions": 1000}, "raise --users or --items"),
        ({"users": 10, "items": 100, "interactions": 199}, "have 200 to 600 interactions, not 199: change --items"),
        ({"users": 10, "items": 100, "interactions": 601}, "have 200 to 600 interactions, not 601: change --items"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(size: dict[str, int], words: str) -> None:
    with pytest.raises(InvalidConfig, match=re.escape(words)):
        Shape(**size)


# --------------------------------------------------------------------------------------------------------- workloads


def test_w1_is_sgd_on_the_mean_of_13_groups_with_clip_1_and_noise_1_on_the_sum_of_100_people() -> None:
    made = workload("w1").row()
    local, plan = made.settings["local"], made.plan
    assert local == {"epochs": 1, "batch": 13, "lr": 0.1 / 13, "negatives": 4, "fold_in_steps": 0}
    (spec,) = plan.sums
    assert (plan.unit, plan.sampling, plan.cohort, plan.device) == ("user", "poisson", 100, None)
    assert (spec.clip_norm, spec.noise_multiplier) == (1.0, 1.0)
    learner = FedAvg(histories.catalogue(3706), _config(made))
    shared = {n: s for n, s in learner.shapes(_state(learner)).items() if n not in learner.model.private}
    assert sum(int(np.prod(s)) for s in shared.values()) == 3706 * 33 + 64 * 32 + 32 + 32 + 1  # 124 411


def test_a_step_of_w2_reads_what_a_batch_of_w1_holds_and_divides_by_the_same() -> None:
    made = workload("w2").row()
    device, plan = made.plan.device, made.plan
    assert device is not None
    assert (device.rate * device.steps, device.steps) == (1.0, 13)
    assert made.settings["local"]["lr"] / device.divisor == workload("w1").row().settings["local"]["lr"]
    assert (device.clip_norm, device.noise_multiplier, plan.sums[0].clip_norm) == (1.0, 1.0, np.inf)


def test_scale_is_w1_for_a_million_people_and_then_co_occurrence_of_everybody() -> None:
    work = workload("scale")
    assert (work.shape.users, work.shape.items, work.shape.interactions) == (10**6, 20_000, 50 * 10**6)
    assert (work.cohort, work.rounds, work.row().settings) == (10_000, 10, workload("w1").row().settings)
    assert work.cooccurrence_row().plan.cohort == 10**6


def test_other_users_keep_the_interactions_of_each_and_other_items_keep_all() -> None:
    assert workload("w1", users=604).shape == Shape(users=604, items=3706, interactions=100_000)
    assert workload("w1", items=37_060).shape == Shape(users=6040, items=37_060, interactions=1_000_000)


def test_an_example_costs_what_the_layers_multiply() -> None:
    # by hand, 32 = d = h: W v, ∂W, ∂v are 2·32·32 each; last layer 6·32; ∂v 2·32; W u and the step once for 65 examples
    by_hand = 3 * 2 * 32 * 32 + 6 * 32 + 2 * 32 + (3 * 2 * 32 * 32 + 2 * (64 * 32 + 32 + 32 + 1) + 2 * 32) / 65
    assert flop_per_example() == pytest.approx(by_hand)
    assert flop_per_example() * 828 == pytest.approx(5.46e6, rel=0.01)  # of the mean person, counted independently


def _config(made: Federated) -> Any:
    from penchant.common import config
    from penchant.common.learners.neural.fedavg import FedAvgConfig

    return config.decode(FedAvgConfig, made.settings)


def _state(learner: FedAvg) -> dict[str, Float32]:
    from penchant.common.streams import Streams

    return dict(learner.init(Streams(0)))


# ----------------------------------------------------------------------------------------------------------- command


def bench(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.main(["bench", *words, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


def documented() -> set[str]:
    """Fields of the table in docs/bench.md."""
    table = DOCUMENT.read_text(encoding="utf-8").split("## Fields")[1].split("\n## ")[0]
    return {name for line in re.findall(r"^\| (`[^|]*)\|", table, re.M) for name in re.findall(r"`(\w+)`", line)}


@pytest.fixture(autouse=True)
def _a_ceiling_that_is_quick_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "peak_gflops", partial(machine.peak_gflops, sizes=(256,), seconds=0.0))


TINY = ("--users", "12", "--items", "300", "--cohort", "6", "--rounds", "3")


@pytest.mark.parametrize("name", ["w1", "w2", "scale"])
def test_every_field_is_documented_and_plausible(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = bench(capsys, "--workload", name, *TINY)
    assert set(found) == documented()
    assert (found["workload"], found["users"], found["cohort"], found["rounds"]) == (name, 12, 6, 3)
    assert len(found["clients"]) == len(found["examples"]) == len(found["every_round_seconds"]) == 3
    for positive in ("clients_per_second", "examples_per_second", "round_seconds", "data_seconds", "peak_rss_mb"):
        assert found[positive] > 0
    assert found["round_seconds"] == pytest.approx(np.median(found["every_round_seconds"][1:]))
    assert found["startup_seconds"] > found["data_seconds"] + found["every_round_seconds"][0]
    ceiling = found["ceiling"]
    assert ceiling["share"] == pytest.approx(ceiling["gflops"] / ceiling["peak_gflops"])
    assert ceiling["share"] > 0  # a busy machine may reach more than this quick a ceiling
    assert (found["cooccurrence"] is not None) == (name == "scale")
    assert (found["empty_round_seconds"] is None) == (name == "w2")


def test_clients_and_examples_are_counted_exactly(capsys: pytest.CaptureFixture[str]) -> None:
    found = bench(capsys, "--users", "12", "--items", "300", "--cohort", "12", "--rounds", "1")
    assert found["interactions"] == round(1_000_000 / 6040 * 12)
    assert (found["clients"], found["examples"]) == ([12], [5 * found["interactions"]])


def test_the_clock_counts_the_people_drawn_in_each_round_and_what_they_had_done() -> None:
    work = workload("w1", users=30, items=300, cohort=6, rounds=4)
    people = histories.in_memory(work.shape, seed=0)
    one, two = (Where(nodes=nodes).run(work.row(), people, 0) for nodes in (1, 2))
    assert (one.drawn, one.interactions) == (two.drawn, two.interactions)
    assert Where().run(work.row(), people, 1).interactions != one.interactions
    assert len(set(one.drawn)) > 1  # coins
    shortest = np.sort(people.lengths)
    for drawn, interactions in zip(one.drawn, one.interactions, strict=True):
        assert shortest[:drawn].sum() <= interactions <= shortest[::-1][:drawn].sum()


def test_a_round_in_which_a_node_failed_has_no_speed() -> None:
    class Nobody:
        progress = None

    record = RoundRecord(
        round=2,
        attempt=0,
        sum="update",
        drawn=5,
        nodes=2,
        answered=1,
        refused={"error": 1},
        seconds=0.1,
        bytes_down=0,
        bytes_up=0,
    )
    with pytest.raises(PenchantError, match="round 2 failed on 1 nodes"):
        Clock(np.ones(3, np.int64))(record, Nobody())  # type: ignore[arg-type]  # not looked at


def test_without_json_there_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *TINY]) == 0
    said = capsys.readouterr().out
    assert "w1: 12 users, 300 items" in said
    assert all(words in said for words in ("clients/s", "peak memory, MiB", "share of the float32 ceiling"))


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--workload", "w3"], "unknown workload 'w3'; choose from scale, w1, w2"),
        (["--cohort", "0"], "cohort must be a whole number ≥ 1, not 0"),
        (["--rounds", "-1"], "rounds must be a whole number ≥ 1, not -1"),
        (["--cohort", "50", "--users", "40"], "cohort 50 is larger than the 40 users: take --cohort 40"),
        (["--items", "200"], "change --items"),
        (["--engine", "ray"], "engine must be local or flower, not 'ray'"),
        (["--device", "tpu"], "device must be cpu or cuda, not 'tpu'"),
        (["--nodes", "0"], "nodes must be a whole number ≥ 1, not 0"),
        (["--seed", "-1"], "seed must be ≥ 0, not -1"),
    ],
)
def test_a_bad_option_is_one_line_that_says_what_to_mend(
    words: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *words]) == cli.EXIT_USAGE
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("penchant: ")
    assert error in line


def test_w1_loads_nothing_that_it_does_not_need() -> None:
    script = (
        "import sys; from penchant.common import cli; from penchant.simulations.bench import machine; "
        "machine.peak_gflops = lambda where: 1.0; cli.main(sys.argv[1:]); "
        "print(*sorted({'polars', 'matplotlib', 'jinja2', 'opacus', 'ray', 'optuna'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", script, "bench", *TINY, "--json"]
    found, loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert loaded == ""
    assert 0.1 < json.loads(found)["startup_seconds"] < 600  # of that process, not of this one


# ----------------------------------------------------------------------------------------------------------- machine


def alone(script: str) -> list[float]:
    """The numbers that a process of its own prints."""
    start = "import time; time.sleep(0.3); from penchant.simulations.bench import machine; "
    command = [sys.executable, "-c", start + script]
    return [float(n) for n in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]


def test_memory_that_was_held_and_given_back_counts_and_that_of_the_parent_does_not() -> None:
    held = np.ones(1 << 25)  # 256 MiB here
    before, after = alone(
        "print(machine.peak_rss_mb()); x = b'1' * (1 << 27); del x; print(machine.peak_rss_mb())",
    )
    assert before < machine.peak_rss_mb() - held.nbytes / 2**20
    assert 120 < after - before < 136


def test_memory_of_a_process_below_counts() -> None:
    before = machine.peak_rss_mb()
    script = "x = b'1' * (1 << 27); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert machine.peak_rss_mb() > before + 128
        child.communicate(b"\n")


def test_the_process_is_as_old_as_its_interpreter() -> None:
    (age,) = alone("print(machine.seconds_since_start())")
    assert 0.3 <= age < 60
