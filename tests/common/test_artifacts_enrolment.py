"""Only who holds a node key enrols or revokes it, each proof for one app, population and token."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from penchant.common.artifacts.enrolment import check_proof, enrol_message, prove, revoke_message
from penchant.common.errors import MalformedArtifact, UntrustedArtifact

KEY = ec.generate_private_key(ec.SECP384R1())


def der(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


MESSAGE = enrol_message("films", "readers", "token")
PROOF = prove(KEY, MESSAGE)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)


@given(a=st.tuples(texts, texts, texts), b=st.tuples(texts, texts, texts))
def test_no_two_enrolments_are_proved_by_the_same_bytes(a: tuple[str, str, str], b: tuple[str, str, str]) -> None:
    assert (enrol_message(*a) == enrol_message(*b)) == (a == b)
    assert (revoke_message(*a[:2]) == revoke_message(*b[:2])) == (a[:2] == b[:2])
    assert enrol_message(*a) != revoke_message(*a[:2])


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda c: c.name)
def test_a_proof_by_a_key_on_a_nist_curve_is_taken(curve: ec.EllipticCurve) -> None:
    key = ec.generate_private_key(curve)
    check_proof(der(key), prove(key, MESSAGE), MESSAGE)


def test_a_proof_by_another_key_for_anything_else_or_changed_is_untrusted() -> None:
    other = ec.generate_private_key(ec.SECP384R1())
    for key, proof, message in (
        (other, PROOF, MESSAGE),
        (KEY, PROOF, enrol_message("books", "readers", "token")),
        (KEY, PROOF, enrol_message("films", "others", "token")),
        (KEY, PROOF, enrol_message("films", "readers", "another")),
        (KEY, PROOF, revoke_message("films", "readers")),
        (KEY, PROOF[:-1], MESSAGE),
        (KEY, PROOF + b"\0", MESSAGE),
        (KEY, b"", MESSAGE),
        (KEY, bytes(len(PROOF)), MESSAGE),
    ):
        with pytest.raises(UntrustedArtifact):
            check_proof(der(key), proof, message)


@given(data=st.binary(max_size=120))
def test_bytes_that_are_no_key_are_malformed(data: bytes) -> None:
    with pytest.raises(MalformedArtifact):
        check_proof(data, PROOF, MESSAGE)


def test_a_key_of_another_kind_or_curve_is_malformed() -> None:
    for key in (
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
        ec.generate_private_key(ec.SECP256K1()),
    ):
        with pytest.raises(MalformedArtifact, match="NIST"):
            check_proof(der(key), PROOF, MESSAGE)


@pytest.mark.parametrize("number", range(2, 8))
def test_every_flipped_bit_of_a_key_is_refused(number: int) -> None:
    key = ec.derive_private_key(number, ec.SECP384R1())
    data, proof = der(key), prove(key, MESSAGE)
    for i in range(8 * len(data)):
        changed = bytearray(data)
        changed[i // 8] ^= 1 << i % 8
        with pytest.raises((MalformedArtifact, UntrustedArtifact)):
            check_proof(bytes(changed), proof, MESSAGE)


@pytest.mark.parametrize("number", range(2, 8))
def test_a_key_has_one_form_so_that_none_comes_back_after_it_was_revoked(number: int) -> None:
    key = ec.derive_private_key(number, ec.SECP384R1())
    point = key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    x, odd, head = point[1:49], point[-1] & 1, der(key)[: -len(point)]
    hybrid = head + bytes([6 + odd]) + point[1:]
    compressed = bytes.fromhex("3046301006072a8648ce3d020106052b81040022033200") + bytes([2 + odd]) + x
    for other in (hybrid, compressed, der(key) + b"\0"):
        with pytest.raises(MalformedArtifact):
            check_proof(other, prove(key, MESSAGE), MESSAGE)
    check_proof(der(key), prove(key, MESSAGE), MESSAGE)
