"""Releases on a device: taken in whole or not at all, checked each time they are read, the last good one kept.

    releases/HASH/{offer.json, catalogue.json, model.safetensors}     HASH: of the manifest
    releases/HASH/catalogue.compact                                   made here of catalogue.json, to be read sooner
    releases/current                                                  names, the newest first

A release is written beside, synced and renamed, and only then named in `current`, itself by a rename; a device that
stops in between goes on with what it had. Reading checks every signature and hash anew, and falls back from a release
that is damaged, or that cannot be scored with, to the one before it, and at last to the app's bundle. The compact
catalogue alone is signed by nobody: it is read where a key of this device's store shows that it was made here, of the
catalogue.json beside it, and made again where it wasn't.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from penchant.common.artifacts.bundle import App, Bundle, compact_bytes, read_catalogue, read_compact, write_whole
from penchant.common.artifacts.manifest import Manifest, Offer, Seen
from penchant.common.artifacts.release import Release
from penchant.common.catalogue import Catalogue
from penchant.common.errors import MalformedArtifact, StoreFull
from penchant.common.taste import ItemSide

if TYPE_CHECKING:
    from penchant.common.inference.scorer import Scorer

KEPT = 2
"""Releases on a device: the one in use and the one before it."""
POINTS = ("put:before", "put:written", "put:renamed", "put:named")


@dataclass(frozen=True)
class Installed:
    """A release that was checked and can be used.

    Attributes:
        side: what it scores with: the release's own, or its network's.
        network: what orders lists where the release has no side of its own.
        damaged: how many newer ones could not be read.
    """

    manifest: Manifest
    catalogue: Catalogue
    side: ItemSide
    network: Scorer | None
    name: str
    damaged: int = 0

    @classmethod
    def of(cls, manifest: Manifest, catalogue: Catalogue, release: Release, name: str, damaged: int = 0) -> Installed:
        """
        Raises:
            MalformedArtifact: a release that cannot be scored with here.
        """
        if release.side is not None:
            return cls(manifest, catalogue, release.side, None, name, damaged)
        from penchant.common.inference.scorer import scorer  # only some releases need it

        network = scorer(manifest.learner, manifest.settings, release.state, len(catalogue))
        return cls(manifest, catalogue, network.side, network, name, damaged)


class Shelf:
    """
    Args:
        folder: of the releases; made if absent.
        bundle: what to fall back to, read when it is needed.
        key: of this device alone, to know its own compact catalogues by.
        at: called at each of POINTS, where a test stops the process.
    """

    def __init__(
        self,
        folder: Path,
        app: App,
        bundle: Callable[[], Bundle],
        *,
        key: bytes,
        at: Callable[[str], None] = lambda point: None,
    ) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self._folder, self._app, self._bundle, self._key, self._at = folder, app, bundle, key, at

    def current(self) -> Installed:
        """The newest release that is whole.

        Raises:
            MalformedArtifact, UntrustedArtifact: not even the bundle is.
        """
        damaged = 0
        for name in self._names():
            try:
                return self._read(name, damaged)
            except Exception:  # whatever it is, one release must not take the app's older ones with it
                damaged += 1
        bundle = self._bundle()
        return Installed.of(bundle.manifest, bundle.catalogue, bundle.release, bundle.offer.manifest.sha256, damaged)

    def put(self, offer: Offer, manifest: Manifest, catalogue: bytes, model: bytes) -> Installed:
        """Takes a release in, checked once more, and makes it the one in use.

        Args:
            manifest: of the offer, whose signatures the caller has checked, and its age.

        Raises:
            MalformedArtifact: bytes that the manifest does not name, or that cannot be read or scored with here.
            StoreFull: the disk is. What was here stays in use.
        """
        found = read_catalogue(manifest, catalogue)
        Installed.of(manifest, found, Release.from_bytes(manifest.model.check(model), len(found)), "")
        try:
            self._write(offer, catalogue, model)
        except OSError as error:
            raise StoreFull(f"no release was taken in: {error.strerror}; make room and sync again") from None
        return self._read(offer.manifest.sha256, 0)

    def _write(self, offer: Offer, catalogue: bytes, model: bytes) -> None:
        name = offer.manifest.sha256
        self._at("put:before")
        beside = self._folder / f"{name}.part"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(mode=0o700)
        for file, data in zip(_FILES, (offer.to_bytes(), catalogue, model), strict=True):
            _write(beside / file, data)
        _sync(beside)
        self._at("put:written")
        if (place := self._folder / name).exists():  # damaged, or of an earlier time
            shutil.rmtree(place)
        beside.rename(place)
        _sync(self._folder)
        self._at("put:renamed")
        names = [name, *(other for other in self._names() if other != name)][:KEPT]
        _write(self._folder / "current.part", "\n".join(names).encode())
        (self._folder / "current.part").replace(self._folder / "current")
        _sync(self._folder)
        self._at("put:named")
        for other in self._folder.iterdir():
            if other.is_dir() and other.name not in names:
                shutil.rmtree(other, ignore_errors=True)
            elif other.suffix == ".part":  # of a download that ended, or never will
                other.unlink(missing_ok=True)

    def _names(self) -> list[str]:
        try:
            names = (self._folder / "current").read_text(encoding="ascii").split()
        except (OSError, UnicodeDecodeError):
            return []
        return [name for name in names if name.isalnum()]

    def _read(self, name: str, damaged: int) -> Installed:
        place, app = self._folder / name, self._app
        try:
            read = Offer.from_bytes((place / "offer.json").read_bytes())
            manifest, _ = read.check(  # its age was checked when it came
                app.root,
                app_id=app.app_id,
                population=app.population,
                channel=app.channel,
                now_ms=read.made_ms,
                seen=Seen(),
            )
            if read.manifest.sha256 != name:
                raise MalformedArtifact(f"release {name[:16]} is another one")
            catalogue = _catalogue(place, manifest, self._key)
            model = manifest.model.check((place / "model.safetensors").read_bytes())
        except OSError as error:
            raise MalformedArtifact(f"release {name[:16]}: {error.strerror}") from None
        return Installed.of(manifest, catalogue, Release.from_bytes(model, len(catalogue)), name, damaged)


def _catalogue(place: Path, manifest: Manifest, key: bytes) -> Catalogue:
    data, compact = manifest.catalogue.check((place / "catalogue.json").read_bytes()), place / "catalogue.compact"
    with contextlib.suppress(OSError):
        if (found := read_compact(manifest, compact.read_bytes(), key)) is not None:
            return found
    found = read_catalogue(manifest, data)
    with contextlib.suppress(OSError):  # without it the next opening takes as long as this one
        write_whole(compact, compact_bytes(found, manifest.catalogue, key))
    return found


_FILES = ("offer.json", "catalogue.json", "model.safetensors")


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
