"""Which people become devices, and what is refused before any process starts; a whole fleet is in tests/system."""

from __future__ import annotations

from pathlib import Path

import pytest

from penchant.common.artifacts.bundle import Bundle
from penchant.common.catalogue import Catalogue
from penchant.common.cli import EXIT_USAGE, main
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import Interactions
from penchant.simulations.data.dataset import CleaningReport, Dataset
from penchant.simulations.fleet import MOST_EVENTS, Device, people, server_at, spec
from tests.server.operators import CATALOGUE, an_operator

LONG = list(range(12)) * 200
"""More events than a device is given."""


def data(*histories: list[int]) -> Dataset:
    """Of the app's items and one that it does not have."""
    catalogue = Catalogue(ids=(*CATALOGUE.ids, "film:elsewhere"))
    log = Interactions.of(histories, len(catalogue))
    return Dataset(name="films", interactions=log, catalogue=catalogue, cleaning=CleaningReport(), terms="")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return an_operator(tmp_path / "prod", users=3).path


def test_devices_are_people_who_know_ten_of_the_apps_items_and_get_their_latest_events(folder: Path) -> None:
    bundle = Bundle.read(folder / "app.bundle")
    found = list(people(data([1, 2], [*range(9), 40], LONG, list(range(11))), bundle, 2))
    assert [user for user, _ in found] == ["2", "3"]
    assert [len(events) for _, events in found] == [MOST_EVENTS, 11]
    assert found[1][1][0] == {"item": "film:0", "kind": "view", "strength": 1.0, "at_ms": 0}
    with pytest.raises(InvalidConfig, match="1 people know ten"):
        list(people(data(LONG), bundle, 2))


def test_a_folder_on_this_machine_gives_a_token_to_each_device(folder: Path) -> None:
    server = server_at(str(folder), bundle=None, token=None)
    told = [spec(server, [], folder / "state", rounds=2, version=3) for _ in range(2)]
    assert len({one["token"] for one in told}) == len({one["passphrase"] for one in told}) == 2
    assert not server.follows  # models are promoted by hand unless the operator says so


def test_a_server_elsewhere_needs_its_bundle_and_a_token_and_must_be_the_bundles_own(folder: Path) -> None:
    bundle = folder / "app.bundle"
    with pytest.raises(InvalidConfig, match="--bundle"):
        server_at("https://films.example:8443", bundle=None, token="pt_x")
    with pytest.raises(InvalidConfig, match="go to https://localhost:8443"):
        server_at("https://films.example:8443", bundle=bundle, token="pt_x")
    assert server_at("https://localhost:8443/", bundle=bundle, token="pt_x").tokens() == "pt_x"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--engine", "fleet"], "needs --url"),
        (["--engine", "fleet", "--url", "nowhere"], "serve init"),
        (["--engine", "fleet", "--url", "prod", "--devices", "0"], "--devices must be"),
        (["--engine", "fleet", "--url", "prod", "--wait", "nan"], "--wait"),
        (["--url", "prod"], "--engine fleet"),
    ],
)
def test_what_cannot_be_is_one_line_that_says_how_to_mend_it(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", *argv]) == EXIT_USAGE
    assert words in capsys.readouterr().err


def test_what_is_new_in_a_list_is_counted() -> None:
    assert Device("1", before=["a", "b"], after=["b", "c", "d"]).changed == 2
