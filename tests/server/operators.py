"""A small operator's folder for tests: keys, plan, task, certificate and bundle, without any process."""

from __future__ import annotations

import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from penchant.common import config
from penchant.common.artifacts.signing import SigningKey
from penchant.common.catalogue import Catalogue
from penchant.common.privacy.plan import PrivacyPlan, SumSpec
from penchant.server import keys
from penchant.server.folder import Folder, Settings, Task
from penchant.server.making import make

NOW = 1_700_000_000_000
DAY = 86_400_000
ROOT, RELEASE = SigningKey(b"r" * 32), SigningKey(b"k" * 32)
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
        now_ms: when its statements were made; its TLS certificate is of today, whatever that says.
    """
    plan = plan or a_plan(users)
    settings = config.decode(Settings, tomllib.loads(f'app_id = "films"\npublisher = "films/rounds"\n{toml}'))
    folder = make(
        path,
        settings=settings,
        catalogue=CATALOGUE,
        plan=plan,
        task=Task("cooccurrence", SETTINGS),
        now_ms=now_ms,
        root=ROOT,
        release=RELEASE,
    )
    keys.write_signing_key(path / "offline" / "root.key", ROOT)
    authority = (path / "offline" / "ca.key").read_bytes()
    keys.renew_server(folder, authority, now_ms=time.time_ns() // 1_000_000, days=1)
    return folder


def marker(values: npt.NDArray[Any]) -> bytes:
    """What of an array's bytes would tell that they are somewhere: from its first number that is not 0 to its last."""
    flat = np.ascontiguousarray(values).ravel()
    some = np.flatnonzero(flat)
    return b"" if len(some) < 3 else flat[some[0] : some[-1] + 1].tobytes()[:400]
