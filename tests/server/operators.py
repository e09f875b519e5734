"""A small operator's folder for tests: keys, plan, task, certificate and bundle, without any process."""

from __future__ import annotations

import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from penchant.common.artifacts.bundle import App, Bundle, catalogue_bytes
from penchant.common.artifacts.manifest import Blob, Manifest, Offer, Pointer
from penchant.common.artifacts.release import Release
from penchant.common.artifacts.signing import Certificate, SigningKey
from penchant.common.catalogue import Catalogue
from penchant.common.learners import registry
from penchant.common.privacy.ledger import Ledger
from penchant.common.privacy.plan import PrivacyPlan, SumSpec
from penchant.common.streams import Streams
from penchant.server.database import Database
from penchant.server.distribution import publish
from penchant.server.folder import Folder, write_json, write_secret
from tests.certificates import tls

NOW = 1_700_000_000_000
DAY = 86_400_000
CATALOGUE = Catalogue(
    ids=tuple(f"film:{i}" for i in range(40)),
    titles=tuple(f"Film {i} ({1950 + i})" for i in range(40)),
    topics=tuple((("Drama", "Comedy", "Horror")[i % 3],) for i in range(40)),
    name="films",
)
SETTINGS = {"head": 16, "window": 3, "dims": 3}


def a_plan(users: int) -> PrivacyPlan:
    return PrivacyPlan(
        unit="user",
        n_users=users,
        delta=1e-3,
        sampling="none",
        cohort=users,
        sums=(
            SumSpec(name="counts", rounds=1, clip_norm=1.0, noise_multiplier=0.5),
            SumSpec(name="matrix", rounds=2, clip_norm=1.0, noise_multiplier=0.3),
        ),
        max_participations=3,
    )


def an_operator(
    path: Path, *, users: int = 3, plan: PrivacyPlan | None = None, toml: str = "", now_ms: int = NOW
) -> Folder:
    """
    Args:
        toml: more lines of server.toml, tables included.
    """
    root, release, authority = SigningKey(b"r" * 32), SigningKey(b"k" * 32), tls()
    plan = plan or a_plan(users)
    for name in ("states", "distribution", "ledgers", "flower"):
        (path / name).mkdir(parents=True, exist_ok=True)
    (path / "server.toml").write_text(f'app_id = "films"\npublisher = "films/rounds"\n{toml}')
    (path / "plan.json").write_text(plan.to_json())
    write_json(path / "task.json", {"learner": "cooccurrence", "settings": SETTINGS})
    write_json(path / "catalogue.json", CATALOGUE.to_record())
    for name, data in (
        ("keys/release.key", release.private_bytes().hex().encode() + b"\n"),
        ("keys/server.key", authority.private_key),
        ("keys/superexec.secret", secrets.token_bytes(32)),
        ("keys/admin.token", secrets.token_urlsafe(32).encode()),
        ("keys/subjects.secret", secrets.token_bytes(32)),
        ("offline/root.key", root.private_bytes().hex().encode() + b"\n"),
        ("tls/ca.crt", authority.ca),
        ("tls/server.crt", authority.chain),
    ):
        write_secret(path / name, data)
    certificate = Certificate(
        app_id="films",
        public_key=release.public,
        serial=1,
        not_before_ms=now_ms - DAY,
        not_after_ms=now_ms + 365 * DAY,
    ).signed(root)
    (path / "certificate.json").write_bytes(certificate.to_bytes())
    Database.make(path / "server.db")
    folder = Folder(path)
    address = folder.settings.addresses.public
    app = App(
        app_id="films",
        population=plan.population,
        root=root.public,
        distribution=address,
        fleet=address,
        enrolment=address,
        ca=authority.ca.decode(),
        publisher=folder.settings.publisher,
    )
    Ledger(plan.population, delta=plan.delta, app_id="films", path=folder.ledger, now_ms=lambda: now_ms).close()
    learner = registry.build("cooccurrence", SETTINGS, CATALOGUE)
    state = learner.init(Streams(0))
    model, listed = Release(learner.released(state), learner.item_side(state)).to_bytes(), catalogue_bytes(CATALOGUE)
    manifest = Manifest(
        app_id="films",
        population=plan.population,
        version=1,
        created_ms=now_ms,
        model=Blob.of(model),
        catalogue=Blob.of(listed),
        catalogue_version=CATALOGUE.version,
        learner="cooccurrence",
        settings=SETTINGS,
        plan=plan.to_json(),
        guarantee=asdict(plan.guarantee(0)),  # type: ignore[arg-type]  # unit user has one
    ).signed(release)
    pointer = Pointer(
        app_id="films",
        population=plan.population,
        channel="stable",
        sequence=1,
        manifest=manifest.sha256,
        created_ms=now_ms,
        expires_ms=now_ms + 30 * DAY,
    )
    offer = Offer(certificate, pointer.signed(release), manifest)
    publish(folder.distribution, offer, (model, listed), root=root.public, now_ms=now_ms)
    Bundle.write(folder.bundle, app, root, offer, catalogue=CATALOGUE, model=model)
    return folder


def marker(values: npt.NDArray[Any]) -> bytes:
    """What of an array's bytes would tell that they are somewhere: from its first number that is not 0 to its last."""
    flat = np.ascontiguousarray(values).ravel()
    some = np.flatnonzero(flat)
    return b"" if len(some) < 3 else flat[some[0] : some[-1] + 1].tobytes()[:400]
