"""A whole simulation on a tiny population: what it leaves behind, that it repeats, and that a stop changes nothing."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from penchant.common.errors import InvalidConfig
from penchant.common.learners.contract import State
from penchant.common.privacy import gaussian
from penchant.common.privacy.ledger import Entry, Ledger
from penchant.common.privacy.plan import PrivacyPlan
from penchant.server.rounds import Progress, Rounds
from penchant.simulations import engine
from penchant.simulations.data.loaders import load
from penchant.simulations.plans import Federated
from penchant.simulations.runs import RunFolder
from penchant.simulations.settings import SimulationConfig, rows
from penchant.simulations.simulate import (
    Watch,
    digest,
    learner_of,
    on_validation,
    one_row,
    prepare,
    simulate,
    torch_device,
)
from penchant.simulations.splits import split
from penchant.simulations.tables import results_table

TINY = SimulationConfig(data="synthetic:users=24,items=40,interactions=10,topics=8,seed=0", rounds=4, nodes=2)
FEDERATED = [row.name for row in rows(TINY) if row.kind == "federated"]
BESIDE_EPSILON = (
    "unit",
    "neighbours",
    "delta",
    "sampler",
    "accountant",
    "trust",
    "noise_multiplier",
    "clip",
    "uncharged",
)
DIFFERS = ("seconds", "clients_per_second", "peak_rss_mb")  # from run to run


@dataclass
class Done:
    """A finished run."""

    folder: RunFolder
    results: dict[str, Any]
    events: list[tuple[str, str]] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.folder.path


def play(settings: SimulationConfig, path: Path) -> Done:
    done = Done(RunFolder(path), {})
    watch = Watch(
        begin=lambda name, steps: done.events.append((name, f"begin {steps}")),
        step=lambda words: done.events.append((done.events[-1][0], "step")),
        end=lambda row: done.events.append((row["name"], "end")),
    )
    done.results = plain(simulate(settings, done.folder, watch))
    return done


def plain(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results as they are once written and read: tuples are lists."""
    read: dict[str, Any] = json.loads(json.dumps(results))
    return read


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Every row, never stopped."""
    return play(TINY, tmp_path_factory.mktemp("whole") / "run")


def lasting(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results without what differs from run to run: clocks, memory and the folder's name."""
    runs = [{k: v for k, v in row.items() if k not in DIFFERS} for row in results["runs"]]
    return {k: v for k, v in results.items() if k != "command"} | {"runs": runs}


def weights(path: Path) -> dict[str, State]:
    return {p.stem: load_file(p) for p in sorted((path / "models").glob("*.safetensors"))}


def same_weights(a: Path, b: Path) -> bool:
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    return all(
        one[m].keys() == two[m].keys() and all(np.array_equal(one[m][k], two[m][k]) for k in one[m]) for m in one
    )


