"""simulate, compare and recommend as a person types them: what is printed where, what is written, how it exits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from penchant.common.cli import main
from penchant.simulations.data.loaders import load
from penchant.simulations.runs import RunFolder

TINY = "synthetic:users=24,items=40,interactions=10,topics=8,seed=0"
Capture = pytest.CaptureFixture[str]


@dataclass
class Said:
    """What a command line answered."""

    code: int
    out: str
    err: str


def penchant(capsys: Capture, *argv: str | Path) -> Said:
    capsys.readouterr()
    code = main([str(word) for word in argv])
    said = capsys.readouterr()
    return Said(code, said.out, said.err)


def refused(said: Said, code: int = 2) -> str:
    """The one line on stderr with which a command was refused."""
    assert said.code == code
    assert said.out == ""
    assert said.err.startswith("penchant: ")
    assert said.err.count("\n") == 1
    return said.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with every row."""
    path = tmp_path_factory.mktemp("finished") / "run"
    assert main(["simulate", "--data", TINY, "--rounds", "2", "--out", str(path), "-q"]) == 0
    return path


def metrics(results: Mapping[str, Any]) -> dict[str, Any]:
    return {row["name"]: row["metrics"] for row in results["runs"]}


# ---------------------------------------------------------------------------------------------------- what is said


