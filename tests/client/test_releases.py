"""Releases on a device: after a kill, a flipped bit or a full disk, one whole and signed release is in use."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from penchant.client import _releases
from penchant.client._releases import POINTS, Shelf
from penchant.common.artifacts.bundle import Bundle, catalogue_bytes, compact_bytes
from penchant.common.artifacts.manifest import Blob, Offer, Seen
from penchant.common.artifacts.release import Release
from penchant.common.artifacts.signing import SigningKey
from penchant.common.errors import MalformedArtifact
from tests.client.apps import CATALOGUE, NOW, Operator

OPERATOR = Operator()
KEY = b"d" * 32
LISTED = catalogue_bytes(CATALOGUE)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return OPERATOR.bundle(tmp_path / "films.bundle")


def shelf(tmp_path: Path, bundle: Path, operator: Operator = OPERATOR) -> Shelf:
    return Shelf(tmp_path / "releases", operator.app, lambda: Bundle.read(bundle), key=KEY)


def put(to: Shelf, version: int, operator: Operator = OPERATOR) -> Offer:
    model = operator.model(version)
    offer = operator.offer(version, model)
    manifest, _ = offer.check(
        operator.root.public, app_id="films", population="default", channel="stable", now_ms=NOW, seen=Seen()
    )
    to.put(offer, manifest, LISTED, model)
    return offer


def version(of: Shelf) -> int:
    return of.current().manifest.version


def test_before_any_release_came_the_bundles_own_is_in_use(tmp_path: Path, bundle: Path) -> None:
    found = shelf(tmp_path, bundle).current()
    assert (found.manifest.version, found.damaged) == (1, 0)


def test_the_newest_is_in_use_and_one_before_it_is_kept(tmp_path: Path, bundle: Path) -> None:
    here = shelf(tmp_path, bundle)
    for number in (2, 3, 4):
        put(here, number)
        assert version(here) == number
        assert version(shelf(tmp_path, bundle)) == number
    assert len([path for path in (tmp_path / "releases").iterdir() if path.is_dir()]) == 2


@pytest.mark.parametrize("file", ["offer.json", "catalogue.json", "model.safetensors"])
@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "gone"])
def test_a_damaged_release_gives_way_to_the_one_before_it_and_then_to_the_bundle(
    tmp_path: Path, bundle: Path, file: str, harm: str
) -> None:
    here = shelf(tmp_path, bundle)
    names = [put(here, number).manifest.sha256 for number in (2, 3)]
    for damaged, (name, left) in enumerate(zip(reversed(names), (2, 1), strict=True), 1):
        path = tmp_path / "releases" / name / file
        data = bytearray(path.read_bytes())
        if harm == "flip":
            data[-20] ^= 1
        path.write_bytes({"flip": bytes(data), "cut": bytes(data[:-7]), "empty": b"", "gone": b""}[harm])
        if harm == "gone":
            path.unlink()
        found = shelf(tmp_path, bundle).current()
        assert (found.manifest.version, found.damaged) == (left, damaged)
    put(here, 3)  # the same again mends it
    assert version(here) == 3


def test_every_flipped_bit_of_an_offer_is_noticed_or_changes_nothing(tmp_path: Path, bundle: Path) -> None:
    here = shelf(tmp_path, bundle)
    path = tmp_path / "releases" / put(here, 2).manifest.sha256 / "offer.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        for bit in (1, 32):  # the second changes a letter's case
            changed = bytearray(whole)
            changed[place] ^= bit
            path.write_bytes(changed)
            found = here.current()
            assert (found.manifest.version, found.damaged) in {(1, 1), (2, 0)}
            assert found.manifest.guarantee is not None


def test_a_release_that_another_key_signed_is_not_taken_from_the_disk(tmp_path: Path, bundle: Path) -> None:
    evil = Operator(root=SigningKey(b"e" * 32), release=SigningKey(b"v" * 32))
    put(shelf(tmp_path, bundle, evil), 9, evil)
    found = shelf(tmp_path, bundle).current()
    assert (found.manifest.version, found.damaged) == (1, 1)


@pytest.mark.parametrize("names", [b"\xff\xfe", b"../../etc", b"", b"a" * 64])
def test_a_list_of_names_that_is_not_one_costs_nothing_but_the_release(
    tmp_path: Path, bundle: Path, names: bytes
) -> None:
    here = shelf(tmp_path, bundle)
    put(here, 2)
    (tmp_path / "releases" / "current").write_bytes(names)
    assert version(shelf(tmp_path, bundle)) == 1


def test_bytes_that_are_not_the_manifests_are_not_taken_in(tmp_path: Path, bundle: Path) -> None:
    here, model = shelf(tmp_path, bundle), OPERATOR.model(2)
    offer = OPERATOR.offer(2, model)
    manifest, _ = offer.check(
        OPERATOR.root.public, app_id="films", population="default", channel="stable", now_ms=NOW, seen=Seen()
    )
    for catalogue, wrong in ((LISTED, OPERATOR.model(3)), (LISTED, model[:-1]), (LISTED[:-1], model), (b"", model)):
        with pytest.raises(MalformedArtifact):
            here.put(offer, manifest, catalogue, wrong)
    assert version(here) == 1


def test_a_release_that_cannot_be_scored_here_is_refused_before_it_is_in_use(tmp_path: Path, bundle: Path) -> None:
    here, deep = shelf(tmp_path, bundle), Release({"weights": CATALOGUE.content}, None).to_bytes()
    offer = OPERATOR.offer(2, deep)
    manifest, _ = offer.check(
        OPERATOR.root.public, app_id="films", population="default", channel="stable", now_ms=NOW, seen=Seen()
    )
    with pytest.raises(MalformedArtifact, match="no item vectors"):
        here.put(offer, manifest, LISTED, deep)
    assert version(here) == 1


# Killed on the way from version 2 to version 3.
CHILD = """
import os, signal, sys
from pathlib import Path

