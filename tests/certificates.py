"""A certificate authority of one test, and what it signs for 127.0.0.1 and localhost."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Tls:
    """What a server needs and what its clients trust, in PEM."""

    ca: bytes
    private_key: bytes
    chain: bytes


def tls(host: str = "127.0.0.1") -> Tls:
    """A server's certificate for an address and for localhost, by an authority of its own."""
    now = datetime.datetime.now(datetime.UTC)
    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])

    def made(of: ec.EllipticCurvePrivateKey, name: x509.Name) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(issuer)
            .public_key(of.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )

    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    ca = made(authority, issuer).add_extension(x509.BasicConstraints(True, None), True).add_extension(usage, True)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host)), x509.DNSName("localhost")])
    leaf = made(key, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])).add_extension(names, False)
    return Tls(
        ca.sign(authority, hashes.SHA256()).public_bytes(Encoding.PEM),
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        leaf.sign(authority, hashes.SHA256()).public_bytes(Encoding.PEM),
    )
