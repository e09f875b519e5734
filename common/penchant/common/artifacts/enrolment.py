"""What a device signs with its node key when it enrols, and when it leaves.

    message = Σ over the parts of  len(part) as four bytes, big-endian, then the part
    enrol   = "penchant/enrol/v1", app_id, population, SHA-256(token)
    revoke  = "penchant/revoke/v1", app_id, population
    proof   = ECDSA(node key, SHA-256, message), in DER

Flower signs each of a node's requests with its key on a NIST curve; the same key signs here, so that nobody can enrol
or revoke a key that they do not hold. The token's hash ties a proof to one enrolment.

Source: FIPS 186-5, section 6 (ECDSA); RFC 5480 (the key's form).
"""

from __future__ import annotations

import hashlib

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from penchant.common.errors import MalformedArtifact, UntrustedArtifact

_CURVES = {"secp256r1", "secp384r1", "secp521r1"}


def enrol_message(app_id: str, population: str, token: str) -> bytes:
    """The bytes that prove an enrolment.

    >>> enrol_message("a", "b", "t")[:26]
    b'\\x00\\x00\\x00\\x11penchant/enrol/v1\\x00\\x00\\x00\\x01a'
    """
    return _message(b"penchant/enrol/v1", app_id, population) + _part(hashlib.sha256(token.encode()).digest())


def revoke_message(app_id: str, population: str) -> bytes:
    """The bytes that prove that a device itself asks to be taken out."""
    return _message(b"penchant/revoke/v1", app_id, population)


def prove(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """The signature, in DER."""
    return key.sign(message, ec.ECDSA(hashes.SHA256()))


def check_proof(node_key: bytes, proof: bytes, message: bytes) -> None:
    """
    Args:
        node_key: SubjectPublicKeyInfo in DER.

    Raises:
        MalformedArtifact: not a key on P-256, P-384 or P-521, or one that is not written as RFC 5480 has it, with an
            uncompressed point: a key that was revoked may not come back under another name.
        UntrustedArtifact: this key did not sign this message.
    """
    try:
        key = serialization.load_der_public_key(node_key)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise MalformedArtifact("a node key that is not on a NIST curve; make one with P-384")
    if key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) != node_key:
        raise MalformedArtifact("a node key that is not SubjectPublicKeyInfo with an uncompressed point")
    try:
        key.verify(proof, message, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise UntrustedArtifact("the proof is not by the node key, or for another app, population or token") from None


def _message(purpose: bytes, app_id: str, population: str) -> bytes:
    return _part(purpose) + _part(app_id.encode()) + _part(population.encode())


def _part(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data
