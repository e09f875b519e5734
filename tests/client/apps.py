"""Small apps for the SDK's tests: a catalogue, releases over it, and bundles, all signed as an operator would."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from penchant.common.artifacts.bundle import App, Bundle, catalogue_bytes
from penchant.common.artifacts.manifest import Blob, Manifest, Offer, Pointer
from penchant.common.artifacts.release import Release
from penchant.common.artifacts.signing import Certificate, SigningKey
from penchant.common.catalogue import Catalogue
from penchant.common.privacy.plan import PrivacyPlan, SumSpec
from penchant.common.taste import ItemSide, TasteConfig

NOW = 1_700_000_000_000
DAY = 86_400_000
PLAN = PrivacyPlan(
    unit="user",
    n_users=1000,
    delta=1e-5,
    sampling="none",
    cohort=100,
    sums=(SumSpec(name="counts", rounds=1, clip_norm=1.0, noise_multiplier=1.0),),
    max_participations=1,
)
CATALOGUE = Catalogue(
    ids=tuple(f"film:{i}" for i in range(60)),
    titles=tuple(f"Film {i} ({1950 + i})" for i in range(60)),
    topics=tuple((("Drama", "Comedy", "Horror")[i % 3],) for i in range(60)),
    name="films",
    numbers={"duration_s": tuple(6000.0 if i % 2 else float("nan") for i in range(60))},
)


@dataclass
class Operator:
    """Signs what devices take; its keys are fixed, so that every run gives the same bytes."""

    app_id: str = "films"
    population: str = "default"
    channel: str = "stable"
    distribution: str = ""
    root: SigningKey = field(default_factory=lambda: SigningKey(b"r" * 32))
    release: SigningKey = field(default_factory=lambda: SigningKey(b"k" * 32))
    catalogue: Catalogue = CATALOGUE
    serial: int = 1

    @property
    def app(self) -> App:
        return App(
            app_id=self.app_id,
            population=self.population,
            channel=self.channel,
            root=self.root.public,
            distribution=self.distribution,
        )

    def model(self, seed: int, *, d: int = 8) -> bytes:
        random = np.random.default_rng(seed)
        n = len(self.catalogue)
        vectors = random.standard_normal((n, d)).astype(np.float32) / np.float32(np.sqrt(d))
        popularity = random.random(n).astype(np.float32)
        side = ItemSide(vectors, popularity, TasteConfig(popularity=0.1))
        return Release({"counts": popularity.astype(np.float64)}, side).to_bytes()

    def offer(self, version: int, model: bytes, *, sequence: int | None = None, **changes: Any) -> Offer:
        """What a channel has: the version's manifest, and a pointer of the same number unless another is given."""
        manifest = Manifest(
            app_id=self.app_id,
            population=self.population,
            version=version,
            created_ms=NOW,
            model=Blob.of(model),
            catalogue=Blob.of(catalogue_bytes(self.catalogue)),
            catalogue_version=self.catalogue.version,
            learner="cooccurrence",
            settings={},
            plan=PLAN.to_json(),
            guarantee=asdict(PLAN.guarantee()),  # type: ignore[arg-type]  # unit user has one
        )
        signed = replace(manifest, **changes).signed(self.release)
        certificate = Certificate(
            app_id=self.app_id,
            public_key=self.release.public,
            serial=self.serial,
            not_before_ms=NOW - DAY,
            not_after_ms=NOW + 365 * DAY,
        )
        pointer = Pointer(
            app_id=self.app_id,
            population=self.population,
            channel=self.channel,
            sequence=sequence or version,
            manifest=signed.sha256,
            created_ms=NOW,
            expires_ms=NOW + 30 * DAY,
        )
        return Offer(certificate.signed(self.root), pointer.signed(self.release), signed)

    def bundle(
        self, path: Path, *, version: int = 1, seed: int = 0, d: int = 8, model: bytes | None = None, **changes: Any
    ) -> Path:
        model = self.model(seed, d=d) if model is None else model
        offer = self.offer(version, model, **changes)
        Bundle.write(path, self.app, self.root, offer, catalogue=self.catalogue, model=model)
        return path

    def publish(
        self, folder: Path, version: int, *, seed: int = 0, model: bytes | None = None, **changes: Any
    ) -> Offer:
        """A folder that devices can be pointed to, with this version as what its channel has."""
        model = self.model(seed) if model is None else model
        offer = self.offer(version, model, **changes)
        for data in (model, catalogue_bytes(self.catalogue)):
            (folder / "blobs").mkdir(parents=True, exist_ok=True)
            (folder / "blobs" / Blob.of(data).sha256).write_bytes(data)
        (folder / "channels").mkdir(exist_ok=True)
        (folder / "channels" / f"{self.channel}.json").write_bytes(offer.to_bytes())
        return offer