def test_a_table_goes_to_stdout_and_progress_to_stderr(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "run"
    said = penchant(capsys, "simulate", "--data", TINY, "--learner", "cooccurrence", "--out", out)
    assert said.code == 0
    for row in ("popularity", "no-sharing", "co-occurrence"):
        assert row in said.out
        assert row in said.err
    assert said.out.rstrip().endswith("report.html")
    assert "ε = 8 at δ = 1e-5" in said.out
    assert "Report:" not in said.err


def test_json_is_all_there_is_on_stdout_and_is_the_results_file(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "run"
    said = penchant(capsys, "simulate", "--data", TINY, "--learner", "cooccurrence", "--out", out, "--json")
    assert said.code == 0
    assert json.loads(said.out) == json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert "co-occurrence" in said.err


def test_quiet_says_nothing_and_writes_everything(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "run"
    said = penchant(capsys, "simulate", "--data", TINY, "--learner", "cooccurrence", "--out", out, "-q")
    assert said == Said(0, "", "")
    assert {"config.toml", "results.json", "rounds.jsonl", "report.html"} <= {p.name for p in out.iterdir()}


def test_verbose_tells_of_each_round_and_plain_does_not(tmp_path: Path, capsys: Capture) -> None:
    asked = ("simulate", "--data", TINY, "--learner", "cooccurrence", "--out")
    said, plain = penchant(capsys, *asked, tmp_path / "a", "-v"), penchant(capsys, *asked, tmp_path / "b")
    assert "  co-occurrence 1: 24 users" in said.err
    assert "  co-occurrence 2: 24 users" in said.err
    assert "24 users" not in plain.err


def test_quiet_json_is_json_and_nothing_else(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    asked = ("simulate", "--data", TINY, "--learner", "cooccurrence", "--out", tmp_path / "run", "-q", "--json")
    for argv in (asked, ("compare", finished, finished, "-q", "--json")):
        said = penchant(capsys, *argv)
        assert json.loads(said.out)
        assert said.err == ""
    assert penchant(capsys, "compare", finished, finished, "-q") == Said(0, "", "")
    assert penchant(capsys, "recommend", "--run", finished, "--user", "u1", "-q") == Said(0, "", "")


def test_without_an_out_a_new_folder_under_runs_is_made_each_time(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert penchant(capsys, "simulate", "--data", TINY, "--learner", "cooccurrence", "-q").code == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--epsilon", "3"], "add --delta 1e-5"),
        (["--epsilon", "nan", "--delta", "1e-5"], "epsilon must be positive and finite"),
        (["--epsilon", "-1", "--delta", "1e-5"], "epsilon must be positive and finite"),
        (["--unit", "interaction", "--model", "gru"], "take --model mf or mlp or neumf"),
        (["--unit", "none", "--epsilon", "3", "--delta", "1e-5"], "unit none promises nothing"),
        (["--learner", "cooccurrence", "--model", "mf"], "has no model"),
        (["--model", "grü"], "did you mean 'gru'?"),
        (["--rounds", "0"], "rounds must be a whole number ≥ 1, not 0"),
        # these show only once the data is there
        (["--cohort", "25"], "take --cohort 24"),
        (["--epsilon", "3", "--delta", "0.05"], "delta 0.05 is not below 1/24: take --delta 1e-05"),
        (["--split", "random"], "no split 'random'; choose from"),
        (["--data", "embeded"], "did you mean 'embedded'?"),
        (["--items", "items.csv"], "items goes with a CSV"),
        (["--config", "gone.toml"], "cannot read gone.toml"),
    ],
)
def test_an_impossible_mix_exits_2_with_one_line_and_writes_nothing(
    argv: list[str], words: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refused(penchant(capsys, "simulate", "--data", TINY, "--out", "run", *argv))
    assert not list(tmp_path.iterdir())


def test_a_missing_cuda_device_is_refused_in_one_line(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    asked = ("simulate", "--data", TINY, "--learner", "cooccurrence", "--out", tmp_path / "run", "--device")
    assert refused(penchant(capsys, *asked, "cuda")) == ("penchant: no CUDA device here: take --device cpu or auto\n")
    assert not list(tmp_path.iterdir())
    assert penchant(capsys, *asked, "cpu", "-q").code == 0


def test_a_folder_that_holds_a_run_is_not_written_over(finished: Path, capsys: Capture) -> None:
    before = (finished / "results.json").read_bytes()
    line = refused(penchant(capsys, "simulate", "--data", TINY, "--seed", "1", "--out", finished))
    assert "already holds a run: take another --out, or --resume" in line
    assert (finished / "results.json").read_bytes() == before


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("")
    said = penchant(capsys, "simulate", "--data", TINY, "--learner", "cooccurrence", "--out", tmp_path / "file" / "run")
    assert "cannot write" in refused(said)


def test_movielens_that_is_not_installed_gives_synthetic_data_and_a_word_on_how_to_get_it(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "penchant_movielens", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = penchant(capsys, "simulate", "--cohort", "99999999", "--out", tmp_path / "run")
    assert said.code == 2
    assert "MovieLens is not installed, so this runs on synthetic data" in said.err
    assert "pip install ./movielens" in said.err
    assert "larger than the" in said.err  # it went on with synthetic data
    said = penchant(capsys, "simulate", "--data", "embedded", "--out", tmp_path / "run")
    assert "penchant-movielens is not installed; run: pip install ./movielens" in refused(said)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------- configs and files


def test_a_config_repeats_a_run_and_options_beside_it_win(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    again = penchant(capsys, "simulate", "--config", finished / "config.toml", "--out", tmp_path / "a", "--json", "-q")
    assert metrics(json.loads(again.out)) == metrics(RunFolder(finished).read_results())
    other = penchant(
        capsys, "simulate", "--config", finished / "config.toml", "--seed", "1", "--out", tmp_path / "b", "--json", "-q"
    )
    assert metrics(json.loads(other.out)) != metrics(RunFolder(finished).read_results())
    assert RunFolder(tmp_path / "b").read_config().seed == 1
    assert RunFolder(tmp_path / "b").read_config().rounds == 2


def written(where: Path, bad: str = "") -> tuple[Path, Path]:
    """A log of eight people and its items, with one more row if asked for."""
    log, items = where / "log.csv", where / "items.csv"
    lines = [f"p{u},i{(3 * u + 5 * t) % 11},{1_600_000_000 + t},{1 + t % 5}" for u in range(8) for t in range(5)]
    log.write_text("user,item,timestamp,rating\n" + "\n".join(lines) + "\n" + bad, encoding="utf-8")
    rows = [f"i{i},Títle [/b] {i},{'Comedy|Drama' if i % 2 else '[War]'}" for i in range(12)]
    items.write_text("item,title,genres\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return log, items


def test_a_csv_of_ones_own_with_its_items_is_simulated_and_recommended_from(tmp_path: Path, capsys: Capture) -> None:
    log, items = written(tmp_path)
    out = tmp_path / "run"
    asked = ("simulate", "--data", log, "--items", items, "--rating-scale", "1", "5", "--learner", "cooccurrence")
    said = penchant(capsys, *asked, "--out", out)
    assert said.code == 0
    assert "terms are not known" in said.out
    results = RunFolder(out).read_results()
    assert (results["data"]["users"], results["data"]["items"], results["data"]["interactions"]) == (8, 12, 40)
    shown = json.loads(penchant(capsys, "recommend", "--run", out, "--user", "p3", "-k", "3", "--json").out)
    assert all(item["title"].startswith("Títle [/b] ") for item in shown["items"])
    said = penchant(capsys, "recommend", "--run", out, "--user", "p3", "-k", "3")
    assert all(item["title"] in said.out for item in shown["items"])  # whatever looks like markup in it


def test_a_malformed_row_exits_3_with_file_line_and_column_or_is_counted(tmp_path: Path, capsys: Capture) -> None:
    log, items = written(tmp_path, bad="p1,i3,1600000009,nine\n")
    out = tmp_path / "run"
    asked = ("simulate", "--data", log, "--items", items, "--learner", "cooccurrence", "--out", out)
    assert refused(penchant(capsys, *asked), 3).startswith("penchant: log.csv, line 42, column 'rating': not a rating")
    assert not out.exists()
    assert penchant(capsys, *asked, "--skip-bad-rows", "-q").code == 0
    cleaning = RunFolder(out).read_results()["data"]["cleaning"]
    assert "1 skipped: malformed" in cleaning
    assert "41 rows read" in cleaning


def test_a_file_that_is_not_there_exits_3(tmp_path: Path, capsys: Capture) -> None:
    said = penchant(capsys, "simulate", "--data", tmp_path / "gone.csv", "--out", tmp_path / "run")
    assert "no such file" in refused(said, 3)


# ------------------------------------------------------------------------------------------------------------- compare


def test_a_run_compared_with_itself_differs_by_nothing(finished: Path, capsys: Capture) -> None:
    found = json.loads(penchant(capsys, "compare", finished, finished, "--json").out)
    assert found["differing"] == []
    assert list(found["differences"]) == [row["name"] for row in RunFolder(finished).read_results()["runs"]]
    assert all(d == {"mean": 0.0, "low": 0.0, "high": 0.0} for d in found["differences"].values())


def test_two_seeds_are_compared_row_by_row_over_the_same_people(
    finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = tmp_path / "other"
    asked = ("simulate", "--data", TINY, "--rounds", "2", "--seed", "1", "--learner", "fedavg", "--out", other, "-q")
    assert penchant(capsys, *asked).code == 0
    found = json.loads(penchant(capsys, "compare", finished, other, "--json").out)
    ours, theirs = metrics(RunFolder(finished).read_results()), metrics(RunFolder(other).read_results())
    assert list(found["differences"]) == list(theirs)  # the rows that both have
    for name, difference in found["differences"].items():
        assert difference["mean"] == pytest.approx(theirs[name]["ndcg@10"] - ours[name]["ndcg@10"])
        assert difference["low"] <= difference["mean"] <= difference["high"]
    assert found["differences"]["fedavg+user-dp"]["mean"] != 0
    said = penchant(capsys, "compare", finished, other)
    assert "The seeds differ: 0 and 1." in said.out
    assert "NOT COMPARABLE" not in said.out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--data", TINY.replace("users=24", "users=25")), "users 24 and 25"),
        (("--data", TINY.replace("seed=0", "seed=1")), "the data differ"),  # the same name and size, other people
        (("--data", TINY, "--split", "global-time"), "leave-last-out and global-time"),
    ],
)
def test_runs_on_other_data_or_splits_are_not_compared_and_it_is_said_why(
    argv: tuple[str, ...], words: str, finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = tmp_path / "other"
    assert penchant(capsys, "simulate", *argv, "--learner", "cooccurrence", "--out", other, "-q").code == 0
    found = json.loads(penchant(capsys, "compare", finished, other, "--json").out)
    assert found["differences"] == {}
    assert words in " ".join(found["differing"])
    said = penchant(capsys, "compare", finished, other)
    assert said.code == 0
    assert "NOT COMPARABLE" in said.out


def test_what_is_no_finished_run_cannot_be_compared(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    assert "holds no finished run" in refused(penchant(capsys, "compare", finished, tmp_path))
    assert "holds no finished run" in refused(penchant(capsys, "compare", tmp_path / "gone", finished))


# ----------------------------------------------------------------------------------------------------------- recommend


@pytest.mark.parametrize("row", ["fedavg", "fedavg+opacus", "fedavg+user-dp", "co-occurrence"])
def test_recommendations_are_new_titles_the_best_first(row: str, finished: Path, capsys: Capture) -> None:
    data = load(TINY)
    for place in (0, 7, 23):
        user = data.interactions.users[place]
        said = penchant(capsys, "recommend", "--run", finished, "--user", user, "--row", row, "-k", "5", "--json")
        found = json.loads(said.out)
        history = data.interactions.history(place)
        seen = {data.catalogue.ids[i] for i in history.items}
        shown = [item["item"] for item in found["items"]]
        assert len(set(shown)) == 5
        assert not set(shown) & seen
        assert [item["score"] for item in found["items"]] == sorted((i["score"] for i in found["items"]), reverse=True)
        assert [item["item"] for item in found["recent"]] == [data.catalogue.ids[i] for i in history.items[-5:][::-1]]
        assert found["n_history"] == len(history)
        assert bool(found["privacy"]) == (row != "fedavg") == ("ε" in found["privacy_note"])


def test_recommendations_are_shown_with_titles_and_what_was_promised(finished: Path, capsys: Capture) -> None:
    said = penchant(capsys, "recommend", "--run", finished, "--user", "u1", "-k", "4")
    found = json.loads(penchant(capsys, "recommend", "--run", finished, "--user", "u1", "-k", "4", "--json").out)
    assert found["row"] == "co-occurrence"  # the run's last federated row
    assert "User u1 most recently chose:" in said.out
    assert all(item["title"] in said.out for item in found["items"])
    assert "add/remove one profile" in " ".join(said.out.split())


def test_never_more_is_recommended_than_is_new(finished: Path, capsys: Capture) -> None:
    found = json.loads(penchant(capsys, "recommend", "--run", finished, "--user", "u1", "-k", "999", "--json").out)
    assert len(found["items"]) == 40 - len(set(load(TINY).interactions.history(1).items.tolist()))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--user", "u001"), "no user 'u001' in synthetic-24x40; did you mean 'u"),
        (("--user", "somebody"), "choose from u0, u1"),
        (("--user", "u1", "--row", "cooccurrence"), "did you mean 'co-occurrence'?"),
        (("--user", "u1", "--row", "popularity"), "choose from co-occurrence, fedavg"),
        (("--user", "u1", "-k", "0"), "-k must be ≥ 1, not 0"),
    ],
)
def test_an_unknown_user_or_row_exits_2_with_what_was_meant(
    argv: tuple[str, ...], words: str, finished: Path, capsys: Capture
) -> None:
    assert words in refused(penchant(capsys, "recommend", "--run", finished, *argv))


def test_nothing_is_recommended_from_what_is_no_run(tmp_path: Path, capsys: Capture) -> None:
    assert "holds no finished run" in refused(penchant(capsys, "recommend", "--run", tmp_path, "--user", "u1"))


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "more", [["--rounds", "3"], ["--seed", "0"], ["--out", "x"], ["--config", "c"], ["--skip-bad-rows"]]
)
def test_resume_with_other_options_is_refused(more: list[str], finished: Path, capsys: Capture) -> None:
    line = refused(penchant(capsys, "simulate", "--resume", finished, *more))
    assert "give no other option" in line


def test_resume_of_what_is_no_run_is_refused(tmp_path: Path, capsys: Capture) -> None:
    for path in (tmp_path, tmp_path / "gone"):
        assert "cannot read" in refused(penchant(capsys, "simulate", "--resume", path))
    assert not list(tmp_path.iterdir())


def test_resume_of_a_finished_run_gives_its_results(finished: Path, capsys: Capture) -> None:
    before = (finished / "results.json").read_bytes()
    said = penchant(capsys, "simulate", "--resume", finished, "--json", "-q")
    assert json.loads(said.out) == json.loads(before)
    assert (finished / "results.json").read_bytes() == before


def test_a_torn_checkpoint_exits_3_with_one_line(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.write_config(RunFolder(finished).read_config())
    (folder.path / "partial").mkdir()
    (folder.path / "partial" / "fedavg.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{")
    said = penchant(capsys, "simulate", "--resume", folder.path, "-q")
    assert "fedavg.safetensors is damaged: delete it and go on with" in refused(said, 3)


def test_ctrl_c_exits_130_with_the_line_that_goes_on_and_the_run_ends_as_if_it_never_stopped(
    tmp_path: Path, capsys: Capture
) -> None:
    out, rounds = tmp_path / "a run" / ("long" * 20), 200
    argv = [
        "simulate",
        "--data",
        TINY,
        "--learner",
        "fedavg",
        "--unit",
        "user",
        "--rounds",
        str(rounds),
        "--nodes",
        "1",
    ]
    command = [sys.executable, "-m", "penchant.common.cli", *argv, "--out", str(out)]
    checkpoint = out / "partial" / "fedavg+user-dp.safetensors"
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        until = time.monotonic() + 120
        while not checkpoint.exists() and run.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        said_out, said_err = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130, said_err
    assert said_out == ""
    assert "Traceback" not in said_err
    assert f"Stopped. Go on with:  penchant simulate --resume '{out}'" in " ".join(said_err.split(" ")).replace(
        "\n", ""
    )
    kept = RunFolder(out).read_partial("fedavg+user-dp")
    assert kept is not None
    assert 0 < kept[0].done < rounds
    assert not (out / "results.json").exists()
    went_on = penchant(capsys, "simulate", "--resume", out, "--json", "-q")
    never = penchant(capsys, *argv, "--out", tmp_path / "never", "--json", "-q")
    spent, whole = (json.loads(said.out)["runs"][-1]["privacy"]["epsilon"] for said in (went_on, never))
    if (
        spent != whole
    ):  # stopped between a round's charge and its checkpoint: it ran again, with fresh noise and a charge
        assert spent > whole
        return
    assert metrics(json.loads(went_on.out)) == metrics(json.loads(never.out))
    one, two = (load_file(p / "models" / "fedavg+user-dp.safetensors") for p in (out, tmp_path / "never"))
    assert all(np.array_equal(one[name], two[name]) for name in one)
