"""A run's released model as an app's bundle, so that an app can be built before there is a server.

The keys made here lie on this machine, both of them: good for building an app and for its tests. An operator's root key
is made, and stays, offline.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from penchant.common.artifacts.bundle import App, Bundle, catalogue_bytes
from penchant.common.artifacts.manifest import Blob, Manifest, Offer, Pointer
from penchant.common.artifacts.release import Release
from penchant.common.artifacts.signing import Certificate, SigningKey
from penchant.common.errors import InvalidConfig
from penchant.common.inference.scorer import scorer
from penchant.common.privacy.plan import PrivacyPlan
from penchant.simulations.runs import RunFolder
from penchant.simulations.simulate import learner_of, load_data

DAY_MS = 86_400_000


@dataclass(frozen=True)
class Keys:
    """The offline root key and the release key that it certifies."""

    root: SigningKey
    release: SigningKey

    @classmethod
    def kept(cls, folder: Path) -> Keys:
        """Those of a folder, made where there are none.

        Raises:
            InvalidConfig: a file of theirs that others may read, or that is no key.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return cls(*(_key(folder / f"{name}.key") for name in ("root", "release")))


def make_bundle(
    run: RunFolder,
    row: str,
    out: Path,
    keys: Keys,
    *,
    app_id: str,
    distribution: str = "",
    days: int = 365,
    now_ms: int | None = None,
) -> Bundle:
    """Writes the bundle of one row's model; a bundle of the same app at `out` is followed by the next version.

    Args:
        distribution: where devices look for newer releases, as `App` takes it.
        days: until the certificate and the pointer expire.
        now_ms: UTC milliseconds; the clock's if None.

    Raises:
        InvalidConfig: no such model, or one whose noise was scaled for more people.
        MalformedArtifact: no device can score with it, or what lies at `out` is no bundle.
        UntrustedArtifact: what lies at `out` is under another root key.
    """
    state, found = run.read_model(row)
    if "as_if" in found:
        raise InvalidConfig(f"the noise of {row} was scaled for more people than it has: run it without --as-if")
    catalogue = load_data(run.read_config()).catalogue
    side = learner_of(found, catalogue).item_side(state)
    if side is None:
        scorer(found["learner"], found["settings"], state, len(catalogue))  # as a device will, or it is no bundle
    now = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    plan, before = PrivacyPlan.from_json(found["plan"]), _before(out, app_id, keys)
    model, listed = Release(state, side).to_bytes(), catalogue_bytes(catalogue)
    manifest = Manifest(
        app_id=app_id,
        population=plan.population,
        version=before.manifest.version + 1 if before else 1,
        created_ms=now,
        model=Blob.of(model),
        catalogue=Blob.of(listed),
        catalogue_version=catalogue.version,
        learner=found["learner"],
        settings=found["settings"],
        plan=found["plan"],
        guarantee=found["privacy"],
        parents=(before.offer.manifest.sha256,) if before else (),
        software={"penchant": version("penchant")},
    ).signed(keys.release)
    until = now + days * DAY_MS
    certificate = Certificate(
        app_id=app_id,
        public_key=keys.release.public,
        serial=before.seen.serial if before else 1,
        not_before_ms=now,
        not_after_ms=until,
    )
    pointer = Pointer(
        app_id=app_id,
        population=plan.population,
        channel="stable",
        sequence=before.seen.sequence + 1 if before else 1,
        manifest=manifest.sha256,
        created_ms=now,
        expires_ms=until,
    )
    app = App(app_id=app_id, population=plan.population, root=keys.root.public, distribution=distribution)
    offer = Offer(certificate.signed(keys.root), pointer.signed(keys.release), manifest)
    Bundle.write(out, app, keys.root, offer, catalogue=catalogue, model=model)
    return Bundle.read(out)


def _before(out: Path, app_id: str, keys: Keys) -> Bundle | None:
    if not out.exists():
        return None
    before = Bundle.read(out)
    if before.app.app_id != app_id or before.app.root != keys.root.public:
        raise InvalidConfig(f"{out} is of another app or root key: give another --out, --app-id or --keys")
    return before


def _key(path: Path) -> SigningKey:
    if not path.exists():
        made = SigningKey.generate()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(made.private_bytes().hex() + "\n")
        return made
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise InvalidConfig(f"{path} can be read by others: chmod 600 {path}")
    try:
        return SigningKey(bytes.fromhex(path.read_text(encoding="ascii")))
    except (ValueError, InvalidConfig):
        raise InvalidConfig(f"{path} holds no key: give another --keys folder") from None
