"""TLS certificates of an operator's own authority, which the app's bundle has its devices trust, and nothing else.

    CA (offline, P-256, 10 years) ──► the server's: its names, localhost and 127.0.0.1, a year

Source: RFC 5280.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from penchant.common.errors import InvalidConfig, MalformedData

AUTHORITY_DAYS = 3650
DAYS = 365
LOCAL = ("localhost", "127.0.0.1")
"""Names that a server's certificate always has: what runs beside the proxy is reached under them."""
_HOUR = datetime.timedelta(hours=1)
_LABEL = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*", re.IGNORECASE)


@dataclass(frozen=True, repr=False)
class Pair:
    """A private key and its certificate, in PEM."""

    key: bytes
    certificate: bytes


def new_authority(name: str, *, now_ms: int, days: int = AUTHORITY_DAYS) -> Pair:
    """A certificate authority of one app: EC P-256, and no authority below it."""
    key = ec.generate_private_key(ec.SECP256R1())
    own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} authority"[:64])])
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    made = (
        _certificate(own, own, key.public_key(), key.public_key(), now_ms, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    return Pair(_private(key), made.public_bytes(Encoding.PEM))


def new_server(
    authority: Pair, names: Iterable[str], *, now_ms: int, days: int = DAYS, key: bytes | None = None
) -> Pair:
    """A server's certificate for these names and this machine's own.

    Args:
        names: hosts and IP addresses.
        key: the private key to certify, in PEM; None makes one.

    Raises:
        InvalidConfig: a name that is none, days that the authority does not last, or a key that is not the
            authority's.
    """
    signer, issuer = _key(authority.key, "the authority's key"), read_certificate(authority.certificate)
    if signer.public_key() != issuer.public_key():
        raise InvalidConfig("the authority's key is not that of tls/ca.crt: devices trust only what that one signs")
    own = ec.generate_private_key(ec.SECP256R1()) if key is None else _key(key, "keys/server.key")
    if days < 1 or _time(now_ms) + datetime.timedelta(days=days) > issuer.not_valid_after_utc:
        raise InvalidConfig(
            f"days must be ≥ 1 and end before the authority does, {issuer.not_valid_after_utc:%Y-%m-%d}"
        )
    listed = list(dict.fromkeys((*names, *LOCAL)))
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, listed[0][:64])])
    made = (
        _certificate(subject, issuer.subject, own.public_key(), signer.public_key(), now_ms, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([_name(name) for name in listed]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(signer, hashes.SHA256())
    )
    return Pair(_private(own), made.public_bytes(Encoding.PEM))


def read_certificate(data: bytes) -> x509.Certificate:
    """The first certificate of a chain in PEM.

    Raises:
        MalformedData: there is none.
    """
    try:
        return x509.load_pem_x509_certificate(data)
    except ValueError:
        raise MalformedData("not a certificate in PEM: restore it from a backup") from None


def names_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """The hosts and addresses that a certificate is for."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return (*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress)))


def fits(key: bytes, certificate: x509.Certificate) -> bool:
    """Whether a private key in PEM is that of the certificate."""
    return _key(key, "keys/server.key").public_key() == certificate.public_key()


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePublicKey,
    now_ms: int,
    days: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_time(now_ms) - _HOUR)  # a device's clock may be behind
        .not_valid_after(_time(now_ms) + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        if not _HOST.fullmatch(name):
            raise InvalidConfig(f"{name!r} is no host's name and no IP address, such as films.example.org") from None
        return x509.DNSName(name.lower())


def _key(data: bytes, what: str) -> ec.EllipticCurvePrivateKey:
    try:
        found = load_pem_private_key(data, None)
    except (ValueError, TypeError):
        raise InvalidConfig(f"{what} is no private key in PEM without a password") from None
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise InvalidConfig(f"{what} is not on an elliptic curve")
    return found


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _time(now_ms: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(now_ms // 1000, datetime.UTC)
