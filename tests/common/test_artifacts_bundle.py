"""An app's bundle is read whole, as its root key signed it, or refused with one typed error."""

from __future__ import annotations

import dataclasses
import io
import json
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save

from penchant.common.artifacts import bundle
from penchant.common.artifacts.bundle import (
    App,
    Bundle,
    catalogue_bytes,
    compact_bytes,
    read_catalogue,
    read_compact,
    write_whole,
)
from penchant.common.artifacts.manifest import Blob, Seen
from penchant.common.artifacts.signing import to_json
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig, MalformedArtifact, PenchantError, UntrustedArtifact
from scripts.wire_vectors import (
    APP,
    CATALOGUE,
    MODEL,
    NEXT,
    NOW_MS,
    RELEASE,
    ROOT,
    certificate,
    manifest,
    offer,
    pointer,
)
from tests.common.hostile import json_values

OFFER = offer()
KEY = b"d" * 32
FILES: dict[str, bytes] = {
    "app.json": APP.signed(ROOT).to_bytes(),
    "offer.json": OFFER.to_bytes(),
    "catalogue.json": catalogue_bytes(CATALOGUE),
    "model.safetensors": MODEL.to_bytes(),
}


def zipped(files: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return out.getvalue()


DATA = zipped(FILES)


def test_a_bundle_comes_back_from_its_file_and_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("a.bundle", "b.bundle"):
        Bundle.write(tmp_path / name, APP, ROOT, OFFER, catalogue=CATALOGUE, model=MODEL.to_bytes())
    assert (tmp_path / "a.bundle").read_bytes() == (tmp_path / "b.bundle").read_bytes() == DATA
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bundle", "b.bundle"]
    found = Bundle.read(tmp_path / "a.bundle")
    assert (found.app, found.offer, found.catalogue, found.model) == (APP, OFFER, CATALOGUE, MODEL.to_bytes())
    assert found.manifest == manifest()
    assert found.seen == Seen(1, 1, NOW_MS - 3_600_000, RELEASE.public.id, OFFER.manifest.sha256)
    assert found.release.side is not None


def test_a_bundle_that_a_device_would_refuse_is_never_written(tmp_path: Path) -> None:
    place = tmp_path / "films.bundle"
    place.write_bytes(b"before")
    other = Catalogue(ids=("film:1",))
    for app, root, catalogue, model in (
        (replace(APP, app_id="books"), ROOT, CATALOGUE, MODEL.to_bytes()),
        (replace(APP, channel="candidate"), ROOT, CATALOGUE, MODEL.to_bytes()),
        (APP, NEXT, CATALOGUE, MODEL.to_bytes()),
        (replace(APP, root=NEXT.public), NEXT, CATALOGUE, MODEL.to_bytes()),
        (APP, ROOT, other, MODEL.to_bytes()),
        (APP, ROOT, CATALOGUE, MODEL.to_bytes() + b"\0"),
    ):
        with pytest.raises(PenchantError):
            Bundle.write(place, app, root, OFFER, catalogue=catalogue, model=model)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("films.bundle", b"before")]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "a"
    write_whole(place, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(place, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"old")]


def test_a_bundle_is_read_long_after_its_first_pointer_expired(tmp_path: Path) -> None:
    signed = manifest().signed(RELEASE)
    old = replace(
        OFFER,
        certificate=certificate(not_before_ms=1, not_after_ms=1000),
        pointer=pointer(signed, created_ms=10, expires_ms=20),
    )
    assert Bundle.from_bytes(zipped({**FILES, "offer.json": old.to_bytes()})).manifest == manifest()
    late = replace(old, pointer=pointer(signed, created_ms=10_000_000, expires_ms=20_000_000))
    with pytest.raises(UntrustedArtifact):  # made after its release key's time
        Bundle.from_bytes(zipped({**FILES, "offer.json": late.to_bytes()}))


def test_no_bundle_is_one_typed_error_that_names_the_file(tmp_path: Path) -> None:
    for place in (tmp_path / "none.bundle", tmp_path):
        with pytest.raises(MalformedArtifact, match=r"give the app's \.bundle file"):
            Bundle.read(place)


