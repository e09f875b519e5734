"""A run becomes what an app ships with: the model the run released, signed, and an SDK recommends from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from penchant.common import cli
from penchant.common.artifacts.bundle import Bundle
from penchant.common.errors import InvalidConfig, MalformedArtifact
from penchant.common.interactions import Interactions
from penchant.simulations.bundle import Keys, make_bundle
from penchant.simulations.runs import RunFolder
from penchant.simulations.settings import SimulationConfig
from penchant.simulations.simulate import learner_of, load_data, simulate
from tests.test_without_extras import BLOCK

DATA = "synthetic:users=40,items=30,interactions=8,topics=4,seed=0"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "a")
    simulate(SimulationConfig(data=DATA, learner="cooccurrence", epsilon=8.0, delta=1e-5), folder)
    return folder


def test_a_bundle_holds_what_the_run_released_and_its_whole_guarantee(run: RunFolder, tmp_path: Path) -> None:
    keys = Keys.kept(tmp_path / "keys")
    made = make_bundle(run, "co-occurrence", tmp_path / "films.bundle", keys, app_id="films")
    state, manifest = run.read_model("co-occurrence")
    data = load_data(run.read_config())
    side = learner_of(manifest, data.catalogue).item_side(state)
    assert side is not None
    assert made.release.side is not None
    assert np.array_equal(made.release.side.vectors, side.vectors)
    assert made.manifest.guarantee == json.loads(json.dumps(manifest["privacy"]))
    assert made.manifest.plan == manifest["plan"]
    assert made.catalogue == data.catalogue
    assert made.app.root == keys.root.public


def test_the_same_app_again_is_the_next_version(run: RunFolder, tmp_path: Path) -> None:
    keys, out = Keys.kept(tmp_path / "keys"), tmp_path / "films.bundle"
    one = make_bundle(run, "co-occurrence", out, keys, app_id="films")
    two = make_bundle(run, "co-occurrence", out, Keys.kept(tmp_path / "keys"), app_id="films")
    assert (two.manifest.version, two.seen.sequence) == (2, 2)
    assert two.manifest.parents == (one.offer.manifest.sha256,)
    with pytest.raises(InvalidConfig, match="another app or root key"):
        make_bundle(run, "co-occurrence", out, keys, app_id="books")
    with pytest.raises(InvalidConfig, match="another app or root key"):
        make_bundle(run, "co-occurrence", out, Keys.kept(tmp_path / "others"), app_id="films")
    assert Bundle.read(out).manifest.version == 2


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_keys_that_others_can_read_are_refused(tmp_path: Path) -> None:
    Keys.kept(tmp_path)
    assert (tmp_path / "root.key").stat().st_mode & 0o077 == 0
    (tmp_path / "root.key").chmod(0o644)
    with pytest.raises(InvalidConfig, match="chmod 600"):
        Keys.kept(tmp_path)
    (tmp_path / "root.key").chmod(0o600)
    (tmp_path / "root.key").write_text("no key")
    with pytest.raises(InvalidConfig, match="holds no key"):
        Keys.kept(tmp_path)


def test_the_command_makes_one_and_says_what_is_in_it(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["bundle", "--run", str(run.path), "--app-id", "films", "--out", str(tmp_path / "films.bundle")]
    argv += ["--keys", str(tmp_path / "keys")]
    assert cli.main(argv) == 0
    assert "version 1, 30 items, for films" in capsys.readouterr().out
    assert cli.main([*argv, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["version"], said["items"], said["guarantee"]["unit"]) == (2, 30, "user")
    assert cli.main([*argv, "--days", "0"]) == 2
    assert "--days must be ≥ 1" in capsys.readouterr().err
    assert cli.main([*argv, "--row", "popularity"]) == 2


WITHOUT_TORCH = (
    BLOCK
    + """
import json

from penchant.client import Client

with Client.open(sys.argv[1], bundle=sys.argv[2]) as me:
    for item in sys.argv[3:]:
        me.observe(item, "watch")
    print(json.dumps([one.item for one in me.recommend(10)]))
assert not {"torch", "scipy"} & set(sys.modules)
"""
)


@pytest.mark.parametrize("model", ["gru", "transformer", "cnn-lstm", "neumf"])
def test_a_network_that_rounds_trained_recommends_without_pytorch_what_pytorch_would(
    model: str, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    simulate(SimulationConfig(data=DATA, model=model, epsilon=8.0, delta=1e-5, rounds=3), folder)
    made = make_bundle(folder, "fedavg", tmp_path / "a.bundle", Keys.kept(tmp_path / "keys"), app_id="films")
    assert made.release.side is None
    state, manifest = folder.read_model("fedavg")
    own = [3, 14, 15, 9, 26, 5]
    learner = learner_of(manifest, made.catalogue)
    (scores,) = learner.scores(state, Interactions.of([own], len(made.catalogue)))
    scores[own] = -np.inf
    command = [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path / "state"), str(tmp_path / "a.bundle")]
    command += [made.catalogue.ids[item] for item in own]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == [made.catalogue.ids[item] for item in np.argsort(-scores, kind="stable")[:10]]


def test_a_model_that_no_device_could_score_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    simulate(SimulationConfig(data=DATA, model="gru", unit="none", rounds=1), folder)
    state, manifest = folder.read_model("fedavg")
    folder.write_model("fedavg", {**state, "out.bias": state["out.bias"][:-1]}, manifest)
    with pytest.raises(MalformedArtifact, match=r"'out\.bias' of gru"):
        make_bundle(folder, "fedavg", tmp_path / "a.bundle", Keys.kept(tmp_path / "keys"), app_id="films")
    assert not (tmp_path / "a.bundle").exists()
