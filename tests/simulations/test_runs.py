"""The folder of a run: files are whole or absent, and one that was torn anyway is named in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penchant.common.errors import InvalidConfig, MalformedData, PrivacyRefused
from penchant.common.privacy.events import Gaussian
from penchant.common.privacy.plan import PrivacyPlan, SumSpec
from penchant.server.rounds import Progress, RoundRecord
from penchant.simulations.runs import RunFolder, file_name, read_config
from penchant.simulations.settings import SimulationConfig
from penchant.simulations.simulate import simulate

ROW = "fedavg+user-dp"
STATE: dict[str, np.ndarray[Any, Any]] = {
    "item.weight": np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::-1],  # not contiguous
    "head": np.array([2, 0, 1], np.int32),
    "vectors": np.zeros((3, 0), np.float32),
    "server/step": np.array(7, np.int64),  # no dimension at all
}
RECORD = RoundRecord(
    round=1,
    attempt=0,
    sum="update",
    drawn=3,
    nodes=1,
    answered=1,
    refused={"malformed": 1},
    seconds=0.5,
    bytes_down=1,
    bytes_up=2,
)
PLAN = PrivacyPlan(
    unit="user",
    n_users=3,
    delta=1e-5,
    sampling="none",
    cohort=3,
    sums=(SumSpec(name="update", rounds=2, clip_norm=1.0, noise_multiplier=2.0),),
    max_participations=2,
)
CURVE: list[dict[str, Any]] = [{"round": 1, "ndcg@10": 0.1, "epsilon": 0.1 + 0.2}]


def progress(done: int = 1) -> Progress:
    return Progress(dict(STATE), np.array([1, 0, 1]), done, [RECORD] * done)


def filled(path: Path) -> RunFolder:
    """A folder with one file of each kind."""
    folder = RunFolder(path)
    folder.write_config(SimulationConfig(seed=3))
    with folder.ledger(ROW, PLAN) as ledger:
        ledger.charge(1, Gaussian(noise_multiplier=2.0), plan=PLAN.digest, cap=2)
    folder.write_partial(ROW, progress(), CURVE)
    folder.write_row({"name": ROW, "ndcg": 0.1}, np.arange(3), {"ndcg@10": np.array([0.0, 0.5, 1.0])})
    folder.write_model(ROW, STATE, {"name": ROW, "learner": "fedavg"})
    folder.write_rounds([{"row": ROW, "round": 1}, {"row": ROW, "round": 2}])
    folder.write_results({"schema_version": 1, "runs": []}, "<html>")
    return folder


# ------------------------------------------------------------------------------------------------------- there and back


def test_a_checkpoint_comes_back_to_the_last_bit_and_shape(tmp_path: Path) -> None:
    kept = filled(tmp_path / "run").read_partial(ROW)
    assert kept is not None
    again, curve = kept
    assert again.state.keys() == STATE.keys()
    for name, values in STATE.items():
        assert (again.state[name].shape, again.state[name].dtype) == (values.shape, values.dtype)
        np.testing.assert_array_equal(again.state[name], values)
    assert again.participations.tolist() == [1, 0, 1]
    assert (again.done, again.records, curve) == (1, [RECORD], CURVE)


def test_charges_may_be_ahead_of_the_checkpoint_and_stay_when_it_goes(tmp_path: Path) -> None:
    folder = filled(tmp_path / "run")
    with folder.ledger(ROW, PLAN) as ledger:  # charged, and stopped before the release was kept
        ledger.charge(2, Gaussian(noise_multiplier=2.0), plan=PLAN.digest, cap=2)
    kept = folder.read_partial(ROW)
    assert kept is not None
    with folder.ledger(ROW, PLAN) as ledger:
        assert (kept[0].done, len(ledger.entries)) == (1, 2)
    folder.drop_partial(ROW)
    assert not list((folder.path / "partial").iterdir())
    assert [p.name for p in (folder.path / "ledgers").iterdir()] == [f"{ROW}.sqlite"]
    with folder.ledger(ROW, PLAN) as ledger:
        assert [ledger.attempts(number, PLAN.digest) for number in (1, 2, 3)] == [1, 1, 0]


def test_a_row_of_another_population_or_delta_cannot_take_over_a_ledger(tmp_path: Path) -> None:
    folder = filled(tmp_path / "run")
    for other in (replace(PLAN, delta=1e-6), replace(PLAN, population="others")):
        with pytest.raises(InvalidConfig, match=r"fedavg\+user-dp.sqlite is a ledger with .*, not "):
            folder.ledger(ROW, other)


def test_a_row_without_server_noise_has_nothing_to_charge_and_no_file(tmp_path: Path) -> None:
    exact = replace(PLAN, unit="none", sums=(replace(PLAN.sums[0], noise_multiplier=0.0),))
    with RunFolder(tmp_path).ledger(ROW, exact) as ledger:
        assert ledger.entries == ()
    assert not list(tmp_path.iterdir())


def test_rows_models_rounds_and_results_come_back(tmp_path: Path) -> None:
    folder = filled(tmp_path / "run")
    assert folder.read_config() == SimulationConfig(seed=3)
    assert folder.read_row(ROW) == {"name": ROW, "ndcg": 0.1}
    assert folder.per_user(ROW)["users"].tolist() == [0, 1, 2]
    assert folder.per_user(ROW)["ndcg@10"].tolist() == [0.0, 0.5, 1.0]
    state, manifest = folder.read_model(ROW)
    assert state["server/step"].shape == ()
    assert manifest["learner"] == "fedavg"
    assert len((folder.path / "rounds.jsonl").read_text().splitlines()) == 2
    assert folder.read_results() == {"schema_version": 1, "runs": []}
    assert (folder.path / "report.html").read_text() == "<html>"
    assert not list(folder.path.rglob("*.new"))


def test_what_is_not_there_is_none_or_said(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert folder.read_row(ROW) is None
    assert folder.read_partial(ROW) is None
    folder.drop_partial(ROW)
    assert not list(tmp_path.iterdir())  # reading makes nothing
    folder = filled(tmp_path / "run")
    folder.drop_partial(ROW)
    assert folder.read_partial(ROW) is None


@given(name=st.text(max_size=30))
def test_no_name_of_a_row_leaves_the_folder(name: str) -> None:
    assert "/" not in file_name(name)
    assert "." not in file_name(name)
    assert file_name("co-occurrence") == "co-occurrence"


@pytest.mark.parametrize(
    "settings",
    [
        SimulationConfig(),
        SimulationConfig(data="a b'c\"d.csv", rating_scale=(0.5, 5.0), epsilon=0.1 + 0.2, delta=1e-7, model="mf"),
        SimulationConfig(unit="none", rounds=3, skip_bad_rows=True, sampled_negatives=True, seed=2**62),
    ],
)
def test_a_config_comes_back_from_its_toml(settings: SimulationConfig, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_config(settings)
    assert folder.read_config() == settings != replace(settings, nodes=9)


# ------------------------------------------------------------------------------------------------------------ faults

FAULTS: list[Callable[[bytes], bytes]] = [
    lambda content: b"",
    lambda content: content[: len(content) // 2],
    lambda content: content[:3],
    lambda content: b"\xff" * len(content),
    lambda content: b"[]",
]
READERS: list[tuple[str, Callable[[RunFolder], object]]] = [
    (f"partial/{ROW}.safetensors", lambda folder: folder.read_partial(ROW)),
    (f"rows/{ROW}.json", lambda folder: folder.read_row(ROW)),
    (f"rows/{ROW}.npz", lambda folder: folder.per_user(ROW)),
    (f"models/{ROW}.json", lambda folder: folder.read_model(ROW)),
    (f"models/{ROW}.json", lambda folder: folder.read_model("fedavg")),  # looks for names to suggest
    (f"models/{ROW}.safetensors", lambda folder: folder.read_model(ROW)),
    ("results.json", lambda folder: folder.read_results()),
]


@pytest.mark.parametrize("fault", FAULTS, ids=["empty", "half", "start", "noise", "other"])
@pytest.mark.parametrize(("name", "read"), READERS, ids=[name for name, _ in READERS])
def test_a_torn_file_is_named_in_one_line(
    name: str, read: Callable[[RunFolder], object], fault: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    folder = filled(tmp_path / "run")
    path = folder.path / name
    path.write_bytes(fault(path.read_bytes()))
    with pytest.raises(MalformedData) as caught:
        read(folder)
    assert f"{path} is damaged" in str(caught.value) or name.startswith("models/")
    assert "damaged" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_says_what_to_delete_and_then_the_run_goes_on(tmp_path: Path) -> None:
    tiny = SimulationConfig(data="synthetic:users=9,items=40,interactions=6", learner="cooccurrence")
    folder = RunFolder(tmp_path / "run")
    before = simulate(tiny, folder)["runs"][-1]
    (folder.path / "rows" / "co-occurrence.json").unlink()
    checkpoint = folder.path / "partial" / "co-occurrence.safetensors"
    checkpoint.write_bytes(b"torn")
    with pytest.raises(MalformedData, match=r"safetensors is damaged: delete it and go on with: penchant simulate"):
        simulate(tiny, folder)
    checkpoint.unlink()
    after = simulate(tiny, folder)["runs"][-1]
    assert after["privacy"]["epsilon"] > before["privacy"]["epsilon"]  # done again, charged again


@pytest.mark.parametrize("fault", FAULTS, ids=["empty", "half", "start", "noise", "other"])
def test_a_torn_ledger_is_named_in_one_line_and_nothing_is_released(
    fault: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    folder = filled(tmp_path / "run")
    path = folder.path / "ledgers" / f"{ROW}.sqlite"
    path.write_bytes(fault(path.read_bytes()))
    with pytest.raises((MalformedData, PrivacyRefused)) as caught:
        folder.ledger(ROW, PLAN)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = filled(tmp_path / "run")

    def full(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InvalidConfig, match="No space left on device"):
        folder.write_row({"name": ROW, "ndcg": 0.9}, np.arange(3), {})
    with pytest.raises(InvalidConfig, match=r"cannot write .*results|report"):
        folder.write_results({"schema_version": 1, "runs": ["other"]}, "<html>other")
    assert folder.read_row(ROW) == {"name": ROW, "ndcg": 0.1}
    assert folder.read_results()["runs"] == []


def test_a_folder_that_cannot_be_made_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(InvalidConfig, match=r"cannot write .*config.toml: Not a directory; take another --out$"):
        RunFolder(tmp_path / "file" / "run").write_config(SimulationConfig())


def test_results_of_an_unfinished_run_or_of_another_version_are_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a run")
    with pytest.raises(InvalidConfig, match=r"holds no finished run$"):
        folder.read_results()
    folder.write_config(SimulationConfig())
    with pytest.raises(InvalidConfig, match=r"go on with: penchant simulate --resume '.*a run'$"):
        folder.read_results()
    folder.write_results({"schema_version": 2}, "")
    with pytest.raises(MalformedData, match="version 2 is unknown here"):
        folder.read_results()


def test_a_model_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    folder = filled(tmp_path / "run")
    with pytest.raises(InvalidConfig, match=r"no model 'fedavg\+user'.*did you mean 'fedavg\+user-dp'\?"):
        folder.read_model("fedavg+user")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed = ", "Invalid value"),
        ("[simulation]\nseeed = 3", "unknown key 'seeed'; did you mean 'seed'?"),
        ("[simulatoin]\nseed = 3", "unknown table 'simulatoin'; did you mean 'simulation'?"),
        ("schema_version = 2\n", "config version 2 is unknown here"),
        ("[simulation]\nseed = 'three'", "seed must be a whole number"),
        ("[simulation]\nrounds = 2.5", "rounds must be a whole number"),
        ("[simulation]\nepsilon = 'much'\ndelta = 1e-5", "SimulationConfig"),
        ("[simulation]\nrating_scale = 5", "SimulationConfig"),
        ("[simulation]\nepsilon = 3", "add --delta"),
        (b"\xff\xfe", "utf-8"),
    ],
)
def test_a_config_with_a_fault_is_refused_in_one_line(text: str | bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InvalidConfig) as caught:
        read_config(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_that_is_not_there_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.toml", tmp_path):
        with pytest.raises(InvalidConfig, match="cannot read"):
            read_config(path)
    (tmp_path / "least.toml").write_text("")
    assert read_config(tmp_path / "least.toml") == SimulationConfig()


def test_what_is_written_is_strict_json(tmp_path: Path) -> None:
    folder = filled(tmp_path / "run")
    for path in folder.path.rglob("*.json"):
        json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)  # NaN and Infinity are not JSON
    with pytest.raises(ValueError, match="JSON"):
        folder.write_results({"schema_version": 1, "value": float("nan")}, "")