from penchant.client._releases import Shelf
from penchant.common.artifacts.bundle import Bundle
from tests.client.test_releases import KEY, OPERATOR, put

folder, stop = Path(sys.argv[1]), sys.argv[2]
armed = False

def at(point):
    if armed and point == stop:
        os.kill(os.getpid(), signal.SIGKILL)

here = Shelf(folder / "releases", OPERATOR.app, lambda: Bundle.read(folder / "films.bundle"), key=KEY, at=at)
put(here, 2)
armed = True
put(here, 3)
"""


@pytest.mark.parametrize("point", POINTS)
def test_after_a_kill_on_the_way_the_old_or_the_new_one_is_whole(tmp_path: Path, bundle: Path, point: str) -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path), point], timeout=60, check=False)
    assert done.returncode == -9
    here = shelf(tmp_path, bundle)
    assert (version(here), here.current().damaged) == (3 if point == "put:named" else 2, 0)
    put(here, 3)
    assert version(here) == 3
    assert not list((tmp_path / "releases").glob("*.part"))


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, bundle: Path) -> None:
    code = f"""
import resource
from pathlib import Path
from penchant.common.errors import StoreFull
from tests.client import test_releases as t
here = t.shelf(Path({str(tmp_path)!r}), Path({str(bundle)!r}))
t.put(here, 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    t.put(here, 3)
except StoreFull as error:
    print(error)
print(t.version(here))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    said, left = done.stdout.splitlines()
    assert "make room" in said
    assert left == "2"


def test_with_no_release_and_no_bundle_either_the_error_says_which_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MalformedArtifact, match=r"none\.bundle"):
        shelf(tmp_path, tmp_path / "none.bundle").current()


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "gone", "another", "junk", "forged"])
def test_a_compact_catalogue_that_cannot_be_used_is_made_again_and_the_release_stays(
    tmp_path: Path, bundle: Path, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "releases" / put(shelf(tmp_path, bundle), 2).manifest.sha256 / "catalogue.compact"
    data = place.read_bytes()
    other = replace(CATALOGUE, titles=tuple("another's" for _ in CATALOGUE.ids))
    forged = replace(CATALOGUE, titles=other.titles)
    forged.__dict__["version"] = CATALOGUE.version
    harmed = {"flip": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "cut": data[:-7], "empty": b"", "gone": b""}
    harmed |= {
        "another": compact_bytes(other, Blob.of(catalogue_bytes(other)), KEY),
        "junk": hashlib.sha256(b"junk").digest() + b"junk",
        "forged": compact_bytes(forged, Blob.of(LISTED), b"another device's key"),
    }
    place.write_bytes(harmed[harm])
    if harm == "gone":
        place.unlink()
    found = shelf(tmp_path, bundle).current()
    assert (found.manifest.version, found.damaged, found.catalogue.titles) == (2, 0, CATALOGUE.titles)
    assert place.read_bytes() == data
    monkeypatch.delattr(_releases, "read_catalogue")  # so that the JSON is read no more
    assert shelf(tmp_path, bundle).current().catalogue.titles == CATALOGUE.titles


def test_a_release_that_fails_in_any_way_gives_way_to_the_one_before_it(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = shelf(tmp_path, bundle)
    put(here, 2)
    put(here, 3)
    whole = Release.from_bytes

    def failing(data: bytes, n_items: int) -> Release:
        if data == OPERATOR.model(3):
            raise MemoryError
        return whole(data, n_items)

    monkeypatch.setattr(Release, "from_bytes", failing)
    found = here.current()
    assert (found.manifest.version, found.damaged) == (2, 1)


def test_a_release_is_in_use_though_its_compact_catalogue_cannot_be_kept(tmp_path: Path, bundle: Path) -> None:
    place = tmp_path / "releases" / put(shelf(tmp_path, bundle), 2).manifest.sha256 / "catalogue.compact"
    place.unlink()
    place.mkdir()  # no file can be put there
    found = shelf(tmp_path, bundle).current()
    assert (found.manifest.version, found.damaged, found.catalogue) == (2, 0, CATALOGUE)
    assert [path.name for path in place.parent.glob("*.part")] == []