def test_every_truncated_bundle_is_malformed() -> None:
    for end in range(0, len(DATA), 7):
        with pytest.raises(MalformedArtifact):
            Bundle.from_bytes(DATA[:end])


def test_every_flipped_byte_of_a_bundle_changes_nothing_or_is_refused() -> None:
    expected = Bundle.from_bytes(DATA)
    for i in range(len(DATA)):
        changed = bytearray(DATA)
        changed[i] ^= 1 << i % 8
        try:
            found = Bundle.from_bytes(bytes(changed))
        except (MalformedArtifact, UntrustedArtifact):
            continue
        assert (found.app, found.offer, found.model) == (expected.app, expected.offer, expected.model)
        assert found.catalogue == expected.catalogue


@given(data=st.binary(max_size=200))
@example(data=b"PK\x05\x06" + bytes(18))
@example(data=b"PK\x05\x06" + b"\xff" * 18)
@example(data=b"PK\x06\x06" + bytes(52) + b"PK\x06\x07" + bytes(16) + b"PK\x05\x06" + b"\xff" * 16 + bytes(2))
def test_any_bytes_that_are_no_bundle_are_malformed(data: bytes) -> None:
    with pytest.raises(MalformedArtifact):
        Bundle.from_bytes(data)


@given(start=st.integers(0, len(DATA) - 1), noise=st.binary(min_size=1, max_size=12))
def test_noise_anywhere_in_a_bundle_changes_nothing_or_is_refused(start: int, noise: bytes) -> None:
    changed = DATA[:start] + noise + DATA[start + len(noise) :]
    try:
        found = Bundle.from_bytes(changed)
    except (MalformedArtifact, UntrustedArtifact):
        return
    assert (found.app, found.offer, found.model) == (APP, OFFER, FILES["model.safetensors"])


@pytest.mark.parametrize("name", FILES)
def test_a_bundle_without_a_file_or_with_another_s_is_refused(name: str) -> None:
    with pytest.raises(MalformedArtifact, match=f"without {name}"):
        Bundle.from_bytes(zipped({key: data for key, data in FILES.items() if key != name}))
    for data in (b"", b"{}", *(data for key, data in FILES.items() if key != name)):
        with pytest.raises((MalformedArtifact, UntrustedArtifact)):
            Bundle.from_bytes(zipped({**FILES, name: data}))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_files_of_one_name_are_refused_whichever_is_the_good_one(name: str) -> None:
    for order in ((b"{}", FILES[name]), (FILES[name], b"{}"), (FILES[name], FILES[name])):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for data in order:
                archive.writestr(name, data)
            for other in FILES.keys() - {name}:
                archive.writestr(other, FILES[other])
        with pytest.raises(MalformedArtifact, match="two files of one name"):
            Bundle.from_bytes(out.getvalue())


