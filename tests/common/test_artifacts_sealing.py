"""A contribution opens once, for the process and the round it was sealed for, and for nobody and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save

from penchant.common.artifacts.sealing import ROUND_KEY, RoundKey, RoundOpener, check_round_key, seal
from penchant.common.artifacts.signing import Envelope, pae, to_json
from penchant.common.errors import MalformedArtifact, MalformedContribution, PenchantError, UntrustedArtifact
from penchant.common.privacy.sums import WITHIN
from scripts.wire_vectors import APP, NEXT, PLAN, RELEASE, hpke_key

ROUND: dict[str, Any] = {
    "app_id": APP.app_id,
    "population": APP.population,
    "plan": PLAN.digest,
    "round": 3,
    "attempt": 1,
}
ARRAYS = {"counts": np.array([0, 0.5, 0.5], np.float32), WITHIN: np.array(-0.5)}


def opener(**changes: Any) -> RoundOpener:
    return RoundOpener(RELEASE, **{**ROUND, **changes})


def sealed_for(to: RoundOpener) -> bytes:
    return seal(ARRAYS, to.statement, RoundKey.read(to.statement, RELEASE.public))


@given(
    arrays=st.dictionaries(
        st.text("abz/", min_size=1, max_size=5),
        hnp.arrays(
            st.sampled_from(["<f4", "<f8", "<i8"]),
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
            elements=st.integers(-9, 9),
        ),
        max_size=4,
    )
)
def test_what_is_sealed_opens_with_its_names_shapes_types_and_values(arrays: dict[str, Any]) -> None:
    here = opener()
    found = here.open(seal(arrays, here.statement, here.key))
    assert found.keys() == arrays.keys()
    for name, values in arrays.items():
        assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape)
        np.testing.assert_array_equal(found[name], values)


def test_an_array_laid_out_in_any_way_opens_with_its_values() -> None:
    here, values = opener(), np.arange(12, dtype=np.float32).reshape(3, 4)
    for view in (values.T, values[:, ::-1], values[::2]):
        np.testing.assert_array_equal(here.open(seal({"w": view}, here.statement, here.key))["w"], view)


def test_sealed_bytes_are_48_more_and_never_the_same_twice() -> None:
    here = opener()
    first, second = sealed_for(here), sealed_for(here)
    assert len(first) == len(save(ARRAYS)) + 48
    assert first[:32] != second[:32]
    assert b"counts" not in first


@pytest.mark.parametrize(
    "changes",
    [
        {"round": 4},
        {"attempt": 2},
        {"plan": replace(PLAN, delta=2e-5).digest},
        {"population": "others"},
        {"app_id": "books"},
    ],
    ids=str,
)
def test_a_contribution_opens_for_no_other_round_try_plan_population_or_app(changes: dict[str, Any]) -> None:
    here, there = opener(), opener(**changes)
    with pytest.raises(MalformedContribution):
        there.open(sealed_for(here))
    there._private = here._private  # nor where the same key were used again
    with pytest.raises(MalformedContribution):
        there.open(sealed_for(here))
    with pytest.raises(UntrustedArtifact):
        check_round_key(here.key, **{**ROUND, **changes})
    check_round_key(here.key, **ROUND)


def test_a_contribution_opens_in_no_other_process_of_the_same_round() -> None:
    with pytest.raises(MalformedContribution):
        opener().open(sealed_for(opener()))


def test_a_contribution_sent_again_as_somebody_else_s_is_refused() -> None:
    here = opener()
    sent = sealed_for(here)
    here.open(sent)
    with pytest.raises(MalformedContribution, match="second time"):
        here.open(sent)
    masked = bytearray(sent)
    masked[31] ^= 0x80  # X25519 ignores this bit of the sender's key; HPKE does not
    with pytest.raises(MalformedContribution):
        here.open(bytes(masked))
    here.open(sealed_for(here))


def test_what_does_not_open_takes_nobody_s_place() -> None:
    """Else anybody on the way could spoil a contribution by sending its first 32 bytes before it."""
    here = opener()
    sent = sealed_for(here)
    with pytest.raises(MalformedContribution):
        here.open(sent[:32] + bytes(len(sent) - 32))
    here.open(sent)


def test_every_flipped_bit_and_every_truncation_is_refused() -> None:
    here = opener()
    sent = sealed_for(here)
    for i in range(8 * len(sent)):
        changed = bytearray(sent)
        changed[i // 8] ^= 1 << i % 8
        with pytest.raises(MalformedContribution):
            here.open(bytes(changed))
    for end in range(len(sent)):
        with pytest.raises(MalformedContribution):
            here.open(sent[:end])
    with pytest.raises(MalformedContribution):
        here.open(sent + b"\0")


@given(data=st.binary(max_size=120))
def test_any_bytes_that_were_not_sealed_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedContribution):
        opener().open(data)


def header(text: str | bytes, body: bytes = b"") -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return len(data).to_bytes(8, "little") + data + body


HOSTILE = {
    "nothing": b"",
    "no arrays": b"hello",
    "a header beyond the end": (2**63).to_bytes(8, "little"),
    "bfloat16": header('{"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}', b"\0\0"),
    "float8": header('{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}', b"\0"),
    "a side of 2^64 - 1": header('{"a":{"dtype":"F32","shape":[0,18446744073709551615],"data_offsets":[0,0]}}'),
    "200 sides": header('{"a":{"dtype":"F32","shape":[' + "1," * 199 + '1],"data_offsets":[0,4]}}', bytes(4)),
    "deep": header(b"[" * 100_000),
    "two arrays in the same bytes": header(
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
}


@pytest.mark.parametrize("plain", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_a_hostile_device_seals_in_place_of_arrays_is_refused(plain: bytes) -> None:
    here = opener()
    suite = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
    public = X25519PublicKey.from_public_bytes(here.key.public_key)
    sealed = suite.encrypt(plain, public, info=pae("penchant/contribution", here.statement.payload))
    with pytest.raises(MalformedContribution):
        here.open(sealed)


# The u-coordinates of small order on Curve25519, as https://cr.yp.to/ecdh.html#validate lists them; whatever is sent to
# one of these can be read by everybody.
LOW_ORDER = [
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]


@pytest.mark.parametrize("point", LOW_ORDER)
def test_nothing_is_sealed_to_or_opened_from_a_point_of_low_order(point: str) -> None:
    here = opener()
    with pytest.raises(MalformedArtifact, match="no X25519 key"):
        seal(ARRAYS, here.statement, replace(here.key, public_key=bytes.fromhex(point)))
    with pytest.raises(MalformedContribution):
        here.open(bytes.fromhex(point) + sealed_for(here)[32:])


# -------------------------------------------------------------------------------------------------- round keys


def test_a_round_key_comes_back_and_is_untrusted_by_any_other_key_or_as_another_statement() -> None:
    here = opener()
    read = RoundKey.read(Envelope.from_bytes(here.statement.to_bytes()), RELEASE.public)
    assert read == here.key
    with pytest.raises(UntrustedArtifact):
        RoundKey.read(here.statement, NEXT.public)
    with pytest.raises(UntrustedArtifact):
        RoundKey.read(replace(here.statement, payload_type="application/vnd.penchant.manifest+json"), RELEASE.public)


RECORD: dict[str, Any] = json.loads(opener().statement.payload)
json_values = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("a0f ")
)


@given(name=st.sampled_from(sorted(RECORD)), value=json_values | st.lists(json_values, max_size=2))
def test_a_round_key_with_a_field_of_another_kind_is_malformed(name: str, value: Any) -> None:
    signed = RELEASE.sign(ROUND_KEY, to_json({**RECORD, name: value}))
    try:
        found = RoundKey.read(signed, RELEASE.public)
    except MalformedArtifact:
        return
    assert type(value) is type(RECORD[name])
    assert name not in ("public_key", "plan")
    assert name == "schema_version" or getattr(found, name) == value


@pytest.mark.parametrize("name", sorted(RECORD))
def test_a_round_key_without_a_field_is_malformed(name: str) -> None:
    record = {key: value for key, value in RECORD.items() if key != name}
    with pytest.raises(MalformedArtifact):
        RoundKey.read(RELEASE.sign(ROUND_KEY, to_json(record)), RELEASE.public)


def test_no_refusal_says_anything_of_what_was_sealed() -> None:
    here = opener()
    sent = bytearray(seal({"secret-film": np.ones(3, np.float32)}, here.statement, here.key))
    for wrong in (bytes(sent[:-1]), bytes(sent) + b"x"):
        with pytest.raises(PenchantError) as caught:
            here.open(wrong)
        assert "secret" not in str(caught.value)
        assert caught.value.__suppress_context__


# ------------------------------------------------------------------------------------- HPKE, written down again


def test_the_vectors_own_hpke_gives_the_numbers_of_rfc_9180() -> None:
    # RFC 9180, appendix A.2.1: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, ChaCha20Poly1305, base mode.
    receiver = X25519PrivateKey.from_private_bytes(
        bytes.fromhex("8057991eef8f1f1af18f4a9491d16a1ce333f695d4db8e38da75975c4478e0fb")
    )
    enc = bytes.fromhex("1afa08d3dec047a643885163f1180476fa7ddb54c6a8029ea33f95796bf2ac4a")
    shared = receiver.exchange(X25519PublicKey.from_public_bytes(enc))
    key, nonce = hpke_key(shared, enc, receiver.public_key().public_bytes_raw(), b"Ode on a Grecian Urn")
    assert key.hex() == "ad2744de8e17f4ebba575b3f5f5a8fa1f69c2a07f6e7500bc60ca6e3e3ec1c91"
    assert nonce.hex() == "5c4d98150661b848853b547f"


def test_a_contribution_is_sealed_as_rfc_9180_says() -> None:
    here = opener()
    sent = sealed_for(here)
    info = pae("penchant/contribution", here.statement.payload)
    shared = here._private.exchange(X25519PublicKey.from_public_bytes(sent[:32]))
    key, nonce = hpke_key(shared, sent[:32], here.key.public_key, info)
    assert ChaCha20Poly1305(key).decrypt(nonce, sent[32:], b"") == save(ARRAYS)
    other, _ = hpke_key(shared, sent[:32], here.key.public_key, info + b"x")
    with pytest.raises(InvalidTag):
        ChaCha20Poly1305(other).decrypt(nonce, sent[32:], b"")