def round_lines(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


# ------------------------------------------------------------------------------------------------ what is left behind


def test_results_hold_every_row_with_figures_and_intervals(whole: Done) -> None:
    results = json.loads((whole.path / "results.json").read_text(encoding="utf-8"))
    assert results == whole.results == whole.folder.read_results()
    assert results["schema_version"] == 1
    assert results["data"]["users"] == results["split"]["scored_users"] == 24
    assert [row["name"] for row in results["runs"]] == [row.name for row in rows(TINY)]
    for row in results["runs"]:
        assert {"hr@10", "ndcg@10", "coverage@20", "auc", "accuracy"} <= row["metrics"].keys()
        assert row["ci95"].keys() == {m for m in row["metrics"] if not m.startswith("coverage")}
        for name, (low, high) in row["ci95"].items():
            assert low <= row["metrics"][name] <= high
        assert row["against_floors"].keys() == {"popularity", "no-sharing"} - {row["name"]} or row["kind"] == "floor"
        assert row["seconds"] >= 0
    assert results["runs"][0]["against_floors"] == {}  # popularity came first
    assert list(results["runs"][1]["against_floors"]) == ["popularity"]


def test_no_epsilon_stands_without_what_it_means_and_no_row_without_a_word_on_privacy(whole: Done) -> None:
    private = {row["name"]: row["privacy"] for row in whole.results["runs"] if row["privacy"] is not None}
    assert list(private) == ["fedavg+opacus", "fedavg+user-dp", "co-occurrence"]
    for name, privacy in private.items():
        assert all(privacy[word] not in (None, "", []) for word in BESIDE_EPSILON), name
        assert 0.98 * 8 < privacy["epsilon"] <= 8
        (row,) = [row for row in whole.results["runs"] if row["name"] == name]
        for words in ("δ = 1e-05", f"unit {privacy['unit']}", privacy["neighbours"], privacy["accountant"]):
            assert words in row["privacy_note"]
    for row in whole.results["runs"]:
        assert row["privacy_note"]
        assert (row["privacy"] is None) == ("epsilon" not in json.dumps(row).replace('"epsilon": null', ""))


def test_a_curve_goes_up_to_the_last_round_and_its_epsilon_to_what_is_promised(whole: Done) -> None:
    for row in whole.results["runs"]:
        if row["kind"] != "federated":
            assert row["curve"] == []
            continue
        last, epsilons = row["curve"][-1], [point["epsilon"] for point in row["curve"]]
        assert last["ndcg@10"] == pytest.approx(row["metrics"]["ndcg@10"])
        if row["privacy"] is None:
            assert epsilons == [None] * len(epsilons)
        else:
            assert epsilons == sorted(epsilons)
            assert epsilons[-1] == row["privacy"]["epsilon"]


def test_rounds_are_told_one_a_line(whole: Done) -> None:
    lines = round_lines(whole.path)
    for name in FEDERATED:
        n_rounds = 2 if name == "co-occurrence" else 4
        mine = [line for line in lines if line["row"] == name]
        assert [line["round"] for line in mine] == list(range(1, n_rounds + 1))
        assert all(line["answered"] == line["nodes"] == 2 and line["refused"] == {} for line in mine)
    assert len(lines) == 2 + 3 * 4
    rows_by_name = {row["name"]: row for row in whole.results["runs"]}
    for way in ("bytes_up", "bytes_down"):
        sums = {name: sum(line[way] for line in lines if line["row"] == name) for name in FEDERATED}
        assert sums == {name: rows_by_name[name][way] for name in FEDERATED}
        assert min(sums.values()) > 0


def test_models_load_with_a_manifest_from_which_the_row_can_be_scored_again(whole: Done) -> None:
    data = load(TINY.data)
    for name in FEDERATED:
        state, manifest = whole.folder.read_model(name)
        assert not [key for key in state if key.startswith("server/")]  # an optimiser's memory is not released
        assert manifest["catalogue"] == data.catalogue.version
        plan = PrivacyPlan.from_json(manifest["plan"])
        assert plan.digest == manifest["plan_digest"]
        promise = plan.guarantee()
        (row,) = [row for row in whole.results["runs"] if row["name"] == name]
        assert (promise is None) == (row["privacy"] is None)
        assert promise is None or promise.epsilon == row["privacy"]["epsilon"] == manifest["privacy"]["epsilon"]
        scores = learner_of(manifest, data.catalogue).scores(state, data.interactions)
        assert scores.shape == (24, 40)
        assert np.isfinite(scores).all()
    _, manifest = whole.folder.read_model("fedavg")
    with pytest.raises(InvalidConfig, match="catalogue is not the one"):
        learner_of(manifest, load("synthetic:users=24,items=41,interactions=10,topics=8").catalogue)


def test_the_report_is_one_file_that_names_every_row(whole: Done) -> None:
    page = (whole.path / "report.html").read_text(encoding="utf-8")
    assert all(row.name in page for row in rows(TINY))
    assert "<script src" not in page
    assert not list((whole.path / "partial").glob("*"))
    assert not list(whole.path.rglob("*.new"))


def test_the_watch_hears_each_row_begin_step_and_end(whole: Done) -> None:
    said: dict[str, list[str]] = {}
    for name, what in whole.events:
        said.setdefault(name, []).append(what)
    assert list(said) == [row.name for row in rows(TINY)]
    assert said["fedavg"] == ["begin 4", *["step"] * 4, "end"]
    assert said["co-occurrence"] == ["begin 2", "step", "step", "end"]
    assert said["popularity"] == ["begin 1", "end"]
    assert said["central"][0] == "begin 4"


def test_sampled_negatives_are_reported_only_where_asked_for_and_by_their_own_name(whole: Done, tmp_path: Path) -> None:
    data = "synthetic:users=24,items=150,interactions=10,topics=8,seed=0"
    asked = SimulationConfig(data=data, learner="cooccurrence", sampled_negatives=True)
    for row in play(asked, tmp_path / "run").results["runs"]:
        assert 0 < row["metrics"]["hr@10 (99 sampled negatives)"] >= row["metrics"]["hr@10"]
    assert "sampled" not in json.dumps(whole.results)


# ------------------------------------------------------------------------------------------------------ it repeats


def test_the_config_of_a_run_gives_the_run_again_to_the_last_bit(whole: Done, tmp_path: Path) -> None:
    again = play(whole.folder.read_config(), tmp_path / "again")
    assert lasting(again.results) == lasting(whole.results)
    assert same_weights(again.path, whole.path)
    assert round_lines(again.path) == round_lines(whole.path)
    for row in rows(TINY):
        for name, values in whole.folder.per_user(row.name).items():
            np.testing.assert_array_equal(again.folder.per_user(row.name)[name], values)


def test_another_seed_learns_and_scores_otherwise_on_the_same_data(whole: Done, tmp_path: Path) -> None:
    other = play(replace(TINY, seed=1), tmp_path / "other")
    assert other.results["data"] == whole.results["data"]  # the data's own seed is in its name
    ours, theirs = ({row["name"]: row["metrics"] for row in r["runs"]} for r in (whole.results, other.results))
    for name in ("popularity", "no-sharing", "item-knn", "ease"):
        assert ours[name] == theirs[name]  # nothing in these is drawn
    for name in ("central", *FEDERATED):
        assert ours[name] != theirs[name]
    one, two = weights(whole.path), weights(other.path)
    assert all(not np.array_equal(next(iter(one[m].values())), next(iter(two[m].values()))) for m in one)


def test_the_number_of_nodes_changes_no_figure_of_mf_and_cooccurrence(whole: Done, tmp_path: Path) -> None:
    # Partial sums are added in another order, so weights move by rounding: 1e-5 of the largest at most. Devices' noise
    # that nobody reads is drawn for each node's sum, so unit interaction has the same law and other draws.
    for nodes in (1, 5):
        other = play(replace(TINY, nodes=nodes), tmp_path / str(nodes))
        for ours, theirs in zip(whole.results["runs"], other.results["runs"], strict=True):
            if ours["name"] != "fedavg+opacus":
                assert theirs["metrics"] == pytest.approx(ours["metrics"], abs=1e-6)
        one, two = weights(whole.path), weights(other.path)
        for model in one.keys() - {"fedavg+opacus"}:
            for name in one[model].keys() - {"vectors"}:  # eigenvectors have no sign
                largest = max(1.0, float(np.abs(one[model][name]).max()))
                assert np.abs(one[model][name] - two[model][name]).max() <= 1e-5 * largest
        assert [line["nodes"] for line in round_lines(other.path)] == [nodes] * 14


# ------------------------------------------------------------------------------------------------------------ stops


@dataclass
class Stop:
    """Raises KeyboardInterrupt in a row, after so many of its steps."""

    row: str
    after: int
    heard: list[str] = field(default_factory=list)

    def watch(self) -> Watch:
        def step(words: str) -> None:
            self.heard.append("step")
            if self.heard[0] == self.row and self.heard.count("step") == self.after:
                raise KeyboardInterrupt

        def begin(name: str, steps: int) -> None:
            self.heard[:] = [name]

        return Watch(begin=begin, step=step)


@pytest.fixture
def charges(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Entry, ...]]:
    """The ledger of each row that `engine.run` finished, by name."""
    found: dict[str, tuple[Entry, ...]] = {}
    original = engine.run

    def listening(*args: Any, name: str, **named: Any) -> Rounds:
        rounds = original(*args, name=name, **named)
        found[name] = rounds.ledger.entries
        return rounds

    monkeypatch.setattr(engine, "run", listening)
    return found


def test_no_round_parses_python_which_threads_cannot_do_at_once(
    whole: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise SystemError("AST constructor recursion depth mismatch")

    original = engine.run

    def run(*args: Any, **named: Any) -> Rounds:
        with monkeypatch.context() as patch:
            patch.setattr(ast, "literal_eval", never)  # as np.load does; see common.arrays.read_npy
            return original(*args, **named)

    monkeypatch.setattr(engine, "run", run)
    assert lasting(play(TINY, tmp_path / "run").results) == lasting(whole.results)


def test_a_run_stopped_in_every_federated_row_ends_as_the_run_that_never_stopped(
    whole: Done, tmp_path: Path, charges: dict[str, tuple[Entry, ...]]
) -> None:
    folder = RunFolder(tmp_path / "run")
    for row, after in (("fedavg", 2), ("fedavg+opacus", 3), ("fedavg+user-dp", 1), ("co-occurrence", 1)):
        stop = Stop(row, after)
        with pytest.raises(KeyboardInterrupt):
            simulate(TINY, folder, stop.watch())
        kept = folder.read_partial(row)
        assert kept is not None
        assert kept[0].done == after  # so it stopped in the middle
        assert not (folder.path / "results.json").exists()
        with pytest.raises(InvalidConfig, match="--resume"):
            folder.read_results()
    assert charges.keys() == {"fedavg", "fedavg+opacus", "fedavg+user-dp"}
    results = plain(simulate(folder.read_config(), folder))
    assert lasting(results) == lasting(whole.results)
    assert same_weights(folder.path, whole.path)
    assert round_lines(folder.path) == round_lines(whole.path)
    assert not list((folder.path / "partial").glob("*"))
    stopped = dict(charges)
    play(TINY, tmp_path / "again")
    assert charges == stopped
    assert [(e.round, e.attempt) for e in charges["fedavg+user-dp"] if e.kind == "charge"] == [
        (number, 0) for number in (1, 2, 3, 4)
    ]


def test_a_round_that_was_charged_but_not_kept_is_charged_again_with_fresh_noise(
    whole: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    original: Callable[..., None] = RunFolder.write_partial

    def dies(self: RunFolder, row: str, progress: Progress, *rest: Any) -> None:
        if row == "fedavg+user-dp" and progress.done == 3:
            raise KeyboardInterrupt
        original(self, row, progress, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_partial", dies)
        with pytest.raises(KeyboardInterrupt):
            simulate(TINY, folder)
    kept = folder.read_partial("fedavg+user-dp")
    assert kept is not None
    with Ledger.open(folder.path / "ledgers" / "fedavg+user-dp.sqlite") as ledger:
        assert (kept[0].done, sum(entry.kind == "charge" for entry in ledger.entries)) == (2, 3)
    again, before = ({r["name"]: r for r in results["runs"]} for results in (simulate(TINY, folder), whole.results))
    assert again["fedavg+user-dp"]["privacy"]["epsilon"] > before["fedavg+user-dp"]["privacy"]["epsilon"]
    tries = [line["attempt"] for line in round_lines(folder.path) if line["row"] == "fedavg+user-dp"]
    assert tries[:3] == [0, 0, 1]
    assert not same_weights(folder.path, whole.path)
    assert again["co-occurrence"]["metrics"] == before["co-occurrence"]["metrics"]  # no other row is touched


def test_a_private_row_done_again_is_charged_again_and_says_so(whole: Done, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(whole.path, path)
    (path / "rows" / "co-occurrence.json").unlink()
    before, again = whole.results["runs"][-1], plain(simulate(TINY, RunFolder(path)))["runs"][-1]
    assert (before["name"], again["name"]) == ("co-occurrence", "co-occurrence")
    assert again["privacy"]["epsilon"] > before["privacy"]["epsilon"]
    assert [line["attempt"] for line in round_lines(path) if line["row"] == "co-occurrence"] == [1, 1]
    assert not same_weights(path, whole.path)
    with Ledger.open(path / "ledgers" / "co-occurrence.sqlite") as ledger:
        assert ledger.spent().epsilon == pytest.approx(again["privacy"]["epsilon"], rel=1e-9)


def test_the_ledgers_of_a_run_are_whole_and_hold_what_its_rows_promise(whole: Done) -> None:
    private = {row["name"]: row["privacy"] for row in whole.results["runs"] if row["privacy"] is not None}
    ledgers = sorted((whole.path / "ledgers").iterdir())
    assert [p.name for p in ledgers] == ["co-occurrence.sqlite", "fedavg+user-dp.sqlite"]  # and no log is left
    for path in ledgers:
        with Ledger.open(path) as ledger:
            assert ledger.verify() == len(ledger.entries)
            assert ledger.spent().epsilon == pytest.approx(private[path.stem]["epsilon"], rel=1e-9)
            assert {entry.plan for entry in ledger.entries} == {whole.folder.read_model(path.stem)[1]["plan_digest"]}


def test_going_on_with_a_finished_run_computes_nothing(
    whole: Done, tmp_path: Path, charges: dict[str, tuple[Entry, ...]]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in (whole.path / "rows").iterdir()}
    again = plain(simulate(whole.folder.read_config(), whole.folder))
    assert charges == {}
    assert again == whole.results
    assert {p: p.stat().st_mtime_ns for p in (whole.path / "rows").iterdir()} == before


def test_each_row_done_again_while_the_others_are_finished_is_the_same_row(whole: Done, tmp_path: Path) -> None:
    # A row that changed the data in place for those after it would show here, as the floors once did.
    path = tmp_path / "run"
    shutil.copytree(whole.path, path)
    for row in rows(TINY):
        (path / "rows" / f"{row.name}.json").unlink()
        (path / "ledgers" / f"{row.name}.sqlite").unlink(missing_ok=True)  # with it, another row with fresh noise
        assert lasting(plain(simulate(TINY, RunFolder(path)))) == lasting(whole.results)
        assert same_weights(path, whole.path)
        assert round_lines(path) == round_lines(whole.path)


def test_every_row_learns_from_histories_in_the_order_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    original = engine.run

    def listening(plan: Federated, population: engine.Population, **named: Any) -> Rounds:
        seen.append(population.histories.items.tolist())
        return original(plan, population, **named)

    monkeypatch.setattr(engine, "run", listening)
    play(replace(TINY, rounds=1), tmp_path / "run")
    expected = split(TINY.split, load(TINY.data).interactions).train
    assert seen == [expected.items.tolist()] * len(FEDERATED)
    assert any((np.diff(h.items) < 0).any() for h in expected)  # so that sorting would have been noticed


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("user,item\n" + "".join(f"u{u},i{(u + t) % 7}\n" for u in range(6) for t in range(4)))
    asked, folder = SimulationConfig(data=str(log), learner="cooccurrence"), RunFolder(tmp_path / "run")
    first = plain(simulate(asked, folder))
    log.write_text(log.read_text().replace("u5,i1", "u5,i2"))
    (folder.path / "rows" / "co-occurrence.json").unlink()
    with pytest.raises(InvalidConfig, match="the data changed"):
        simulate(asked, folder)
    assert folder.read_results() == first


# -------------------------------------------------------------------------------------------- refused before it began


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cohort": 25}, "cohort 25 is larger than the 24 users: take --cohort 24"),
        ({"delta": 0.05}, "delta 0.05 is not below 1/24: take --delta 1e-05"),
        ({"split": "leave-one-out"}, "did you mean 'leave-last-out'"),
        ({"split": "30-fold-users:0"}, "folds must be from 2"),
        ({"data": "sinthetic"}, "did you mean 'synthetic'"),
        ({"k_core": 3}, "takes only a seed"),
    ],
)
def test_what_shows_only_once_data_is_there_is_refused_before_anything_is_written(
    given: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidConfig) as caught:
        simulate(replace(TINY, **given), RunFolder(tmp_path / "run"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_data_that_leaves_nobody_to_score_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("user,item\na,x\na,y\nb,x\nb,y\n")
    with pytest.raises(InvalidConfig, match="leaves nobody to score"):
        simulate(SimulationConfig(data=str(log)), RunFolder(tmp_path / "run"))
    assert [p.name for p in tmp_path.iterdir()] == ["log.csv"]


def test_people_held_out_of_training_take_no_part(tmp_path: Path) -> None:
    done = play(replace(TINY, learner="cooccurrence", split="held-out-users", rounds=None), tmp_path / "run")
    assert done.results["split"]["scored_users"] == 2
    assert {line["drawn"] for line in round_lines(done.path)} == {22}


def test_a_torch_device_that_is_absent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert [torch_device("auto"), torch_device("cpu")] == ["cpu", "cpu"]
    with pytest.raises(InvalidConfig, match=r"^no CUDA device here: take --device cpu or auto$"):
        torch_device("cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert [torch_device("auto"), torch_device("cuda"), torch_device("cpu")] == ["cuda", "cuda", "cpu"]


def test_the_digest_tells_data_apart_that_share_a_name() -> None:
    one, same, other = (load(f"synthetic:users=24,items=40,interactions=10,topics=8,seed={seed}") for seed in (0, 0, 1))
    assert one.name == other.name
    assert digest(one) == digest(same) != digest(other)


def test_the_digest_covers_every_column() -> None:
    data = load("synthetic:users=24,items=40,interactions=10,topics=8,seed=0")
    log = data.interactions
    n = len(log)
    other: dict[str, Any] = {
        "offsets": np.append(0, log.offsets[1:] - (np.arange(1, 25) == 1)),
        "items": log.items[::-1],
        "times": log.times + 1,
        "strengths": log.strengths / 2,
        "events": np.zeros(n, np.uint8),
        "event_names": ("listen",),
        "context": {"device": np.array(["phone"] * n, object)},
    }
    assert other.keys() | {"n_items", "users"} == {f.name for f in fields(log)}  # the first is the catalogue's
    changed = [replace(log, **{name: column}) for name, column in other.items()]
    changed.append(replace(log, context={"device": np.array(["tv"] * n, object)}))
    changed.append(replace(log, context={"place": np.array(["tv"] * n, object)}))
    digests = [digest(replace(data, interactions=one)) for one in (log, *changed)]
    assert len(set(digests)) == len(digests)
    assert digest(replace(data, interactions=replace(log))) == digests[0]


def test_a_simulation_gives_torch_its_threads_back_even_where_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, within = torch.get_num_threads(), []
    monkeypatch.setattr("penchant.simulations.simulate.load", lambda *_, **__: within.append(torch.get_num_threads()))
    try:
        torch.set_num_threads(3)
        with pytest.raises(AttributeError):
            simulate(TINY, RunFolder(tmp_path / "run"))
        assert torch.get_num_threads() == 3
        assert within == [1]
    finally:
        torch.set_num_threads(before)


def test_a_row_with_scaled_noise_says_whom_it_imitates_beside_the_epsilon_of_the_people_in_the_data(
    tmp_path: Path,
) -> None:
    asked = replace(TINY, learner="cooccurrence", unit="user", rounds=None, as_if_users=480, epsilon=1.0, delta=1e-5)
    done = play(asked, tmp_path / "run")
    row = done.results["runs"][-1]
    assert row["as_if"] == {"users": 480, "epsilon": 1.0, "delta": 1e-5, "note": row["privacy_note"].split(";")[0]}
    assert row["privacy_note"].startswith("noise as for 480 people at ε = 1: a research figure; for these 24 people ε")
    mu = 20 * gaussian.mu_of(1.0, 1e-5)
    assert row["privacy"]["epsilon"] == pytest.approx(gaussian.epsilon_of(mu, 1e-5))
    with done.folder.ledger("co-occurrence", plan_in(done)) as ledger:  # what was charged is no research figure
        assert ledger.spent().epsilon == pytest.approx(row["privacy"]["epsilon"])
    manifest = json.loads((done.path / "models" / "co-occurrence.json").read_text(encoding="utf-8"))
    assert (manifest["as_if"], manifest["privacy"]) == (row["as_if"], row["privacy"])
    page = (done.path / "report.html").read_text(encoding="utf-8")
    assert page.count(row["as_if"]["note"]) == 3  # the finding, the row, the figure
    assert results_table(done.results).caption.plain.count(row["as_if"]["note"]) == 1  # type: ignore[union-attr]  # it is there, or the test fails


def plan_in(done: Done) -> PrivacyPlan:
    manifest = json.loads((done.path / "models" / "co-occurrence.json").read_text(encoding="utf-8"))
    return PrivacyPlan.from_json(manifest["plan"])


def test_one_row_of_a_run_is_that_row_of_simulate_without_its_curve(whole: Done, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "one")
    (row,) = [row for row in rows(TINY) if row.name == "fedavg+user-dp"]
    found = plain(one_row(row, TINY, prepare(TINY), folder, whole.folder))
    (expected,) = [run for run in whole.results["runs"] if run["name"] == row.name]
    for name in ("metrics", "ci95", "against_floors", "privacy", "privacy_note"):
        assert found[name] == expected[name]
    assert found["curve"] == []
    assert folder.per_user(row.name)["ndcg@10"].tolist() == whole.folder.per_user(row.name)["ndcg@10"].tolist()


def test_a_row_on_validation_never_reads_a_target() -> None:
    settings = replace(TINY, learner="cooccurrence", rounds=None)
    row, prepared = rows(settings)[-1], prepare(settings)
    found = on_validation(row, settings, prepared, "ndcg@10")
    parts = replace(prepared.split, targets=prepared.split.targets.select([]), history=prepared.split.train.select([]))
    assert on_validation(row, settings, replace(prepared, split=parts), "ndcg@10") == found
    with pytest.raises(InvalidConfig, match="did you mean 'ndcg@10'"):
        on_validation(row, settings, prepared, "ndgc@10")
