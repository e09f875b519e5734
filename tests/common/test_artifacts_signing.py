"""What the right key signed, as what it signed it, in its time, is believed; all else is one typed error."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penchant.common.artifacts.signing import (
    CERTIFICATE,
    SCHEMA_VERSION,
    SKEW_MS,
    Certificate,
    Envelope,
    PublicKey,
    SigningKey,
    from_json,
    pae,
    to_json,
)
from penchant.common.errors import (
    ExpiredArtifact,
    InvalidConfig,
    MalformedArtifact,
    PenchantError,
    StaleArtifact,
    UntrustedArtifact,
)
from scripts.wire_vectors import NEXT, NOW_MS, RELEASE, ROOT, certificate
from tests.common.hostile import json_values

KIND = "application/vnd.penchant.test+json"
SIGNED = ROOT.sign(KIND, b'{"a": 1}')
RECORD: dict[str, Any] = {
    "schema_version": SCHEMA_VERSION,
    "app_id": "films",
    "public_key": RELEASE.public.raw.hex(),
    "serial": 1,
    "not_before_ms": 10,
    "not_after_ms": 20,
}


def refused(envelope: Envelope, key: PublicKey = ROOT.public, kind: str = KIND) -> bool:
    try:
        envelope.opened(key, kind)
    except PenchantError:
        return True
    return False


@given(
    kind=st.text(max_size=20), payload=st.binary(max_size=40), other=st.text(max_size=20), body=st.binary(max_size=40)
)
@example(kind="a 1 b", payload=b"", other="a", body=b"1 b")
def test_what_is_signed_tells_every_kind_and_payload_apart(kind: str, payload: bytes, other: str, body: bytes) -> None:
    try:
        same = pae(kind, payload) == pae(other, body)
    except UnicodeEncodeError:  # half a character, which no envelope holds
        return
    assert same == ((kind, payload) == (other, body))


@given(
    data=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])), st.integers(-(2**53), 2**53) | st.text("aé\n\\")
    )
)
def test_a_signed_statement_comes_back_from_bytes_and_opens(data: dict[str, Any]) -> None:
    read = Envelope.from_bytes(ROOT.sign(KIND, to_json(data)).to_bytes())
    assert read.opened(ROOT.public, KIND) == data


@given(bit=st.integers(min_value=0))
def test_a_flipped_bit_anywhere_in_an_envelope_changes_nothing_or_is_refused(bit: int) -> None:
    data = bytearray(SIGNED.to_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    try:
        found = Envelope.from_bytes(bytes(data)).opened(ROOT.public, KIND)
    except PenchantError:
        return
    assert found == {"a": 1}  # as in the last, unused bits of a base64, or the name of a field that nobody reads


def test_every_flipped_bit_of_payload_and_signature_is_refused() -> None:
    ((name, signature),) = SIGNED.signatures
    for i in range(8 * len(SIGNED.payload)):
        changed = bytearray(SIGNED.payload)
        changed[i // 8] ^= 1 << i % 8
        assert refused(replace(SIGNED, payload=bytes(changed)))
    for i in range(8 * 64):
        wrong = bytearray(signature)
        wrong[i // 8] ^= 1 << i % 8
        assert refused(replace(SIGNED, signatures=((name, bytes(wrong)),)))
    assert not refused(SIGNED)


def test_every_truncated_envelope_is_malformed() -> None:
    data = SIGNED.to_bytes()
    for end in range(len(data)):
        with pytest.raises(MalformedArtifact):
            Envelope.from_bytes(data[:end])


@given(data=st.binary(max_size=200) | st.text(max_size=200).map(lambda s: s.encode(errors="replace")))
def test_any_bytes_that_are_no_envelope_are_malformed(data: bytes) -> None:
    with pytest.raises(MalformedArtifact):
        Envelope.from_bytes(data)


HOSTILE = {
    "deep": b"[" * 100_000,
    "deep object": b'{"payload":' * 100_000,
    "a list": b"[]",
    "a number": b"7",
    "no payload": b'{"payloadType":"a","signatures":[]}',
    "a number for text": b'{"payloadType":"a","payload":7,"signatures":[]}',
    "null signatures": b'{"payloadType":"a","payload":"","signatures":null}',
    "a text for signatures": b'{"payloadType":"a","payload":"","signatures":"abc"}',
    "a signature that is a list": b'{"payloadType":"a","payload":"","signatures":[["a","b"]]}',
    "base64 of another alphabet": b'{"payloadType":"a","payload":"_-_-","signatures":[]}',
    "base64 with a line break": b'{"payloadType":"a","payload":"QU\\nJD","signatures":[]}',
    "a field twice": b'{"payloadType":"a","payload":"","payload":"QUJD","signatures":[]}',
    "UTF-16": '{"payloadType":"a","payload":"","signatures":[]}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"payloadType":"a","payload":"","signatures":[]}',
    "half a character": b'{"payloadType":"\\ud800","payload":"","signatures":[]}',
    "nine signatures": b'{"payloadType":"a","payload":"","signatures":['
    + b",".join([b'{"keyid":"a","sig":""}'] * 9)
    + b"]}",
    "above 1 MiB": b" " * (1 << 20) + b"{}",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_envelope_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedArtifact):
        Envelope.from_bytes(data)


STRICT = {
    "not a number": b'{"a":NaN}',
    "infinity": b'{"a":-Infinity}',
    "beyond a float": b'{"a":1e400}',
    "beyond 2^53": b'{"a":9007199254740993}',
    "more digits than Python reads": b'{"a":' + b"1" * 5000 + b"}",
    "a name twice": b'{"a":1,"a":1}',
    "a name twice, one escaped": b'{"a":1,"\\u0061":1}',
    "a name twice, deep inside": b'{"b":[{"a":1,"a":2}]}',
    "half a character": b'{"a":"\\udc00"}',
    "half a character as a name": b'{"\\ud83d":1}',
    "Latin-1": b'{"a":"\xe9"}',
    "UTF-32": '{"a":1}'.encode("utf-32"),
    "a list": b"[1]",
    "two objects": b"{}{}",
    "a comment": b"{} // a",
    "nothing": b"",
    "deep": b'{"a":' * 100_000,
}


@pytest.mark.parametrize("payload", STRICT.values(), ids=STRICT.keys())
def test_json_that_two_readers_could_read_differently_is_malformed_even_when_signed(payload: bytes) -> None:
    with pytest.raises(MalformedArtifact):
        from_json(payload)
    with pytest.raises(MalformedArtifact):
        ROOT.sign(KIND, payload).opened(ROOT.public, KIND)


def test_json_of_other_writers_is_read() -> None:
    assert from_json(b' { "a" : 1.5e3, "\\u00e9" : "\\ud83d\\ude00", "n" : -9007199254740992 } \n') == {
        "a": 1500.0,
        "é": "😀",
        "n": -(2**53),
    }


def test_another_key_another_kind_or_no_signature_is_untrusted() -> None:
    ((_, signature),) = SIGNED.signatures
    for envelope, key, kind in (
        (SIGNED, NEXT.public, KIND),
        (SIGNED, ROOT.public, CERTIFICATE),
        (replace(SIGNED, payload_type=CERTIFICATE), ROOT.public, CERTIFICATE),
        (replace(SIGNED, signatures=()), ROOT.public, KIND),
        (replace(SIGNED, signatures=((NEXT.public.id, signature),)), ROOT.public, KIND),
        (replace(SIGNED, signatures=((NEXT.public.id, signature),)), NEXT.public, KIND),
        (replace(SIGNED, signatures=((ROOT.public.id, signature[:63]),)), ROOT.public, KIND),
        (replace(SIGNED, signatures=((ROOT.public.id, signature + b"\0"),)), ROOT.public, KIND),
        (replace(SIGNED, signatures=((ROOT.public.id, b""),)), ROOT.public, KIND),
    ):
        with pytest.raises(UntrustedArtifact):
            envelope.opened(key, kind)


def test_a_signature_has_one_form() -> None:
    # RFC 8032, 5.1.7: S is below the group's order L. Adding L gives the other solution that lax verifiers take.
    order = 2**252 + 27742317777372353535851937790883648493
    ((name, signature),) = SIGNED.signatures
    other = (int.from_bytes(signature[32:], "little") + order).to_bytes(32, "little")
    assert refused(replace(SIGNED, signatures=((name, signature[:32] + other),)))


def test_one_good_signature_among_others_is_enough_and_the_statement_keeps_its_name() -> None:
    both = replace(SIGNED, signatures=(*NEXT.sign(KIND, SIGNED.payload).signatures, *SIGNED.signatures))
    assert not refused(both)
    assert not refused(both, NEXT.public)
    assert both.sha256 == SIGNED.sha256


@given(raw=st.binary(max_size=40))
def test_a_key_of_another_length_is_refused_and_any_of_32_bytes_verifies_nothing(raw: bytes) -> None:
    if len(raw) == 32:
        assert refused(SIGNED, PublicKey(raw))
        return
    for kind in (PublicKey, SigningKey):
        with pytest.raises(InvalidConfig):
            kind(raw)


def test_a_signing_key_never_shows_itself() -> None:
    key = SigningKey.generate()
    assert SigningKey(key.private_bytes()).public == key.public
    assert key.private_bytes().hex() not in repr(key) + str(vars(key))
    assert SigningKey.generate().public != key.public


# ------------------------------------------------------------------------------------------------ certificates


def read(record: dict[str, Any], root: PublicKey = ROOT.public) -> Certificate:
    return Certificate.read(ROOT.sign(CERTIFICATE, to_json(record)), root)


def test_a_certificate_comes_back_and_fields_may_be_more_than_those_known() -> None:
    found = read({**RECORD, "later": [1]})
    assert found == Certificate(app_id="films", public_key=RELEASE.public, serial=1, not_before_ms=10, not_after_ms=20)


@given(name=st.sampled_from(sorted(RECORD)), value=json_values)
@example(name="schema_version", value=True)
@example(name="schema_version", value=1.0)
@example(name="serial", value=True)
@example(name="serial", value=1.0)
@example(name="serial", value=0)
@example(name="public_key", value=" ".join(["00"] * 32))  # bytes.fromhex would read it
@example(name="public_key", value="AB" * 32)
@example(name="not_after_ms", value=10)
def test_a_certificate_with_a_field_of_another_kind_is_malformed(name: str, value: Any) -> None:
    expected = type(RECORD[name])
    if type(value) is expected and not (name == "public_key" and len(value) != 64):
        try:
            read({**RECORD, name: value})
        except MalformedArtifact:
            return
        assert value, "no field may be empty or zero"
        return
    with pytest.raises(MalformedArtifact):
        read({**RECORD, name: value})


@pytest.mark.parametrize("name", sorted(RECORD))
def test_a_certificate_without_a_field_is_malformed(name: str) -> None:
    with pytest.raises(MalformedArtifact):
        read({key: value for key, value in RECORD.items() if key != name})


def test_a_certificate_that_the_root_did_not_sign_is_untrusted() -> None:
    for forged in (certificate(root=RELEASE), certificate(root=NEXT)):
        with pytest.raises(UntrustedArtifact):
            Certificate.read(forged, ROOT.public)


def test_a_certificate_is_believed_in_its_time_for_its_app_and_until_a_newer_one() -> None:
    good = Certificate.read(certificate(serial=2), ROOT.public)
    good.check("films", now_ms=NOW_MS, serial=2)
    with pytest.raises(UntrustedArtifact, match="another app"):
        good.check("books", now_ms=NOW_MS)
    with pytest.raises(StaleArtifact, match="release key 2 was retired by 3"):
        good.check("films", now_ms=NOW_MS, serial=3)
    for now, refusal in (
        (good.not_before_ms - SKEW_MS, ""),
        (good.not_before_ms - SKEW_MS - 1, "not valid yet"),
        (good.not_after_ms + SKEW_MS, ""),
        (good.not_after_ms + SKEW_MS + 1, "has expired"),
    ):
        if not refusal:
            good.check("films", now_ms=now)
            continue
        with pytest.raises(ExpiredArtifact, match=refusal):
            good.check("films", now_ms=now)


def test_an_envelope_is_what_dsse_says_it_is() -> None:
    record = json.loads(SIGNED.to_bytes())
    assert record.keys() == {"payloadType", "payload", "signatures"}
    assert base64.b64decode(record["payload"]) == SIGNED.payload
    assert pae("http://example.com/HelloWorld", b"hello world") == (  # the example of DSSE's protocol.md
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )
