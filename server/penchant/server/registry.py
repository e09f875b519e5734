"""Versions of the model, which of them devices get, and what may be thrown away.

    distribution/manifests/SHA256.json             one model each, versions 1, 2, 3, …: a round's, or a new catalogue's
    distribution/manifests/collected/SHA256.json   likewise, of models whose bytes were thrown away
    distribution/channels/CHANNEL.json             what a channel has; server.db's `moves` says what it had before
    distribution/{blobs,certificates}/             distribution.py

Bytes are written before the manifest that names them, a manifest before the channel that points to it, the channel
before its row in `moves`, each synced. Killed in between, all that a channel names is whole, and doing the same again
goes on from there. The channel's file is the truth, and its row is made up for when the folder is opened next.

A model is the released state of one round of one plan over one catalogue: by these three `add` knows it again, and the
manifest says the round as its public figure `round`. Its hash is that of its content, whoever signed it:
after the release key was replaced, a channel offers the same manifest with the new key's signature.

Bytes stay as long as a channel names them, for the newest `models.keep` models, and for GRACE_MS after the last channel
left them, so that a download that has begun can end.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from sqlite3 import Connection
from typing import Any

import numpy as np

from penchant.common.artifacts.bundle import Bundle, catalogue_bytes, read_catalogue
from penchant.common.artifacts.manifest import Blob, Manifest, Offer, Pointer, Seen
from penchant.common.artifacts.release import Release
from penchant.common.artifacts.signing import SKEW_MS, Certificate, Envelope, PublicKey, SigningKey
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig, MalformedArtifact, MalformedData, PenchantError, UntrustedArtifact
from penchant.common.inference.scorer import scorer
from penchant.common.learners import registry as learners
from penchant.common.learners.contract import State
from penchant.common.privacy.plan import PrivacyPlan
from penchant.server import keys
from penchant.server.database import Database
from penchant.server.distribution import MANIFESTS, channel_file, keep_blobs, keep_statements, publish
from penchant.server.folder import Folder, sync

CANDIDATE, STABLE = "candidate", "stable"
ROUND = "round"
FLOOR = "sequence"
"""A switch of server.db: the least number that a pointer may have."""
"""The public figure of a manifest that says after how many rounds of its plan the model was made."""
DAY_MS = 86_400_000
GRACE_MS = DAY_MS
"""How long the bytes of a model stay after the last channel left it."""
POINTS = ("add:begin", "add:blobs", "add:manifest", "move:channel", "move:noted", "collect:set-aside", "collect:done")


@dataclass(frozen=True)
class Model:
    """A version.

    Attributes:
        name: hash of its manifest.
        channels: that have it now.
        collected: its bytes were thrown away.
    """

    name: str
    manifest: Manifest
    channels: tuple[str, ...]
    collected: bool

    @property
    def version(self) -> int:
        return self.manifest.version

    @property
    def round(self) -> int:
        """Rounds of its plan that are in it; 0 before the first."""
        return int(self.manifest.metrics.get(ROUND, 0))

    @property
    def size(self) -> int:
        """Bytes that a device fetches."""
        return self.manifest.model.size + self.manifest.catalogue.size


@dataclass(frozen=True)
class Channel:
    """What a channel has.

    Attributes:
        offer: as devices get it.
        name: the channel's.
        model: hash of the manifest.
    """

    name: str
    offer: Offer
    model: str
    version: int
    sequence: int
    created_ms: int
    expires_ms: int


@dataclass(frozen=True)
class Collected:
    """What garbage collection threw away, or would.

    Attributes:
        versions: whose bytes are gone.
        n_files, n_bytes: of the files that are.
    """

    versions: tuple[int, ...]
    n_files: int
    n_bytes: int


class Registry:
    """
    Args:
        database: whose write lock is held while something moves, so that several processes may.
        key: the release key; None to look only.
        now_ms: UTC milliseconds.
        at: called at each of POINTS, where a test stops the process.

    Raises:
        MalformedArtifact, UntrustedArtifact: the app's bundle cannot be read.
    """

    def __init__(
        self,
        folder: Folder,
        database: Database,
        key: SigningKey | None = None,
        *,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        at: Callable[[str], None] = lambda point: None,
    ) -> None:
        self._folder, self._database, self._key, self._now_ms, self._at = folder, database, key, now_ms, at
        self._app = Bundle.app_of(folder.bundle)
        self._known: dict[str, Manifest] = {}
        self._certified: dict[str, PublicKey] = {}
        self._reconcile()

    # what is there

    def models(self) -> list[Model]:
        """All, the oldest first.

        Raises:
            MalformedArtifact, UntrustedArtifact: a manifest or a channel's offer that is damaged or nobody's.
        """
        channels = self.channels()
        found = [
            Model(name, self._manifest(path), tuple(c.name for c in channels if c.model == name), collected)
            for name, path, collected in self._paths()
        ]
        return sorted(found, key=lambda model: (model.version, model.name))

    def model(self, version: int) -> Model:
        """
        Raises:
            InvalidConfig: no such version.
            MalformedArtifact, UntrustedArtifact: as `models`.
        """
        models = self.models()
        for model in models:
            if model.version == version:
                return model
        raise InvalidConfig(f"no version {version}" + (f"; the newest is {models[-1].version}" if models else ""))

    def channels(self) -> list[Channel]:
        """In the order of their names.

        Raises:
            MalformedArtifact, UntrustedArtifact: a file that is no offer, or one that devices would never take.
        """
        return [self._channel(path) for path in self._channel_files()]

    def bytes_of(self, model: Model) -> tuple[Catalogue, Release]:
        """A model's catalogue and what devices score with, their hashes checked.

        Raises:
            InvalidConfig: its bytes were collected.
            MalformedArtifact: they are damaged.
        """
        if model.collected:
            raise InvalidConfig(f"the bytes of version {model.version} were collected: take a later version")
        catalogue = read_catalogue(model.manifest, self._blob(model.manifest.catalogue))
        return catalogue, Release.from_bytes(self._blob(model.manifest.model), len(catalogue))

    def catalogue(self, version: str) -> Catalogue:
        """A catalogue that a model was made over.

        Raises:
            MalformedData: no model's whose bytes are here.
        """
        for model in reversed(self.models()):
            if model.manifest.catalogue_version == version and self._path(model.manifest.catalogue).exists():
                return read_catalogue(model.manifest, self._blob(model.manifest.catalogue))
        raise MalformedData(f"catalogue {version} is nowhere in {self._root}: restore it from a backup")

    # a new one

    def add(
        self,
        state: State,
        catalogue: Catalogue,
        *,
        round: int,
        plan: PrivacyPlan,
        guarantee: Mapping[str, Any] | None,
        metrics: Mapping[str, float] | None = None,
        parents: Iterable[str] | None = None,
    ) -> Model:
        """Makes a version of a state and points the channel candidate to it; and stable, where that is automatic.

        It is over the newest catalogue, which a state of an earlier one is adopted for. The same round again, over the
        same catalogue as its newest version, is that version.

        Args:
            state: the learner's, over this catalogue; what stays on the server is left out.
            round: rounds of the plan that are in it.
            guarantee: what holds with this release and all before it, as the ledger says.
            metrics: public figures, such as on a public set.
            parents: hashes of the manifests that it came from; None for the newest version's.

        Raises:
            InvalidConfig: a figure that is no number, or a round that was released with another state.
            MalformedArtifact: arrays that devices would refuse, or a learner that they cannot score with.
        """
        figures = {**(metrics or {}), ROUND: round}
        if any(isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v) for v in figures.values()):
            raise InvalidConfig("a model's metrics are finite numbers")
        origin = None if parents is None else tuple(parents)
        found = None
        while found is None:  # once more where the catalogue changed meanwhile
            found = self._added(state, catalogue, plan, guarantee, figures, origin)
        for channel in (CANDIDATE, STABLE) if self._folder.settings.models.promote == "automatic" else (CANDIDATE,):
            self._follow(channel, found)
        return self.model(found.version)

    def _added(
        self,
        state: State,
        before: Catalogue,
        plan: PrivacyPlan,
        guarantee: Mapping[str, Any] | None,
        metrics: Mapping[str, float],
        parents: tuple[str, ...] | None,
    ) -> Model | None:
        """The version; None if the catalogue is another one by the time that its bytes are there."""
        task, path = self._folder.task, self._folder.path / "catalogue.json"
        read = path.read_bytes() if path.is_file() else b""
        catalogue = newest_catalogue(self._folder)
        learner = learners.build(task.learner, task.settings, catalogue)
        if catalogue != before:
            state = learner.adopt(state, before)
        release = Release(learner.released(state), learner.item_side(state))
        if release.side is None:
            scorer(task.learner, task.settings, release.state, len(catalogue))  # as a device will, or it is no release
        which = (plan.to_json(), int(metrics[ROUND]), catalogue, release)
        self._at("add:begin")
        if (found := self._made(*which)) is not None:
            return found
        model, listed = release.to_bytes(), catalogue_bytes(catalogue)
        Release.from_bytes(model, len(catalogue))  # as a device would
        with _written(self._root):
            keep_blobs(self._root, (model, listed))
        self._at("add:blobs")
        with self._moving():  # one version at a time, whichever process makes it
            if path.read_bytes() != read:
                return None
            if self._made(*which) is None:
                newest = self.models()[-1:]
                manifest = Manifest(
                    app_id=self._app.app_id,
                    population=self._app.population,
                    version=newest[0].version + 1 if newest else 1,
                    created_ms=self._now_ms(),
                    model=Blob.of(model),
                    catalogue=Blob.of(listed),
                    catalogue_version=catalogue.version,
                    learner=task.learner,
                    settings=task.settings,
                    plan=plan.to_json(),
                    guarantee=guarantee,
                    metrics=metrics,
                    parents=tuple(one.name for one in newest) if parents is None else parents,
                    software=_software(),
                )
                certificate, serial = self._certificate()
                keep_statements(self._root, manifest.signed(self._signer()), certificate, serial)
        self._at("add:manifest")
        return self._made(*which)

    def _made(self, plan: str, round: int, catalogue: Catalogue, release: Release) -> Model | None:
        """The newest version of this round, if it is over this catalogue."""
        of_round = [model for model in self.models() if (model.manifest.plan, model.round) == (plan, round)]
        if not of_round or of_round[-1].manifest.catalogue_version != catalogue.version:
            return None
        found = of_round[-1]
        if not found.collected and not _same(self.bytes_of(found)[1].state, release.state):
            raise InvalidConfig(f"round {round} was released as version {found.version}, with another state")
        return found

    # channels

    def promote(self, version: int, channel: str = STABLE, *, older_catalogue: bool = False) -> Model:
        """Points a channel to a version that is newer than what it has; nothing changes where it has that one.

        Args:
            older_catalogue: also if items that retired since would be recommended again.

        Raises:
            InvalidConfig: no such version, an older one, or one whose bytes were collected.
            MalformedArtifact: its bytes are damaged.
        """
        model, now = self.model(version), self._now_has(channel)
        if now is not None and now.version > version:
            raise InvalidConfig(f"{channel} has version {now.version}, a later one: roll back to {version} instead")
        if now is None or now.model != model.name:
            self._check(model, older_catalogue)
            self._move(channel, now, model, "promoted")
        return self.model(version)

    def rollback(self, channel: str = STABLE, to: int | None = None, *, older_catalogue: bool = False) -> Model:
        """Points a channel back to an earlier version, by a new pointer that devices take for newer.

        Args:
            to: the version; None for the latest earlier one that the channel had.

        Raises:
            InvalidConfig: nothing to go back to, or as `promote`.
            MalformedArtifact: its bytes are damaged.
        """
        if (now := self._now_has(channel)) is None:
            raise InvalidConfig(f"there is no channel {channel} yet: promote a version to it")
        model = self.model(self._had(channel, now.version) if to is None else to)
        if model.version >= now.version:
            raise InvalidConfig(f"{channel} has version {now.version}: {to} is not before it; promote it instead")
        self._check(model, older_catalogue)
        self._move(channel, now, model, "rolled back")
        return self.model(model.version)

    def _move(self, channel: str, before: Channel | None, model: Model, why: str) -> None:
        """Points to a model that was checked, if the channel still has what it had then: the lock is a short one."""
        with self._moving() as db:
            if self._now_has(channel) != before:
                raise InvalidConfig(f"{channel} was moved meanwhile: look again, and do it if it is still right")
            self._point(db, channel, model.name, why)
        self._at("move:noted")

    def _had(self, channel: str, now: int) -> int:
        """The latest version before this one that the channel had and can have again."""
        gone = {model.version for model in self.models() if model.collected}
        rows = self._database.rows("SELECT version FROM moves WHERE channel = ? ORDER BY number DESC", channel)
        had = [int(row["version"]) for row in rows if row["version"] < now and row["version"] not in gone]
        if not had:
            raise InvalidConfig(f"{channel} had nothing before version {now} that is still here: name a version")
        return had[0]

    def renew(self) -> list[str]:
        """Signs anew what would expire within half of `expires_days`, what came with another certificate than today's,
        what was restored from a backup, and what a clock that was ahead dated: no device takes it yet.

        Returns:
            The channels.

        Raises:
            PenchantError: a channel that cannot be; the others were.
        """
        half = int(self._folder.settings.models.expires_days * DAY_MS / 2)
        renewed, failed = [], None
        for path in self._channel_files():
            try:
                with self._moving() as db:
                    now = self._channel(path)
                    today, dated = self._now_ms(), now.created_ms
                    same = now.offer.certificate == self._certificate()[0] and now.sequence > self._floor()
                    if now.expires_ms - today >= half and same and dated <= today + SKEW_MS:
                        continue
                    self._point(db, now.name, now.model, "renewed")
                renewed.append(now.name)
            except PenchantError as error:
                failed = failed or error
        if failed is not None:
            raise failed
        return renewed

    @contextmanager
    def _moving(self) -> Iterator[Connection]:
        """The database's write lock, which all that moves something holds."""
        with _written(self._root), self._database.transaction() as db:
            yield db

    def _follow(self, channel: str, model: Model) -> None:
        """Points to a version, unless the channel ever had it or has a later one."""
        with self._moving() as db:
            now = self._now_has(channel)
            if now is not None and now.version >= model.version:
                return
            had = db.execute("SELECT 1 FROM moves WHERE channel = ? AND manifest = ?", (channel, model.name))
            if had.fetchone() is None:
                self._point(db, channel, model.name, "made")
        self._at("move:noted")

    def _check(self, model: Model, older_catalogue: bool) -> None:
        """That devices can take it, and that it brings nothing back that retired."""
        catalogue, _ = self.bytes_of(model)
        back = (newest_catalogue(self._folder).retired - catalogue.retired) & set(catalogue.ids)
        if back and not older_catalogue:
            raise InvalidConfig(
                f"version {model.version} would recommend {len(back)} items that retired since: take a later version, "
                "or --older-catalogue"
            )

    def _point(self, db: Connection, channel: str, model: str, why: str) -> None:
        """The new pointer, and its row; both while the database's write lock is held."""
        key, (certificate, _) = self._signer(), self._certificate()
        starts_ms = Certificate.read(certificate, self._app.root).not_before_ms
        now, path = max(self._now_ms(), starts_ms), channel_file(self._root, channel)  # a clock may have fallen back
        noted = db.execute("SELECT max(sequence) FROM moves WHERE channel = ?", (channel,)).fetchone()[0] or 0
        pointer = Pointer(
            app_id=self._app.app_id,
            population=self._app.population,
            channel=channel,
            sequence=1 + max(noted, self._channel(path).sequence if path.exists() else 0, self._floor()),
            manifest=model,
            created_ms=now,
            expires_ms=now + int(self._folder.settings.models.expires_days * DAY_MS),
        )
        manifest = self._envelope(model)
        if key.public.id not in dict(manifest.signatures):  # of the release key before this one
            manifest = key.sign(manifest.payload_type, manifest.payload)
        publish(self._root, Offer(certificate, pointer.signed(key), manifest), (), root=self._app.root, now_ms=now)
        self._at("move:channel")
        _note(db, self._channel(path), now, why)

    def _floor(self) -> int:
        """Below which devices may have seen sequences that this folder, restored from a backup, does not know of."""
        return int(self._database.switch(FLOOR, "0"))

    def _reconcile(self) -> None:
        """Makes up for rows that a kill left out; a file that cannot be read is `verify`'s to name."""
        with self._moving() as db:
            for path in self._channel_files():
                try:
                    found = self._channel(path)
                except PenchantError:
                    continue
                last = _last(db, found.name)
                if last is None or (last["sequence"], last["manifest"]) != (found.sequence, found.model):
                    _note(db, found, self._now_ms(), keys.FOUND)

    # looking after it

    def verify(self) -> list[str]:
        """What is wrong, a line each; nothing where all is well.

        Hashes of all bytes, signatures of all manifests by a key that the root certified, versions without gaps or
        repeats, parents that are there, and channels that a device would take now and that `moves` agrees with.
        """
        problems: list[str] = []
        models: dict[str, Model] = {}
        for name, path, collected in self._paths():
            try:
                models[name] = Model(name, self._manifest(path), (), collected)
            except PenchantError as error:
                problems.append(f"manifest {name[:16]}: {error}")
        versions = sorted(model.version for model in models.values())
        problems += [f"version {v} is there twice" for v, after in pairwise(versions) if v == after]
        if gaps := sorted(set(range(1, max(versions, default=0) + 1)) - set(versions)):
            problems.append(f"no manifest of version {', '.join(map(str, gaps))}")
        for model in sorted(models.values(), key=lambda one: one.version):
            if model.manifest.parents and not set(model.manifest.parents) <= models.keys():
                problems.append(f"version {model.version}: the manifest that it came from is not here")
            if not model.collected:
                problems += [f"version {model.version}: {word}" for word in self._damage(model.manifest)]
        for path in self._blob_files():
            if not path.name.endswith(".part") and Blob.of(path.read_bytes()).sha256 != path.name:
                problems.append(f"blob {path.name[:16]}: other bytes than its name says")
        for path in self._channel_files():
            problems += [f"channel {path.stem}: {word}" for word in self._channel_damage(path, models)]
        return problems

    def _damage(self, manifest: Manifest) -> Iterator[str]:
        for kind, blob in (("model", manifest.model), ("catalogue", manifest.catalogue)):
            if not self._path(blob).is_file():
                yield f"the bytes of its {kind} are gone"
            elif self._path(blob).stat().st_size != blob.size:
                yield f"its {kind} has another size than was signed"

    def _channel_damage(self, path: Path, models: Mapping[str, Model]) -> Iterator[str]:
        try:
            found = self._channel(path)
            self._checked(found.offer, path.stem, self._now_ms())
        except PenchantError as error:
            yield str(error)
            return
        if (model := models.get(found.model)) is None or model.collected:
            yield f"version {found.version} is not among the manifests whose bytes are here"
        last = self._database.one("SELECT * FROM moves WHERE channel = ? ORDER BY number DESC LIMIT 1", path.stem)
        if last is None or (last["sequence"], last["manifest"]) != (found.sequence, found.model):
            yield "server.db has another last move"

    def collect(self, *, dry_run: bool = False) -> Collected:
        """Throws away the bytes that no device may still want, and keeps every manifest.

        Raises:
            MalformedArtifact, UntrustedArtifact: as `models`; nothing was thrown away.
        """
        with self._moving() as db:  # nothing moves meanwhile
            models, old = self.models(), self._now_ms() - GRACE_MS
            kept = [model for model in models if self._wanted(db, model, models, old)]
            dropped = [model for model in models if not model.collected and model not in kept]
            progress = {row["catalogue"] for row in db.execute("SELECT catalogue FROM progress")}
            needed = {
                blob.sha256
                for model in models
                for blob, wanted in (
                    (model.manifest.model, model in kept),
                    (model.manifest.catalogue, model in kept or model.manifest.catalogue_version in progress),
                )
                if wanted
            }
            files = [
                (path, path.stat().st_size)
                for path in self._blob_files()
                if path.name not in needed and path.stat().st_mtime_ns // 1_000_000 < old  # younger: one is being made
            ]
            if not dry_run:
                self._throw(dropped, [path for path, _ in files])
        versions = tuple(model.version for model in dropped)
        return Collected(versions, len(files), sum(size for _, size in files))

    def _wanted(self, db: Connection, model: Model, models: list[Model], old_ms: int) -> bool:
        if model.collected:
            return False
        if model.channels or model in models[-self._folder.settings.models.keep :]:
            return True
        left_ms = [model.manifest.created_ms]
        for row in db.execute("SELECT number, channel FROM moves WHERE manifest = ?", (model.name,)).fetchall():
            after = db.execute("SELECT min(at_ms) FROM moves WHERE channel = ? AND number > ?", (row[1], row[0]))
            left_ms.append(after.fetchone()[0] or 0)
        return max(left_ms) >= old_ms

    def _throw(self, models: list[Model], files: list[Path]) -> None:
        """First says so, then does it: a model whose bytes are gone is never one that a channel could be pointed to."""
        if models:
            (self._root / MANIFESTS[1]).mkdir(exist_ok=True)
            for model in models:
                name = f"{model.name}.json"
                (self._root / MANIFESTS[0] / name).rename(self._root / MANIFESTS[1] / name)
            for part in reversed(MANIFESTS):
                sync(self._root / part)
        self._at("collect:set-aside")
        for path in files:
            path.unlink(missing_ok=True)
        self._at("collect:done")

    def diff(self, a: int, b: int) -> dict[str, Any]:
        """What changed from one version to another, as plain JSON types: only what differs, and the arrays' norms.

        Raises:
            InvalidConfig: no such version, or its bytes were collected.
        """
        one, other = self.model(a), self.model(b)
        (before, old), (after, new) = self.bytes_of(one), self.bytes_of(other)
        records = [{**asdict(m.manifest), "plan": json.loads(m.manifest.plan)} for m in (one, other)]
        out: dict[str, Any] = {"from": a, "to": b}
        for part in ("learner", "settings", "plan", "guarantee", "metrics", "software"):
            if changed := _changed(*(record[part] for record in records)):
                out[part] = changed
        if before != after:
            out["catalogue"] = asdict(changes(before, after))
        out["arrays"] = _norms(old, new)
        return out

    # files

    @property
    def _root(self) -> Path:
        return self._folder.distribution

    def _paths(self) -> Iterator[tuple[str, Path, bool]]:
        """Name, file, and whether its bytes were collected, of every manifest."""
        for part, collected in zip(MANIFESTS, (False, True), strict=True):
            for path in sorted((self._root / part).glob("*.json")):
                yield path.stem, path, collected

    def _channel_files(self) -> list[Path]:
        return sorted((self._root / "channels").glob("*.json"))

    def _blob_files(self) -> list[Path]:
        return sorted(path for path in (self._root / "blobs").glob("*") if path.is_file())

    def _path(self, blob: Blob) -> Path:
        return self._root / "blobs" / blob.sha256

    def _blob(self, blob: Blob) -> bytes:
        try:
            return blob.check(self._path(blob).read_bytes())
        except OSError as error:
            raise MalformedArtifact(f"{self._path(blob)}: {error.strerror}; restore it from a backup") from None

    def _envelope(self, name: str) -> Envelope:
        path = self._root / MANIFESTS[0] / f"{name}.json"
        try:
            return Envelope.from_bytes(path.read_bytes())
        except OSError as error:
            raise MalformedArtifact(f"{path}: {error.strerror}; restore it from a backup") from None

    def _manifest(self, path: Path) -> Manifest:
        """Checked once: a manifest never changes."""
        if (found := self._known.get(path.stem)) is None:
            try:
                envelope = Envelope.from_bytes(path.read_bytes())
            except OSError as error:
                raise MalformedArtifact(f"{path}: {error.strerror}; restore it from a backup") from None
            if not (own := self._signers(envelope)):
                self._certified = self._keys()
                own = self._signers(envelope)
            if not own:
                raise UntrustedArtifact(f"{path}: no certificate of the key that signed it; restore certificates/")
            found = Manifest.read(envelope, own[0])
            if envelope.sha256 != path.stem:
                raise MalformedArtifact(f"{path} is another manifest than its name says; restore it from a backup")
            if (found.app_id, found.population) != (self._app.app_id, self._app.population):
                raise UntrustedArtifact(f"{path} is of another app or population")
            self._known[path.stem] = found
        return found

    def _signers(self, envelope: Envelope) -> list[PublicKey]:
        return [self._certified[name] for name, _ in envelope.signatures if name in self._certified]

    def _keys(self) -> dict[str, PublicKey]:
        """Every release key that the root key ever certified for this app, by its id."""
        found = {}
        for path in (*(self._root / "certificates").glob("*.json"), self._folder.certificate):
            try:
                certificate = Certificate.read(Envelope.from_bytes(path.read_bytes()), self._app.root)
            except (OSError, PenchantError):  # whoever it certified is then nobody's key
                continue
            if certificate.app_id == self._app.app_id:
                found[certificate.public_key.id] = certificate.public_key
        return found

    def _channel(self, path: Path) -> Channel:
        try:
            offer = Offer.from_bytes(path.read_bytes())
        except OSError as error:
            raise MalformedArtifact(f"{path}: {error.strerror}; restore it from a backup") from None
        manifest, seen = self._checked(offer, path.stem, offer.made_ms)
        certificate = Certificate.read(offer.certificate, self._app.root)
        pointer = Pointer.read(offer.pointer, certificate.public_key)
        return Channel(
            path.stem, offer, seen.manifest, manifest.version, pointer.sequence, pointer.created_ms, pointer.expires_ms
        )

    def _checked(self, offer: Offer, channel: str, now_ms: int) -> tuple[Manifest, Seen]:
        app = self._app
        who = {"app_id": app.app_id, "population": app.population, "channel": channel}
        return offer.check(app.root, **who, now_ms=now_ms, seen=Seen())

    def _now_has(self, channel: str) -> Channel | None:
        path = channel_file(self._root, channel)
        return self._channel(path) if path.exists() else None

    def _signer(self) -> SigningKey:
        if self._key is None:
            raise InvalidConfig("nothing is moved without the release key")
        return self._key

    def _certificate(self) -> tuple[Envelope, int]:
        """Today's, of the key that signs here, and its serial."""
        try:
            envelope = Envelope.from_bytes(self._folder.certificate.read_bytes())
        except OSError as error:
            raise InvalidConfig(f"{self._folder.certificate}: {error.strerror}; penchant doctor says more") from None
        certificate = Certificate.read(envelope, self._app.root)
        if certificate.public_key != self._signer().public:
            raise InvalidConfig("certificate.json is of another release key than this one: restart what signs here")
        return envelope, certificate.serial


@contextmanager
def _written(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidConfig(f"{place}: {error.strerror}; make room, and do it again") from None


def release_key(folder: Folder) -> SigningKey:
    """The key that signs releases: the one that certificate.json names.

    Raises:
        PenchantError: as `keys.release_key`.
    """
    return keys.release_key(folder)[0]


def newest_catalogue(folder: Folder) -> Catalogue:
    """What catalogue.json says.

    Raises:
        MalformedData: absent or damaged.
    """
    path = folder.path / "catalogue.json"
    try:
        return Catalogue.from_record(json.loads(path.read_bytes()))
    except (OSError, ValueError, AttributeError, TypeError, InvalidConfig) as error:
        raise MalformedData(f"{path}: {error}; restore it from a backup") from None


@dataclass(frozen=True)
class Changes:
    """What differs from one catalogue to another; ids, in the order of the catalogue.

    Attributes:
        changed: items with another title, topic or other value.
        columns: that are new, such as "number:runtime_s".
        gone: items that are not there; none from an older catalogue to a newer one.
    """

    added: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()
    restored: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()


def changes(before: Catalogue, after: Catalogue) -> Changes:
    """What differs, both looked at as a whole."""
    old, new = columns(before), columns(after)
    both = [item for item in after.ids if item in before.index]
    at = [(before.index[item], after.index[item]) for item in both]
    differs = set()
    for name in old.keys() | new.keys():
        one, other = old.get(name), new.get(name)
        for item, (i, j) in zip(both, at, strict=True):
            if (_NOTHING if one is None else _plain(one[i])) != (_NOTHING if other is None else _plain(other[j])):
                differs.add(item)
    return Changes(
        added=tuple(item for item in after.ids if item not in before.index),
        retired=tuple(item for item in both if item in after.retired - before.retired),
        restored=tuple(item for item in both if item in before.retired - after.retired),
        changed=tuple(item for item in both if item in differs),
        columns=tuple(sorted(new.keys() - old.keys())),
        gone=tuple(item for item in before.ids if item not in after.index),
    )


def columns(catalogue: Catalogue) -> dict[str, Sequence[Any]]:
    """A catalogue's columns under the names that a file has for them; vectors as "vector:NAME"."""
    kinds = {"category": "categories", "number": "numbers", "text": "texts", "vector": "vectors"}
    out: dict[str, Sequence[Any]] = {"title": catalogue.titles, "topics": catalogue.topics}
    for prefix, kind in kinds.items():
        out |= {f"{prefix}:{name}": values for name, values in getattr(catalogue, kind).items()}
    return out


_NOTHING = ""


def _plain(value: Any) -> Any:
    """To compare with: what is unknown, in whichever column, is the same nothing."""
    if isinstance(value, np.ndarray):
        return value.tobytes() if value.any() else _NOTHING
    return _NOTHING if value != value else value


def _last(db: Connection, channel: str) -> Any:
    return db.execute("SELECT * FROM moves WHERE channel = ? ORDER BY number DESC LIMIT 1", (channel,)).fetchone()


def _note(db: Connection, channel: Channel, at_ms: int, why: str) -> None:
    db.execute(
        "INSERT INTO moves (channel, sequence, version, manifest, at_ms, why) VALUES (?, ?, ?, ?, ?, ?)",
        (channel.name, channel.sequence, channel.version, channel.model, at_ms, why),
    )


def _same(one: State, other: State) -> bool:
    """But for the last bits, in which two machines may place a new item differently."""
    return one.keys() == other.keys() and all(
        one[name].shape == other[name].shape and np.allclose(one[name], other[name], rtol=1e-4, atol=1e-6)
        for name in one
    )


def _software() -> dict[str, str]:
    found = {}
    for name in ("penchant", "numpy", "flwr"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _changed(before: Any, after: Any) -> dict[str, list[Any]]:
    """What differs of two records, "a.b": [before, after]; null is what is not there."""
    if not (isinstance(before, Mapping) and isinstance(after, Mapping)):
        return {} if before == after else {"": [before, after]}
    out: dict[str, list[Any]] = {}
    for name in sorted({*before, *after}):
        for inner, pair in _changed(before.get(name), after.get(name)).items():
            out[f"{name}.{inner}" if inner else name] = pair
    return out


def _norms(before: Release, after: Release) -> dict[str, dict[str, Any]]:
    """Of each array its shape, its L2 norm, and that of the difference where shapes agree; [before, after] each."""
    sides = [_arrays(before), _arrays(after)]
    out: dict[str, dict[str, Any]] = {}
    for name in sorted({*sides[0], *sides[1]}):
        pair = [side.get(name) for side in sides]
        told: dict[str, Any] = {
            "shape": [None if one is None else list(one.shape) for one in pair],
            "norm": [None if one is None else float(np.linalg.norm(one.astype(np.float64))) for one in pair],
        }
        if pair[0] is not None and pair[1] is not None and pair[0].shape == pair[1].shape:
            told["moved"] = float(np.linalg.norm(pair[1].astype(np.float64) - pair[0].astype(np.float64)))
        out[name] = told
    return out


def _arrays(release: Release) -> dict[str, Any]:
    found = {f"state/{name}": values for name, values in release.state.items()}
    if release.side is not None:
        found |= {"side/vectors": release.side.vectors, "side/popularity": release.side.popularity}
        if release.side.transitions is not None:
            found |= {f"side/{way}": getattr(release.side.transitions, way) for way in ("leave", "arrive")}
    return found