def test_a_compressed_bundle_is_refused_before_it_is_unpacked() -> None:
    bomb = zipped({**FILES, "model.safetensors": bytes(64 << 20)}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 1 << 20
    with pytest.raises(MalformedArtifact, match="compressed or far too large"):
        Bundle.from_bytes(bomb)


def test_a_file_that_claims_to_be_larger_than_it_is_is_refused() -> None:
    """The sizes in the archive's own list, at 20 and 24 of each entry, are what a reader might set memory aside for."""
    at = DATA.index(b"PK\x01\x02")
    for size in (2**30 + 1, 2**32 - 2, 10_000):
        changed = bytearray(DATA)
        changed[at + 20 : at + 28] = struct.pack("<II", size, size)
        with pytest.raises(MalformedArtifact):
            Bundle.from_bytes(bytes(changed))


def test_other_files_in_a_bundle_are_never_looked_at() -> None:
    more = zipped({**FILES, "../../evil.py": b"x", "/etc/passwd": b"x", "app.json/": b""})
    assert Bundle.from_bytes(more).app == APP


# -------------------------------------------------------------------------------------------------------- apps

RECORD: dict[str, Any] = json.loads(APP.signed(ROOT).payload)


def read(record: Mapping[str, Any]) -> App:
    return App.read(ROOT.sign(bundle.APP, to_json(record)))


def test_an_app_comes_back_and_fields_may_be_more_than_those_known() -> None:
    assert read({**RECORD, "later": 1}) == APP
    with pytest.raises(InvalidConfig, match="its own root key"):
        APP.signed(NEXT)


@given(name=st.sampled_from(sorted(RECORD)), value=json_values)
@example(name="wire", value=[1.0, 1])
@example(name="wire", value=["1", "1"])
@example(name="wire", value=[True, True])
@example(name="wire", value=[1])
@example(name="wire", value=[1, 1, 1])
@example(name="wire", value=[2, 1])
@example(name="wire", value=[2, 3])
@example(name="wire", value=[0, 1])
@example(name="wire", value=7)
@example(name="app_id", value="")
@example(name="root", value=NEXT.public.raw.hex())
@example(name="schema_version", value=2)
def test_an_app_with_a_field_that_is_not_right_is_refused(name: str, value: Any) -> None:
    try:
        found = read({**RECORD, name: value})
    except (MalformedArtifact, UntrustedArtifact):
        return
    assert name not in ("schema_version", "root", "wire")
    assert isinstance(value, str)
    assert getattr(found, name) == value


@pytest.mark.parametrize(
    "payload", [b'{"root":' + b"[" * 100_000, b"[]", b"\xff", b'{"root":"00","root":"00"}', b'{"wire":1e400}']
)
def test_an_app_that_cannot_be_read_before_its_signature_is_malformed(payload: bytes) -> None:
    with pytest.raises(MalformedArtifact):
        App.read(ROOT.sign(bundle.APP, payload))


@pytest.mark.parametrize("name", sorted(RECORD))
def test_an_app_without_a_field_is_malformed(name: str) -> None:
    with pytest.raises(MalformedArtifact):
        read({key: value for key, value in RECORD.items() if key != name})


# -------------------------------------------------------------------------------------------------- catalogues


def catalogue_of(data: bytes, version: str = CATALOGUE.version) -> Catalogue:
    return read_catalogue(manifest(catalogue=Blob.of(data), catalogue_version=version), data)


CATALOGUE_RECORD = CATALOGUE.to_record()


@pytest.mark.parametrize(
    "data",
    [
        b"[]",
        b"{}",
        b'{"ids":' + b"[" * 100_000,
        b'{"name":"a","ids":["\\ud800"]}',
        b'{"name":"a","ids":[1,2]}',
        b'{"name":"a","ids":[["a"]]}',
        b'{"name":"a","ids":["a","a"]}',
        b'{"name":"a","ids":["a"],"ids":["b"]}',
        b'{"name":"a","ids":["a"],"titles":[7]}',
        b'{"name":"a","ids":["a"],"topics":[[7]]}',
        b'{"name":"a","ids":["a"],"topics":[7]}',
        b'{"name":"a","ids":["a"],"retired":["b"]}',
        b'{"name":"a","ids":["a"],"retired":[["a"]]}',
        b'{"name":"a","ids":["a"],"numbers":{"x":[1e400]}}',
        b'{"name":"a","ids":["a"],"numbers":{"x":[NaN]}}',
        b'{"name":"a","ids":["a"],"numbers":[]}',
        b'{"name":"a","ids":["a"],"vectors":{"x":{"width":1,"float32":"AADAfw=="}}}',
        b'{"name":"a","ids":["a"],"vectors":{"x":{"width":-1,"float32":""}}}',
        b'{"name":"a","ids":["a"],"vectors":{"x":{"width":9007199254740992,"float32":""}}}',
        b'{"name":"a","ids":["a"],"vectors":{"x":{"width":1.5,"float32":"AAAAAA=="}}}',
        b'{"name":"a","ids":["a"],"vectors":{"x":{"width":1,"float32":"%%%%"}}}',
        b'{"name":"a","ids":["a"],"later":1}',
    ],
    ids=lambda data: data[:60].decode(),
)
def test_a_catalogue_that_is_none_is_malformed_even_when_its_hash_is_right(data: bytes) -> None:
    with pytest.raises(MalformedArtifact):
        catalogue_of(data)


@given(name=st.sampled_from(sorted(CATALOGUE_RECORD)), value=json_values)
def test_a_catalogue_with_a_column_of_another_kind_is_malformed(name: str, value: Any) -> None:
    if value == CATALOGUE_RECORD[name] or (
        name == "name" and isinstance(value, str)
    ):  # its version is without its name
        return
    with pytest.raises(MalformedArtifact):  # at the latest by its version
        catalogue_of(to_json({**CATALOGUE_RECORD, name: value}))


def test_a_catalogue_of_other_bytes_or_another_version_is_malformed() -> None:
    data = catalogue_bytes(CATALOGUE)
    assert catalogue_of(data) == CATALOGUE
    with pytest.raises(MalformedArtifact):
        read_catalogue(manifest(), data + b" ")
    with pytest.raises(MalformedArtifact, match="not of the version"):
        catalogue_of(data, "0" * 16)


TEXT = st.text(max_size=4)


@given(data=st.data(), n=st.integers(1, 4))
def test_a_compact_catalogue_is_the_one_that_its_json_says(data: st.DataObject, n: int) -> None:
    def column(values: st.SearchStrategy[Any]) -> tuple[Any, ...]:
        return tuple(data.draw(st.lists(values, min_size=n, max_size=n)))

    name, topics = data.draw(TEXT.filter(bool)), column(st.lists(TEXT, max_size=2).map(tuple))
    ids = data.draw(st.lists(TEXT, min_size=n, max_size=n, unique=True))
    catalogue = Catalogue(
        ids=ids,
        titles=column(TEXT),
        topics=topics,
        retired=data.draw(st.frozensets(st.sampled_from(ids))),
        sensitive=frozenset(topic for own in topics[:1] for topic in own),
        name=name,
        categories={name: column(TEXT)},
        numbers={name: column(st.floats(allow_infinity=False))},
        texts={name: column(TEXT)},
        vectors={name: np.arange(2.0 * n, dtype=np.float32).reshape(n, 2)},
    )
    read = catalogue_of(catalogue_bytes(catalogue), catalogue.version)
    of = Blob.of(catalogue_bytes(catalogue))
    found = read_compact(manifest(catalogue=of, catalogue_version=catalogue.version), compact_bytes(read, of, KEY), KEY)
    assert found is not None
    assert found.version == dataclasses.replace(found).version == catalogue.version  # replace: worked out anew
    for field in dataclasses.fields(Catalogue):
        if field.name not in ("numbers", "vectors"):
            assert getattr(found, field.name) == getattr(catalogue, field.name)
    assert repr(found.numbers) == repr(catalogue.numbers)  # NaN is not equal to itself
    np.testing.assert_array_equal(found.vectors[name], catalogue.vectors[name])
    assert found.index == {item: i for i, item in enumerate(ids)}


def test_a_compact_catalogue_that_is_damaged_or_of_another_release_or_penchant_is_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of = Blob.of(FILES["catalogue.json"])
    here, data = manifest(catalogue=of), compact_bytes(CATALOGUE, of, KEY)
    assert read_compact(here, data, KEY) == CATALOGUE
    assert read_compact(here, data, b"a" * 32) is None
    for i in range(len(data)):
        assert read_compact(here, data[:i], KEY) is None
        assert read_compact(here, data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :], KEY) is None
    assert read_compact(here, data + b"0", KEY) is None
    assert read_compact(manifest(catalogue=Blob.of(b"{}")), data, KEY) is None
    assert read_compact(manifest(catalogue=of, catalogue_version="0" * 16), data, KEY) is None
    monkeypatch.setattr(bundle, "_COMPACT", 2)
    assert read_compact(here, data, KEY) is None


@pytest.mark.parametrize(
    "body",
    [
        b"junk",
        save({}),
        save({"record": np.frombuffer(b"{}", np.uint8)}),
        save({"record": np.frombuffer(b"[" * 100_000, np.uint8)}),
        save({"record": np.array([1.0])}),
    ],
)
def test_a_compact_catalogue_that_cannot_be_parsed_is_none_and_no_error(body: bytes) -> None:
    of = Blob.of(FILES["catalogue.json"])
    made = bundle._tag(KEY, of, manifest().catalogue_version, body) + body
    assert read_compact(manifest(catalogue=of), made, KEY) is None
