"""A device takes the newest release of its own channel, and nobody can send it another, an older or none at all."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penchant.common.artifacts.manifest import MANIFEST, MAX_BLOB, POINTER, Blob, Manifest, Offer, Pointer, Seen
from penchant.common.artifacts.signing import SKEW_MS, Envelope, PublicKey, SigningKey, to_json
from penchant.common.errors import (
    ExpiredArtifact,
    InvalidConfig,
    MalformedArtifact,
    PenchantError,
    StaleArtifact,
    UntrustedArtifact,
)
from scripts.wire_vectors import APP, DAY_MS, NEXT, NOW_MS, PLAN, RELEASE, ROOT, certificate, manifest, offer, pointer
from tests.common.hostile import json_values

OFFER = offer()
SIGNED = OFFER.manifest
NOTHING = Seen()
RECORD: dict[str, Any] = json.loads(SIGNED.payload)


def check(
    found: Offer,
    seen: Seen = NOTHING,
    *,
    root: PublicKey = ROOT.public,
    app_id: str = APP.app_id,
    population: str = APP.population,
    channel: str = APP.channel,
    now_ms: int = NOW_MS,
) -> tuple[Manifest, Seen]:
    return found.check(root, app_id=app_id, population=population, channel=channel, now_ms=now_ms, seen=seen)


def pointing(key: SigningKey = RELEASE, *, serial: int = 1, **changes: Any) -> Offer:
    """The same manifest under another pointer; `changes` are fields of it."""
    signed = manifest().signed(key)
    return Offer(certificate(key, serial=serial), pointer(signed, key, **changes), signed)


# -------------------------------------------------------------------------------------------------- manifests


def test_a_manifest_comes_back_and_its_hash_names_it() -> None:
    found = Manifest.read(SIGNED, RELEASE.public)
    assert found == manifest()
    assert manifest(version=2).signed(RELEASE).sha256 != SIGNED.sha256 == manifest().signed(NEXT).sha256


@given(name=st.sampled_from(sorted(RECORD)), value=json_values)
@example(name="version", value=True)
@example(name="version", value=2.0)
@example(name="parents", value="abc")
@example(name="parents", value=["../../state"])
@example(name="settings", value=[])
@example(name="plan", value="[" * 100_000)
@example(name="plan", value="null")
@example(name="plan", value='{"sums":[],"schema_version":1}')
@example(name="plan", value=PLAN.to_json().replace('"n_users":1000', '"n_users":1' + "0" * 400))
@example(name="plan", value=PLAN.to_json().replace('"n_users":1000', '"n_users":NaN'))
@example(name="plan", value=PLAN.to_json().replace(":", ": "))  # the same plan with another digest
@example(name="plan", value=replace(PLAN, population="others").to_json())
@example(name="settings", value={**RECORD["settings"], "head": 5})  # not the task that people enrolled for
@example(name="guarantee", value=None)
@example(name="guarantee", value={**RECORD["guarantee"], "epsilon": -1})
@example(name="guarantee", value={**RECORD["guarantee"], "epsilon": True})
@example(name="guarantee", value={**RECORD["guarantee"], "epsilon": "small"})
@example(name="guarantee", value={**RECORD["guarantee"], "unit": "interaction"})
@example(name="guarantee", value={k: v for k, v in RECORD["guarantee"].items() if k != "trust"})
@example(name="model", value={"sha256": "ab" * 32, "size": MAX_BLOB + 1})
@example(name="model", value={"sha256": "AB" * 32, "size": 1})
@example(name="model", value={"sha256": "../" * 21 + "x", "size": 1})
@example(name="model", value={"sha256": "ab" * 32, "size": 1.0})
@example(name="catalogue", value={"sha256": "ab" * 32, "size": 1})
def test_a_manifest_with_a_field_that_is_not_right_is_malformed(name: str, value: Any) -> None:
    signed = RELEASE.sign(MANIFEST, to_json({**RECORD, name: value}))
    try:
        found = Manifest.read(signed, RELEASE.public)
    except MalformedArtifact:
        return
    assert type(value) is type(RECORD[name])
    assert name not in ("plan", "settings", "guarantee", "model", "catalogue", "parents") or value == []
    assert json.loads(found.signed(RELEASE).payload)[name] == value  # what was signed is what was understood


@pytest.mark.parametrize("name", sorted(RECORD))
def test_a_manifest_without_a_field_is_malformed(name: str) -> None:
    record = {key: value for key, value in RECORD.items() if key != name}
    if name == "guarantee":
        record[name] = None
    with pytest.raises(MalformedArtifact):
        Manifest.read(RELEASE.sign(MANIFEST, to_json(record)), RELEASE.public)


def test_a_manifest_of_a_newer_penchant_is_read_where_only_fields_were_added_and_else_refused() -> None:
    assert Manifest.read(RELEASE.sign(MANIFEST, to_json({**RECORD, "later": {}})), RELEASE.public) == manifest()
    with pytest.raises(MalformedArtifact, match="update penchant"):
        Manifest.read(RELEASE.sign(MANIFEST, to_json({**RECORD, "schema_version": 2})), RELEASE.public)


def test_a_promise_needs_its_words_and_no_promise_has_none() -> None:
    nothing = replace(PLAN, unit="none", sums=tuple(replace(s, noise_multiplier=0.0) for s in PLAN.sums))
    assert manifest(plan=nothing.to_json(), guarantee=None).guarantee is None
    for changes in ({"guarantee": None}, {"plan": nothing.to_json()}, {"population": "others"}, {"version": 0}):
        with pytest.raises(InvalidConfig):
            manifest(**changes)


@given(data=st.binary(max_size=60), other=st.binary(max_size=60))
def test_a_blob_takes_its_own_bytes_only(data: bytes, other: bytes) -> None:
    blob = Blob.of(data)
    assert blob.check(data) == data
    assert Blob.from_record(blob.to_record()) == blob
    for wrong in (other, data[:-1], data + b"\0", bytes(len(data))):
        if wrong != data:
            with pytest.raises(MalformedArtifact):
                blob.check(wrong)


@given(name=st.text(max_size=70))
@example(name="A" * 64)
@example(name="a" * 64 + "\n")
@example(name="٣" * 64)  # digits to str.isdigit
@example(name="/" * 64)
def test_a_hash_that_could_name_another_file_is_no_hash(name: str) -> None:
    with pytest.raises(MalformedArtifact):
        Blob(name, 1)


# ---------------------------------------------------------------------------------------------------- pointers


@given(name=st.sampled_from(sorted(json.loads(OFFER.pointer.payload))), value=json_values)
@example(name="manifest", value="../../etc/passwd")
@example(name="sequence", value=True)
@example(name="sequence", value=0)
@example(name="channel", value="")
@example(name="expires_ms", value=NOW_MS - 3_600_000)
def test_a_pointer_with_a_field_that_is_not_right_is_malformed(name: str, value: Any) -> None:
    record = {**json.loads(OFFER.pointer.payload), name: value}
    try:
        found = Pointer.read(RELEASE.sign(POINTER, to_json(record)), RELEASE.public)
    except MalformedArtifact:
        return
    assert type(value) is type(getattr(found, name))
    assert getattr(found, name) == value


# ------------------------------------------------------------------------------------------------------ offers


def test_an_offer_comes_back_from_bytes_and_is_taken() -> None:
    found, seen = check(Offer.from_bytes(OFFER.to_bytes()))
    assert found == manifest()
    assert seen == Seen(1, 1, NOW_MS - 3_600_000, RELEASE.public.id, SIGNED.sha256)
    assert check(OFFER, seen) == (found, seen)  # the same again


@given(bit=st.integers(min_value=0))
def test_a_flipped_bit_anywhere_in_an_offer_changes_nothing_or_is_refused(bit: int) -> None:
    data = bytearray(OFFER.to_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    try:
        found = check(Offer.from_bytes(bytes(data)))
    except (MalformedArtifact, UntrustedArtifact):
        return
    assert found == check(OFFER)


@given(data=st.binary(max_size=60) | st.integers(0, len(OFFER.to_bytes()) - 1).map(lambda n: OFFER.to_bytes()[:n]))
@example(data=b"[" * 100_000)
@example(data=b'{"certificate":null,"pointer":null,"manifest":null}')
@example(data=b'{"certificate":{},"pointer":{},"manifest":{}}')
@example(data=b" " * (3 << 20) + OFFER.to_bytes())
@example(data=OFFER.to_bytes()[:-1] + b',"pointer":null}')
def test_bytes_that_are_no_offer_are_malformed(data: bytes) -> None:
    with pytest.raises(MalformedArtifact):
        Offer.from_bytes(data)


def test_an_offer_of_swapped_or_foreign_parts_is_untrusted() -> None:
    other, foreign = offer(version=2), offer(NEXT)
    parts = ("certificate", "pointer", "manifest")
    swaps = [replace(OFFER, **{a: getattr(OFFER, b)}) for a in parts for b in parts if a != b]
    mixed = [replace(OFFER, **{name: getattr(foreign, name)}) for name in parts]
    for found in (*swaps, *mixed, replace(OFFER, manifest=other.manifest), replace(OFFER, pointer=other.pointer)):
        with pytest.raises(UntrustedArtifact):
            check(found)


def resigned(statement: Envelope, by: SigningKey) -> Envelope:
    return by.sign(statement.payload_type, statement.payload)


def test_an_offer_signed_by_any_other_key_is_untrusted() -> None:
    for name, thief in (("certificate", RELEASE), ("certificate", NEXT), ("pointer", NEXT), ("manifest", NEXT)):
        with pytest.raises(UntrustedArtifact):
            check(replace(OFFER, **{name: resigned(getattr(OFFER, name), thief)}))
    for name in ("pointer", "manifest"):  # the root key certifies; it is no release key
        with pytest.raises(UntrustedArtifact):
            check(replace(OFFER, **{name: resigned(getattr(OFFER, name), ROOT)}))
    with pytest.raises(UntrustedArtifact):
        check(OFFER, root=NEXT.public)


ELSEWHERE: list[dict[str, Any]] = [{"app_id": "books"}, {"population": "others"}, {"channel": "candidate"}]
FOREIGN: list[dict[str, Any]] = [
    {"app_id": "books"},
    {"population": "others", "plan": replace(PLAN, population="others").to_json()},
]


def test_an_offer_for_another_app_population_or_channel_is_untrusted() -> None:
    for changes in ELSEWHERE:
        with pytest.raises(UntrustedArtifact):
            check(OFFER, **changes)
        with pytest.raises(UntrustedArtifact):
            check(pointing(**changes))
    for changes in FOREIGN:  # the pointer is ours, the manifest is not
        with pytest.raises(UntrustedArtifact):
            check(offer(**changes))
    theirs = replace(OFFER, certificate=certificate(app_id="books"))
    with pytest.raises(UntrustedArtifact, match="another app"):
        check(theirs)


def test_an_older_pointer_a_retired_key_and_a_second_statement_of_one_number_are_refused() -> None:
    _, seen = check(offer(serial=3, sequence=7))
    assert (seen.serial, seen.sequence) == (3, 7)
    for older in (offer(serial=3, sequence=6), offer(serial=2, sequence=8)):
        with pytest.raises(StaleArtifact):
            check(older, seen)
    with pytest.raises(UntrustedArtifact, match="two release keys"):
        check(offer(NEXT, serial=3, sequence=8), seen)
    with pytest.raises(UntrustedArtifact, match="two pointers"):
        check(offer(serial=3, sequence=7, version=2), seen)
    renewed = check(pointing(serial=3, sequence=7, expires_ms=NOW_MS + 60 * DAY_MS), seen)
    assert renewed[1] == seen


def test_a_renewed_certificate_of_the_same_key_takes_no_older_pointer() -> None:
    _, seen = check(offer(serial=1, sequence=7))
    with pytest.raises(StaleArtifact):
        check(offer(serial=2, sequence=6), seen)
    assert check(offer(serial=2, sequence=8), seen)[1].serial == 2


def test_a_new_key_undoes_what_a_thief_of_the_old_one_did_and_the_old_one_is_worth_nothing() -> None:
    _, seen = check(offer(serial=1, sequence=2**53 - 1, version=666))  # no honest sequence can follow this
    mended, seen = check(offer(NEXT, serial=2, sequence=9, version=8), seen)
    assert (mended.version, seen.sequence, seen.key) == (8, 9, NEXT.public.id)
    with pytest.raises(StaleArtifact):
        check(offer(serial=1, sequence=2**53 - 1, version=666), seen)
    with pytest.raises(UntrustedArtifact):  # under the new certificate the old key's statements are nobody's
        check(replace(offer(serial=1, sequence=10), certificate=certificate(NEXT, serial=2)), seen)
    with pytest.raises(StaleArtifact):
        check(offer(NEXT, serial=2, sequence=8, version=7), seen)


def test_a_device_that_remembers_no_key_keeps_its_sequence() -> None:
    with pytest.raises(StaleArtifact):
        check(OFFER, Seen(serial=1, sequence=2))
    assert check(OFFER, Seen(serial=1, sequence=1))[1].key == RELEASE.public.id


CREATED, EXPIRES = NOW_MS - 3_600_000, NOW_MS + 30 * DAY_MS


@pytest.mark.parametrize(
    ("now_ms", "taken"),
    [
        (CREATED - SKEW_MS, True),
        (CREATED - SKEW_MS - 1, False),
        (EXPIRES + SKEW_MS, True),
        (EXPIRES + SKEW_MS + 1, False),
        (0, False),
        (2**53, False),
        (-1, False),
    ],
)
def test_an_offer_is_taken_in_its_time_and_as_far_beyond_as_a_clock_may_be_off(now_ms: int, taken: bool) -> None:
    if taken:
        check(OFFER, now_ms=now_ms)
        return
    with pytest.raises(ExpiredArtifact):
        check(OFFER, now_ms=now_ms)


def test_a_channel_frozen_by_whoever_stands_between_is_noticed_when_its_pointer_expires() -> None:
    frozen = pointing(expires_ms=NOW_MS + DAY_MS)
    _, seen = check(frozen)
    check(frozen, seen, now_ms=NOW_MS + DAY_MS)
    with pytest.raises(ExpiredArtifact):
        check(frozen, seen, now_ms=NOW_MS + DAY_MS + SKEW_MS + 1)


def test_a_clock_set_back_brings_no_expired_pointer_back() -> None:
    old = pointing(sequence=1, created_ms=NOW_MS - 9 * DAY_MS, expires_ms=NOW_MS - 8 * DAY_MS)
    before = NOW_MS - 9 * DAY_MS
    certified = replace(old, certificate=certificate(not_before_ms=before))
    check(certified, now_ms=before)
    with pytest.raises(ExpiredArtifact):  # what was seen since says how late it is at least
        check(certified, Seen(serial=1, sequence=1, at_ms=NOW_MS), now_ms=before)


def test_an_expired_certificate_ends_its_pointers_too() -> None:
    found = replace(OFFER, certificate=certificate(not_after_ms=NOW_MS - SKEW_MS - 1))
    with pytest.raises(ExpiredArtifact, match="release key"):
        check(found)


@given(
    serial=st.integers(1, 3),
    sequence=st.integers(1, 3),
    version=st.integers(1, 3),
    key=st.sampled_from([RELEASE, NEXT]),
    seen_serial=st.integers(0, 3),
    seen_sequence=st.integers(0, 3),
    seen_key=st.sampled_from([RELEASE, NEXT]),
)
def test_what_is_remembered_never_goes_back_under_one_key(
    serial: int,
    sequence: int,
    version: int,
    key: SigningKey,
    seen_serial: int,
    seen_sequence: int,
    seen_key: SigningKey,
) -> None:
    before = Seen(seen_serial, seen_sequence, 0, seen_key.public.id)
    try:
        _, after = check(offer(key, serial=serial, sequence=sequence, version=version), before)
    except PenchantError:
        return
    assert after.serial >= before.serial
    assert after.sequence >= before.sequence or (after.serial > before.serial and after.key != before.key)
