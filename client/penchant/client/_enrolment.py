"""A device's word to the operator that it takes part from now on, and that it no longer does.

The key is made here and its private half never leaves; what proves it is in `artifacts/enrolment.py`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from penchant.client._grpc import channel, left_s, told
from penchant.client._transport import read_node_key
from penchant.common.artifacts import enrolment
from penchant.common.artifacts.bundle import WIRE_VERSIONS, App
from penchant.common.errors import InvalidConfig, MalformedArtifact, PrivacyRefused
from penchant.common.privacy.plan import PrivacyPlan

_SERVICE = "penchant.v1.Enrolment"


@dataclass(frozen=True)
class Enrolled:
    """
    Attributes:
        place: in the population's roster, from 0.
        plan: that the device takes part under, as its canonical JSON.
    """

    place: int
    plan: str


def enrol(app: App, token: str, key: bytes, *, deadline_s: float) -> Enrolled:
    """Registers this device's key.

    Args:
        token: from the app's backend or the operator; it is used up.
        key: the private half, as `new_node_key` made it.

    Raises:
        InvalidConfig: the app's bundle names no place to enrol at.
        UntrustedArtifact: the token is not taken: ask for a new one.
        Unreachable: no answer in time.
        MalformedArtifact: an answer that is none.
        PrivacyRefused: a plan of another population.
    """
    from penchant.common.artifacts.distribution_pb2 import EnrolRequest, EnrolResponse

    until = time.monotonic() + deadline_s
    private = read_node_key(key)
    asked = EnrolRequest(
        app_id=app.app_id,
        population=app.population,
        wire_version=min(app.wire[1], WIRE_VERSIONS[1]),
        token=token,
        node_key=private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        proof=enrolment.prove(private, enrolment.enrol_message(app.app_id, app.population, token)),
    )
    with channel(_where(app), app.ca) as line:
        call = line.unary_unary(f"/{_SERVICE}/Enrol", EnrolRequest.SerializeToString, EnrolResponse.FromString)
        found = told(lambda: call(asked, timeout=left_s(until)))
    try:
        plan = PrivacyPlan.from_json(found.plan)
    except (PrivacyRefused, InvalidConfig):
        raise MalformedArtifact("the server's plan cannot be read; update the app") from None
    if plan.population != app.population or not 0 <= found.place < 1 << 32:
        raise PrivacyRefused("the server's plan is for another population than this app's")
    return Enrolled(found.place, found.plan)


def revoke(app: App, key: bytes, *, deadline_s: float) -> None:
    """Takes this device out of the roster.

    Raises:
        PenchantError: as for `enrol`.
    """
    from penchant.common.artifacts.distribution_pb2 import RevokeRequest, RevokeResponse

    until = time.monotonic() + deadline_s
    private = read_node_key(key)
    asked = RevokeRequest(
        app_id=app.app_id,
        population=app.population,
        node_key=private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        proof=enrolment.prove(private, enrolment.revoke_message(app.app_id, app.population)),
    )
    with channel(_where(app), app.ca) as line:
        call = line.unary_unary(f"/{_SERVICE}/Revoke", RevokeRequest.SerializeToString, RevokeResponse.FromString)
        told(lambda: call(asked, timeout=left_s(until)))


def _where(app: App) -> str:
    if not app.enrolment:
        raise InvalidConfig("the app's bundle names no place to enrol at: its devices take part in no rounds")
    return app.enrolment
