"""The vectors of each wire version are read for ever, today's code makes the same bytes, and other code agrees.

The checks here use `cryptography`, `hashlib` and `struct` alone, as a client in another language would its own.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import struct
import zipfile
from typing import Any

import numpy as np
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from penchant.common.artifacts import distribution_pb2 as pb
from penchant.common.artifacts import sealing
from penchant.common.artifacts.bundle import App, Bundle
from penchant.common.artifacts.enrolment import check_proof, enrol_message, revoke_message
from penchant.common.artifacts.manifest import Manifest, Offer, Pointer, Seen
from penchant.common.artifacts.sealing import RoundKey, RoundOpener, seal
from penchant.common.artifacts.signing import Certificate, Envelope, PublicKey, SigningKey
from penchant.common.catalogue import Catalogue
from penchant.common.interactions import History, Interactions
from penchant.common.learners.registry import build
from penchant.common.privacy.plan import PrivacyPlan, task_digest
from penchant.common.privacy.sums import Clip
from penchant.common.streams import Streams
from penchant.common.wire import Order
from scripts.wire_vectors import APP, FOLDER, NOW_MS, files, hpke_key

KEPT = {place.name: place.read_bytes() for place in sorted(FOLDER.iterdir())}


def load(name: str) -> Any:
    return json.loads(KEPT[name])


KEYS = load("keys.json")
RELEASE = PublicKey(bytes.fromhex(KEYS["release"]["public"]))
ROOT = PublicKey(bytes.fromhex(KEYS["root"]["public"]))
STATEMENTS = {one["name"]: one for one in (*load("statements.json"), load("sealed.json")["round_key"])}


def arrays(record: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.array(a["values"], np.dtype(a["dtype"])).reshape(a["shape"]) for name, a in record.items()}


# ------------------------------------------------------------------------------------------------ our own code


@pytest.mark.parametrize("name", KEPT)
def test_today_s_code_makes_the_bytes_of_version_1(name: str) -> None:
    assert files()[name] == KEPT[name]


def test_every_vector_is_made_by_the_script() -> None:
    assert files().keys() == KEPT.keys()


def test_statements_of_version_1_are_read() -> None:
    found = {name: Envelope.from_bytes(one["envelope"].encode()) for name, one in STATEMENTS.items()}
    assert App.read(found["app"]) == APP
    assert Certificate.read(found["certificate"], ROOT).public_key == RELEASE
    assert Pointer.read(found["pointer"], RELEASE).manifest == found["manifest"].sha256
    assert Manifest.read(found["manifest"], RELEASE).version == 1
    assert RoundKey.read(found["round key"], RELEASE).round == 1


def test_an_offer_and_a_bundle_of_version_1_are_taken() -> None:
    offer, bundle = Offer.from_bytes(KEPT["offer.json"]), Bundle.from_bytes(KEPT["films.bundle"])
    found, _ = offer.check(
        ROOT, app_id=APP.app_id, population=APP.population, channel=APP.channel, now_ms=NOW_MS, seen=Seen()
    )
    assert (bundle.offer, bundle.manifest) == (offer, found)
    catalogue = Catalogue.from_record(json.loads(load("catalogue.json")["record"]))
    assert bundle.catalogue == catalogue
    assert catalogue.version == load("catalogue.json")["version"] == found.catalogue_version


def test_an_order_and_a_plan_of_version_1_are_read() -> None:
    plan, order = load("plan.json"), Order.from_flat(load("order.json"))
    assert order.to_flat() == load("order.json")
    assert order.plan == PrivacyPlan.from_json(plan["text"])
    assert order.plan.digest == plan["digest"]
    assert order.plan.task == task_digest(order.learner, order.settings) == plan["task"]
    guarantee = order.plan.guarantee()
    assert guarantee is not None
    assert guarantee.epsilon == pytest.approx(plan["guarantee"]["epsilon"], rel=0.01)


def test_a_history_contributes_what_it_did_in_version_1() -> None:
    vector = load("cooccurrence.json")
    catalogue = Bundle.from_bytes(KEPT["films.bundle"]).catalogue
    learner, history = build(vector["learner"], vector["settings"], catalogue), History.of(vector["items"])
    for one in vector["rounds"]:
        state = arrays(one["state"])
        ((name, expected),) = arrays(one["contribution"]).items()
        np.testing.assert_array_equal(learner.contribution(state, history, Streams(0))[name], expected)
        histories = Interactions.one(history, len(catalogue))
        reply = learner.partial_sum(state, histories, Clip(one["clip_norm"]), lambda row: Streams(row))
        np.testing.assert_array_equal(reply[name], arrays(one["reply"])[name])


def test_a_release_of_version_1_scores_as_it_did_and_as_the_equation_says() -> None:
    vector, side = load("scores.json"), Bundle.from_bytes(KEPT["films.bundle"]).release.side
    assert side is not None
    assert side.transitions is not None
    items, f, c = vector["items"], side.vectors.astype(float), side.config
    age = np.arange(len(items))[::-1]
    own, weight, follow = f[items], c.decay**age, c.transition_decay**age
    lhs = c.unseen * f.T @ f + c.ridge * np.eye(f.shape[1]) + (own.T * weight) @ own
    score = f @ np.linalg.solve(lhs, weight @ own) + c.popularity * side.popularity
    score += c.transition * side.transitions.arrive @ (follow @ side.transitions.leave[items])
    np.testing.assert_allclose(score, vector["scores"], atol=1e-4)
    found = side.scores(Interactions.one(History.of(items), len(f)))[0]
    np.testing.assert_allclose(found, vector["scores"], atol=1e-4)


def test_a_contribution_sealed_elsewhere_opens_here(monkeypatch: pytest.MonkeyPatch) -> None:
    vector = load("sealed.json")
    private = X25519PrivateKey.from_private_bytes(bytes.fromhex(vector["private_key"]))

    class Kept:
        generate = staticmethod(lambda: private)

    monkeypatch.setattr(sealing, "X25519PrivateKey", Kept)
    said = json.loads(vector["round_key"]["payload"])
    del said["schema_version"], said["public_key"]
    opener = RoundOpener(SigningKey(bytes.fromhex(KEYS["release"]["seed"])), **said)
    assert opener.statement.to_bytes() == vector["round_key"]["envelope"].encode()
    found, expected = opener.open(bytes.fromhex(vector["sealed"])), arrays(vector["arrays"])
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_proofs_of_version_1_are_taken() -> None:
    v = load("enrolment.json")
    enrol, revoke = (
        enrol_message(v["app_id"], v["population"], v["token"]),
        revoke_message(v["app_id"], v["population"]),
    )
    assert (enrol.hex(), revoke.hex()) == (v["enrol_message"], v["revoke_message"])
    for message, proof in ((enrol, v["enrol_proof"]), (revoke, v["revoke_proof"])):
        check_proof(bytes.fromhex(v["node_key"]), bytes.fromhex(proof), message)


def test_messages_of_version_1_have_their_fields() -> None:
    for one in load("messages.json"):
        message = getattr(pb, one["message"].rpartition(".")[2]).FromString(bytes.fromhex(one["bytes"]))
        for name, value in one["fields"].items():
            found = getattr(message, name)
            assert (found.hex() if isinstance(found, bytes) else list(found) if name == "accept" else found) == value


# ---------------------------------------------------------------------------------------------- and other code


@pytest.mark.parametrize("name", STATEMENTS)
def test_plain_ed25519_over_plain_bytes_verifies_each_statement(name: str) -> None:
    one = STATEMENTS[name]
    envelope = json.loads(one["envelope"])
    kind, payload = envelope["payloadType"].encode(), base64.b64decode(envelope["payload"])
    signed = b"DSSEv1 " + b" ".join([str(len(kind)).encode(), kind, str(len(payload)).encode(), payload])
    assert signed == one["signed_bytes"].encode()
    assert hashlib.sha256(payload).hexdigest() == one["payload_sha256"]
    (signature,) = envelope["signatures"]
    raw = base64.b64decode(signature["sig"])
    assert raw.hex() == one["signature"]
    key = KEYS["root" if name in ("app", "certificate") else "release"]
    assert signature["keyid"] == hashlib.sha256(bytes.fromhex(key["public"])).hexdigest() == key["id"]
    own = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(key["seed"]))
    assert own.sign(signed) == raw  # RFC 8032 draws no random number
    assert own.public_key().public_bytes_raw().hex() == key["public"]
    Ed25519PublicKey.from_public_bytes(bytes.fromhex(key["public"])).verify(raw, signed)
    with pytest.raises(InvalidSignature):
        own.public_key().verify(raw, payload)


def test_the_chain_of_hashes_leads_from_the_pointer_to_the_bundle_s_bytes() -> None:
    said = {name: json.loads(one["payload"]) for name, one in STATEMENTS.items()}
    assert said["pointer"]["manifest"] == STATEMENTS["manifest"]["payload_sha256"]
    with zipfile.ZipFile(io.BytesIO(KEPT["films.bundle"])) as archive:
        for name, of in (("model.safetensors", "model"), ("catalogue.json", "catalogue")):
            data = archive.read(name)
            blob = said["manifest"][of]
            assert (len(data), hashlib.sha256(data).hexdigest()) == (blob["size"], blob["sha256"])
    assert (
        hashlib.sha256(load("catalogue.json")["record"].encode()).hexdigest() == said["manifest"]["catalogue"]["sha256"]
    )
    plan = said["manifest"]["plan"]
    assert hashlib.sha256(plan.encode()).hexdigest() == load("plan.json")["digest"] == said["round key"]["plan"]


def test_the_sealed_contribution_opens_with_the_rfc_s_own_steps() -> None:
    vector = load("sealed.json")
    sealed, info = bytes.fromhex(vector["sealed"]), vector["info"].encode()
    kind, payload = b"penchant/contribution", vector["round_key"]["payload"].encode()
    assert info == b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
    private = X25519PrivateKey.from_private_bytes(bytes.fromhex(vector["private_key"]))
    shared = private.exchange(X25519PublicKey.from_public_bytes(sealed[:32]))
    key, nonce = hpke_key(shared, sealed[:32], private.public_key().public_bytes_raw(), info)
    plain = ChaCha20Poly1305(key).decrypt(nonce, sealed[32:], b"")
    assert plain.hex() == vector["plain"]
    (length,) = struct.unpack_from("<Q", plain)
    header = json.loads(plain[8 : 8 + length])
    start, end = header["counts"]["data_offsets"]
    body = plain[8 + length :]
    assert header["counts"]["dtype"] == "F64"
    assert list(struct.unpack("<6d", body[start:end])) == vector["arrays"]["counts"]["values"]


def test_what_our_code_seals_to_the_same_key_opens_likewise() -> None:
    vector = load("sealed.json")
    statement = Envelope.from_bytes(vector["round_key"]["envelope"].encode())
    sent = seal(arrays(vector["arrays"]), statement, RoundKey.read(statement, RELEASE))
    private = X25519PrivateKey.from_private_bytes(bytes.fromhex(vector["private_key"]))
    shared = private.exchange(X25519PublicKey.from_public_bytes(sent[:32]))
    key, nonce = hpke_key(shared, sent[:32], private.public_key().public_bytes_raw(), vector["info"].encode())
    assert ChaCha20Poly1305(key).decrypt(nonce, sent[32:], b"").hex() == vector["plain"]


def test_a_proof_verifies_over_plainly_packed_bytes() -> None:
    v = load("enrolment.json")
    token = hashlib.sha256(v["token"].encode()).digest()
    parts = [b"penchant/enrol/v1", v["app_id"].encode(), v["population"].encode(), token]
    message = b"".join(struct.pack(">I", len(part)) + part for part in parts)
    assert message.hex() == v["enrol_message"]
    key = serialization.load_der_public_key(bytes.fromhex(v["node_key"]))
    assert isinstance(key, ec.EllipticCurvePublicKey)
    key.verify(bytes.fromhex(v["enrol_proof"]), message, ec.ECDSA(hashes.SHA256()))


def test_a_contribution_is_what_the_rule_says_counted_by_hand() -> None:
    """Items 0 2 2 1 5 0 3 2, head 0 1 2 3: steps 0 2 1 0 3 2 (a run of the same is one; 5 is not in the head)."""
    first, second, third = (arrays(one["contribution"]) for one in load("cooccurrence.json")["rounds"])
    fifth = np.float32(1 / math.sqrt(5))
    assert first["counts"].tolist() == [fifth, fifth, fifth, fifth, 0, fifth]
    # w = 1: each with itself (0,0) (1,1) (2,2) (3,3), and neighbours (0,2) (1,2) (0,1) (0,3) (2,3): nine; (1,3) is not.
    triangle = [(i, j) for i in range(4) for j in range(i, 4)]
    assert second["matrix"].tolist() == [0 if pair == (1, 3) else np.float32(1 / 3) for pair in triangle]
    # w' = 2, φ = ½: gap 1 weighs 1: 0→2 2→1 1→0 0→3 3→2; gap 2 weighs ½ where gap 1 has not: 0→1 2→0 1→3 (0→2 has).
    weights = np.zeros((4, 4))
    for a, b in ((0, 2), (2, 1), (1, 0), (0, 3), (3, 2)):
        weights[a, b] = 1
    for a, b in ((0, 1), (2, 0), (1, 3)):
        weights[a, b] = 0.5
    expected = (weights / np.sqrt((weights**2).sum())).astype(np.float32)
    np.testing.assert_array_equal(third["transitions"].reshape(4, 4), expected)
