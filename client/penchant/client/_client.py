"""The SDK's one object: a person's store, the release in use, what follows from both, and when to talk to a server.

    observe ──► store (encrypted) ──► profile over the release's item vectors ──► recommend, interests, explain
    sync    ──► a newer release, checked and swapped ──► maybe a round: one clipped contribution, sealed

Nothing but `sync` and the background of `participate` opens a connection. Calls may come from several threads: each
holds one lock while it reads or changes what is here, never while it waits for a server.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from penchant.client._types import (
    Feedback,
    Forgotten,
    Interests,
    Left,
    Privacy,
    Recommendation,
    Strengths,
    SyncResult,
    Trust,
)
from penchant.common.errors import (
    Busy,
    InvalidConfig,
    MalformedArtifact,
    MissingExtra,
    PenchantError,
    PrivacyRefused,
    StoreDamaged,
    StoreFull,
)

if TYPE_CHECKING:  # each is loaded by the call that needs it, so that importing the SDK costs an app next to nothing
    import numpy as np

    from penchant.client._conditions import Conditions
    from penchant.client._conditions import Policy as RoundPolicy
    from penchant.client._keys import KeySource
    from penchant.client._membership import Membership
    from penchant.client._person import Person
    from penchant.client._releases import Shelf
    from penchant.client._retention import Retention
    from penchant.client._salvage import Salvaged
    from penchant.client._store import Store
    from penchant.client._training import Training
    from penchant.common.artifacts.bundle import App
    from penchant.common.artifacts.manifest import Blob, Manifest, Offer, Seen
    from penchant.common.catalogue import Catalogue
    from penchant.common.interactions import Interactions
    from penchant.common.interests import InterestConfig, Policy
    from penchant.common.interests.explanations import Explanation
    from penchant.common.learners.contract import Learner
    from penchant.common.privacy.plan import Guarantee

_SAVED_EVERY = 256
"""Events after which the profile is kept again: what a stop costs is reading so many once more."""
_KINDS = {"like": "like", "dislike": "hide"}


class Client:
    """One person's interests in an app's own process. Make one with `open`; close it, or use it as a context."""

    def __init__(
        self,
        folder: Path,
        app: App,
        store: Store,
        shelf: Shelf,
        *,
        strengths: Strengths,
        interests: InterestConfig | None,
        rounds: Mapping[str, Any],
        timeout_s: float,
        now_ms: Callable[[], int],
    ) -> None:
        self._folder, self._app, self._store, self._shelf = folder, app, store, shelf
        self._strengths, self._config, self._rounds = strengths, interests, rounds
        self._timeout_s, self._now_ms = timeout_s, now_ms
        self._lock = threading.RLock()
        self._closed = False
        self._unsaved = 0
        self._member: Membership | None = None
        self._no = False  # the person said no in this process, whether or not it could be written down
        self._installed = shelf.current()
        self._person = self._made()

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        bundle: str | Path | None = None,
        trust: Trust | None = None,
        consent: str = "",
        key: KeySource | None = None,
        strengths: Strengths | None = None,
        interests: InterestConfig | None = None,
        retention: Retention | None = None,
        policy: RoundPolicy | None = None,
        conditions: Conditions | None = None,
        training: Training | None = None,
        timeout_s: float = 5.0,
        now_ms: Callable[[], int] | None = None,
    ) -> Self:
        """Opens a person's state, or begins it.

        Args:
            folder: made if absent, readable by its owner alone. One process at a time.
            bundle: what the app ships with; needed the first time, and after an update of the app.
            trust: what the person agreed to before they were ever asked here, such as when they installed the app. Once
                they said anything, only `agree` changes it: a start of the app undoes no withdrawal.
            consent: version of the text that the person agreed to.
            key: where the store's key lies; the system's keyring where there is one, else a file that only its owner
                may read.
            strengths: how strong a sign of interest each event is.
            interests: settings of the profile.
            retention: how long events are kept, and how many.
            policy: when this device may take part in rounds and what ε it may spend, besides what the person agreed to.
            conditions: what the app says of the moment: whether the device is idle, on power, on a free network. What
                is left out counts as a no.
            training: how much time, memory and threads the training of a round may take.
            timeout_s: how long a call waits for another thread's.
            now_ms: the clock, UTC milliseconds.

        Raises:
            InvalidConfig: no bundle where one is needed, or one of another app than the folder's.
            MalformedArtifact, UntrustedArtifact: the bundle cannot be read or is not what was signed.
            StoreLocked: another process has the folder.
            WrongKey, StoreDamaged: the store does not open; see each. `salvage` keeps what a damaged one still has.
        """
        from penchant.client._releases import Shelf
        from penchant.client._store import Store
        from penchant.common.artifacts.bundle import Bundle

        place = Path(folder)
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidConfig(f"{place}: {error.strerror}; give a folder that can be written") from None
        clock = now_ms or _now_ms
        store = Store.open(place, key=key, retention=retention, now_ms=clock, instead=_instead(clock()))
        try:
            try:
                said = store.get("consent")
            except StoreDamaged:  # it may have been a no, which no start of the app undoes
                store.put("consent", said := _consent("nobody", "", clock()))
            app, shipped = _app(place, None if bundle is None else Path(bundle))
            shelf = Shelf(
                place / "releases", app, lambda: Bundle.read(place / _BUNDLE), key=store.key_for("compact catalogue")
            )
            made = cls(
                place,
                app,
                store,
                shelf,
                strengths=strengths or Strengths(),
                interests=interests,
                rounds={"policy": policy, "conditions": conditions, "training": training},
                timeout_s=timeout_s,
                now_ms=clock,
            )
            if shipped is not None:
                made._take_shipped(shipped)
            if trust is not None and said is None:
                made.agree(trust, consent=consent)
        except OSError as error:
            store.close()
            raise StoreFull(f"{place}: {error.strerror}; make room and open it again") from None
        except BaseException:
            store.close()
            raise
        return made

    @classmethod
    def salvage(cls, folder: str | Path, *, key: KeySource | None = None) -> Salvaged:
        """Saves what can still be read of a store that `open` calls damaged; `open` then takes what was saved.

        Ask the person first: what is named in `lost` is gone from the app, and the damaged file stays beside the store
        until `forget`. Where the consent is lost, or may be an older one, nobody has agreed to anything, until the
        person does again. What was spent in rounds is not in the store, and stays spent.

        Args:
            folder: that no `Client` has open.
            key: as for `open`.

        Raises:
            StoreDamaged: nothing is left to read, or to read it with.
            StoreLocked, WrongKey, StoreNewer, StoreFull: as for `open`; nothing was lost by it.
        """
        from penchant.client._store import Store

        return Store.salvage(Path(folder), key=key, instead=_instead(_now_ms()))

    # what the person does

    def observe(
        self,
        item: str,
        kind: str = "view",
        *,
        dwell_s: float | None = None,
        rating: float | None = None,
        strength: float | None = None,
        context: Mapping[str, str] | None = None,
        at_ms: int | None = None,
    ) -> None:
        """Takes in one thing that the person did; the next list knows of it. It stays here.

        Args:
            item: identifier; one that the catalogue does not have yet counts once it does.
            kind: what was done, such as "view", "watch", "like" or "buy".
            dwell_s: seconds spent with it.
            rating: on the app's scale.
            strength: in [0, 1], where the app knows it better than rating, dwell and kind tell.
            context: categories of the moment, such as {"device": "phone"}.
            at_ms: UTC milliseconds; now if None.

        Raises:
            InvalidConfig: a kind without a strength, or numbers out of range; nothing was kept.
            StoreFull: the disk is; nothing was kept.
        """
        from penchant.client._store import Event

        now = self._now_ms() if at_ms is None else at_ms
        event = Event(
            item=item,
            kind=kind,
            at_ms=now,
            strength=strength,
            dwell_s=dwell_s,
            rating=rating,
            context=dict(context or {}),
        )
        with self._held():
            self._person.strength(event)  # refused before it is kept
            self._store.append(event)
            self._person.take(event)
            self._unsaved += 1
            if self._unsaved >= _SAVED_EVERY:
                self._save()

    def feedback(self, item: str, kind: Feedback, *, topic: str | None = None) -> str:
        """What the person says of a recommended item.

        Args:
            kind: "like" and "dislike" are events; "not_this_item" hides the item, and "not_this_topic" all items of one
                of its topics, until `allow`.
            topic: which; None takes the one that the item's explanation names.

        Returns:
            What was refused: an item or a topic; "" for an event.

        Raises:
            InvalidConfig: an unknown kind, an item that is not in the catalogue, or a topic that is not clear.
        """
        if kind in _KINDS:
            self.observe(item, _KINDS[kind])
            return ""
        with self._held():
            self._person.place(item)
            if kind == "not_this_item":
                refused, chosen = self._person.hidden, item
            elif kind == "not_this_topic":
                chosen = self._person.topic_of(item) if topic is None else self._person.known_topic(topic)
                refused = self._person.refused
            else:
                from penchant.common.config import did_you_mean

                known = (*_KINDS, "not_this_item", "not_this_topic")
                raise InvalidConfig(f"no feedback {kind!r}{did_you_mean(kind, known)}")
            refused.add(chosen)
            self._said()
        return chosen

    def allow(self, refused: str) -> None:
        """Takes back a "not this item" or "not this topic"; nothing happens where there was none."""
        with self._held():
            self._person.hidden.discard(refused)
            self._person.refused.discard(refused)
            self._said()

    # what the person gets

    def recommend(
        self,
        n: int = 10,
        *,
        context: Mapping[str, str] | None = None,
        policy: Policy | None = None,
        random: np.random.Generator | None = None,
    ) -> list[Recommendation]:
        """The next n items, best first, from what is here; with no history at all, what is liked by everybody.

        Args:
            context: categories of the moment.
            policy: how a list is chosen (`common.interests.exploration`); the best by score if None.
            random: what a policy draws from.
        """
        with self._held():
            return self._person.recommend(n, context, policy, random)

    def interests(self, n: int = 10) -> Interests:
        """The n topics with the largest shares of the person's interest."""
        with self._held():
            return self._person.interests(n)

    def explain(self, item: str, *, context: Mapping[str, str] | None = None) -> Explanation:
        """Why an item is where it is; `.sentence("en")` says it in words.

        Raises:
            InvalidConfig: no such item in the catalogue.
        """
        with self._held():
            return self._person.explain(item, context)

    # what leaves, and what does not

    def agree(self, trust: Trust, *, consent: str = "") -> None:
        """What the person agrees to from now on; "nobody" withdraws. Kept with the time and the text's version.

        Raises:
            StoreFull: it could not be written down. A withdrawal holds until the app ends: call again before that.
            Busy: likewise.
        """
        if trust not in _UNITS:
            from penchant.common.config import did_you_mean

            raise InvalidConfig(f"no trust {trust!r}{did_you_mean(trust, _UNITS)}")
        if trust == "nobody":  # at once, whatever is at work here or on the disk
            self._no = True
            if (member := self._member) is not None:
                member.withdraw()
        with self._held():
            kept = self._record("consent", {})
            if (kept.get("trust"), kept.get("text")) == (trust, consent or kept.get("text")):
                self._no = trust == "nobody"
                return
            self._store.put("consent", _consent(trust, consent, self._now_ms()))
            self._no = trust == "nobody"
            if self._member is not None:
                self._member.agreed()

    @property
    def trust(self) -> Trust:
        with self._held():
            found: Trust = self._record("consent", {}).get("trust", "nobody")
            return found

    def sync(self, deadline_s: float = 30.0) -> SyncResult:
        """Looks for a newer release, takes it in, and takes part in a round if the person, the device and the budget
        allow it. It never raises for a server that is away or wrong: the result says why.

        Args:
            deadline_s: for all of it.
        """
        until = time.monotonic() + deadline_s
        release: Literal["updated", "up_to_date", "no_server", "failed"]
        try:
            release, why = self._update(until), ""
        except PenchantError as error:
            release, why = "failed", str(error)
        except OSError as error:
            release, why = "failed", f"no release was taken in: {error.strerror}; make room and sync again"
        with self._held():
            version = self._installed.manifest.version
        number, reason, detail = self._take_part(until)
        return SyncResult(release=release, why=why or detail, version=version, round=number, reason=reason)

    def enrol(self, token: str, deadline_s: float = 30.0) -> None:
        """Makes this device one that rounds may ask. It takes part in none until the person agrees and policy allows.

        Args:
            token: from the app's backend or the operator.

        Raises:
            InvalidConfig: the app has no rounds.
            UntrustedArtifact: the token is not taken; ask for a new one.
            PrivacyRefused: the server's plan is not the signed one that `privacy` shows.
            Unreachable: no answer in time.
        """
        from penchant.client import _enrolment
        from penchant.common.privacy.plan import PrivacyPlan

        with self._held():
            if not self._app.enrolment:
                raise InvalidConfig("the app's bundle names no place to enrol at: its devices take part in no rounds")
            key, plan = self._membership().key(), self._installed.manifest.plan
        found = _enrolment.enrol(self._app, token, key, deadline_s=deadline_s)
        if PrivacyPlan.from_json(found.plan).digest != PrivacyPlan.from_json(plan).digest:
            raise PrivacyRefused("the server's plan is not the one that was signed with the release: sync, then enrol")
        with self._held():
            self._membership().joined(found.place, found.plan)

    def start(self) -> bool:
        """Takes part in the background, in every round it may, until `stop`; whether it began (not before `enrol`)."""
        with self._held():
            member = self._membership()
            member.ready()
        return member.start()

    def stop(self) -> None:
        """Ends the background; within a second nothing leaves any more."""
        if (member := self._member) is not None:
            member.stop()

    def privacy(self) -> Privacy:
        """What left this device, when, who could see it, under which guarantee, and what budget is left."""
        from penchant.client._schema import DAMAGED
        from penchant.common.privacy.plan import PrivacyPlan

        with self._held():
            consent, manifest = self._record("consent", {}), self._installed.manifest
            left = tuple(_left(one) for one in self._record("left", []))
            member = self._membership() if self._app.fleet else None
            participations, spent = (0, "") if member is None else member.spent()
            plan = None if member is None else member.plan
            unlisted = 0 if member is None else max(0, len(member.rounds()) - len(left))
            before = min(unlisted, _before(self._folder, unlisted))
            whole = self._store.get(_RECOUNTED) is None and not (self._folder / DAMAGED).exists()
        trust: Trust = consent.get("trust", "nobody")
        return Privacy(
            trust=trust,
            consented_ms=consent.get("at_ms"),
            consent=consent.get("text", ""),
            can_leave=bool(self._app.fleet),
            left=left,
            seen_by=_seen_by(left, before, unlisted - before, whole=whole),
            release=_guarantee(manifest),
            spent=spent,
            participations=participations,
            cap=0 if plan is None else plan.max_participations,
            trusted=_TRUSTED if PrivacyPlan.from_json(manifest.plan).unit == "user" else (),
        )

    def export(self) -> dict[str, Any]:
        """All that is kept of the person, in JSON types."""
        with self._held():
            return {
                "app_id": self._app.app_id,
                "population": self._app.population,
                "release": self._installed.manifest.version,
                "consent": self._record("consent", {}),
                "refused_topics": sorted(self._person.refused),
                "refused_items": sorted(self._person.hidden),
                "left": self._record("left", []),
                "events": [event.fields() for event in self._store.events()],
            }

    def forget(self, *, everything: bool = False) -> Forgotten:
        """Destroys the key of all that is kept, then the files. Nothing brings it back, and this client is closed.

        Args:
            everything: the spent budget as well, so that nothing on this device tells that it ever took part. The
                server still knows how often it did, and is asked to take it out.
        """
        kept: dict[str, Any] = {"app_id": self._app.app_id, "population": self._app.population, "participations": 0}
        revoked: bool | None = None
        with self._held():
            with contextlib.suppress(PenchantError):  # forgetting depends on no bookkeeping
                if self._app.fleet:
                    member = self._membership()
                    member.stop()
                    rounds = member.rounds()
                    kept |= {"participations": len(rounds), "last_round": max(rounds, default=0)}
                    revoked = member.revoke(_REVOKE_S) if everything else None
            if self._member is not None:
                self._member.close()
            undone = self._store.forget(keep=None if everything else kept)
            self._closed = True
            shutil.rmtree(self._folder / "releases", ignore_errors=True)
            (self._folder / _BUNDLE).unlink(missing_ok=True)
            if everything:
                for path in (*self._folder.glob(f"{_LEDGER}*"), self._folder / _PLANS):
                    path.unlink(missing_ok=True)
        lost = _LOST + ("" if not kept["participations"] else _LOST_BUDGET if everything else _LOST_PLACE)
        return Forgotten(
            key_destroyed=not undone, kept={} if everything else kept, undone=undone, lost=lost, revoked=revoked
        )

    def close(self) -> None:
        """Keeps the profile and lets go of the folder. A second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._member is not None:
                self._member.close()
            try:
                self._save()
            finally:
                self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        return self._closed

    # rounds

    def _take_part(self, until: float) -> tuple[int | None, str, str]:
        """The round that this device took part in; or None, a code of why, and perhaps a sentence."""
        if not self._app.fleet:
            return None, "no_fleet", ""
        try:
            with self._held():
                if self._no or self.trust == "nobody":
                    return None, "no_consent", ""
                member = self._membership()
                member.ready()
            outcome = member.once(max(0.0, until - time.monotonic()))
        except PenchantError as error:
            return None, "missing_extra" if isinstance(error, MissingExtra) else "failed", str(error)
        if outcome is None:
            return None, "not_enrolled", ""
        if outcome.took_part and outcome.report is not None:
            return outcome.report.round, "", ""
        return None, "nothing_to_do" if outcome.refusal is None else str(outcome.refusal), outcome.detail

    def _membership(self) -> Membership:
        if self._member is None:
            from penchant.client import _conditions, _membership, _training
            from penchant.common.learners import registry

            def learners(name: str, settings: Mapping[str, Any]) -> Learner:
                return registry.build(name, settings, self._installed.catalogue)

            self._member = _membership.Membership(
                self._folder,
                self._app,
                self._store,
                history=self._history,
                learners=learners,
                trainer=_training.Trainer(
                    lambda: self._installed.catalogue, self._rounds["training"] or _training.Training()
                ),
                trust=lambda: "nobody" if self._no else self.trust,
                serial=lambda: self._seen().serial,
                released=self._released,
                policy=self._rounds["policy"] or _conditions.Policy(),
                conditions=self._rounds["conditions"] or _conditions.Conditions(),
                now_ms=self._now_ms,
            )
        return self._member

    def _released(self, plan: str) -> int | None:
        """Rounds of a plan that are in the release in use; None where its manifest does not say."""
        manifest = self._installed.manifest
        said: object = manifest.metrics.get("round")  # whatever JSON the operator put there
        if manifest.plan != plan or isinstance(said, bool) or not isinstance(said, int | float):
            return None
        return int(said) if 0 <= said < 1 << 53 and said == int(said) else None  # NaN goes at the first

    def _history(self) -> Interactions:
        """The person's interactions, as a population of one."""
        from penchant.client import _person
        from penchant.common.interactions import Interactions

        with self._held():
            found = _person.history(self._person, self._store.events())
            return Interactions.one(found, len(self._person.catalogue))

    # the release in use

    @property
    def catalogue(self) -> Catalogue:
        """What can be recommended, as of the release in use."""
        with self._held():
            return self._installed.catalogue

    def _update(self, until: float) -> Literal["updated", "up_to_date", "no_server"]:
        """Looks for a newer release and takes it in.

        Raises:
            PenchantError, OSError: it could not; what was here stays in use.
        """
        app = self._app
        if not app.distribution:
            return "no_server"
        from penchant.client import _distribution

        with self._held():
            seen, have = self._seen(), self._installed.name
        offer = _distribution.fetch_offer(app, have=have, deadline_s=until - time.monotonic())
        manifest, seen = offer.check(
            app.root,
            app_id=app.app_id,
            population=app.population,
            channel=app.channel,
            now_ms=self._now_ms(),
            seen=seen,
        )
        if offer.manifest.sha256 == have:
            with self._held():
                if seen.sequence >= self._seen().sequence or seen.serial > self._seen().serial:
                    self._store.put("seen", json.dumps(asdict(seen)).encode())
            return "up_to_date"

        def fetched(kind: Literal["catalogue", "model"], blob: Blob) -> bytes:
            part = self._folder / "releases" / f"{blob.sha256}.part"
            return _distribution.fetch_blob(app, blob, kind, part, deadline_s=until - time.monotonic())

        catalogue, model = fetched("catalogue", manifest.catalogue), fetched("model", manifest.model)
        with self._held():
            _, seen = offer.check(  # another call may have been faster
                app.root,
                app_id=app.app_id,
                population=app.population,
                channel=app.channel,
                now_ms=self._now_ms(),
                seen=self._seen(),
            )
            self._swap(offer, manifest, catalogue, model, seen)
        return "updated"

    def _take_shipped(self, shipped: Path) -> None:
        """The release that a new version of the app ships with, where it is newer than what is here."""
        from penchant.common.artifacts.bundle import Bundle, catalogue_bytes

        bundle, seen = Bundle.read(shipped), self._seen()
        if (bundle.seen.serial, bundle.seen.sequence) <= (seen.serial, seen.sequence):
            return
        seen = replace(bundle.seen, at_ms=max(seen.at_ms, bundle.seen.at_ms))
        self._swap(bundle.offer, bundle.manifest, catalogue_bytes(bundle.catalogue), bundle.model, seen)

    def _swap(self, offer: Offer, manifest: Manifest, catalogue: bytes, model: bytes, seen: Seen) -> None:
        """Goes over to a release; the lists are its own from the next call on.

        What was seen is written first: stopped in between, a device fetches the same once more, and nothing older.
        """
        self._store.put("seen", json.dumps(asdict(seen)).encode())
        self._installed = self._shelf.put(offer, manifest, catalogue, model)
        self._person = self._made()
        self._save()

    def _seen(self) -> Seen:
        from penchant.common.artifacts.manifest import Seen

        return Seen(**self._record("seen", {}))

    # the person

    def _made(self) -> Person:
        """The profile as it was kept, and all that came after it; from the first event on where none fits."""
        from penchant.client import _person

        said = self._record("preferences", {})
        person = _person.Person(
            self._installed,
            self._strengths,
            self._config,
            refused=said.get("topics", ()),
            hidden=said.get("items", ()),
        )
        self._dropped = self._store.last_id - self._store.n_events
        kept, now = None, (self._store.n_events, self._store.last_id)
        with contextlib.suppress(StoreDamaged):  # it follows from the events
            kept = self._store.get("profile")
        after = 0 if kept is None else _person.restored(person, kept, self._installed.name, now)
        for event in self._store.events(after=after):
            person.take(event)
        return person

    def _save(self) -> None:
        from penchant.client import _person

        if self._store.last_id - self._store.n_events != self._dropped:  # what was deleted is in no profile
            self._store.delete("profile")
            self._person = self._made()
        now = self._store.n_events, self._store.last_id
        self._store.put("profile", _person.kept(self._person, self._installed.name, now))
        self._unsaved = 0

    def _said(self) -> None:
        self._person.say()
        record = {"topics": sorted(self._person.refused), "items": sorted(self._person.hidden)}
        self._store.put("preferences", json.dumps(record).encode())

    def _record(self, name: str, default: Any) -> Any:
        data = self._store.get(name)
        return default if data is None else json.loads(data)

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=self._timeout_s):
            raise Busy(f"another thread held this client for {self._timeout_s:g} s; try again")
        try:
            if self._closed:
                raise InvalidConfig("this client is closed: open the folder again")
            yield
        finally:
            self._lock.release()


_BUNDLE = "app.bundle"
_UNITS = {"server": ["user", "interaction"], "own device": ["interaction"], "nobody": list[str]()}
"""What kinds of plan a person's trust agrees to: unit user is the server's to keep."""
_TRUSTED = (
    *("that the server adds its noise", "how it draws a cohort", "how many others are in a sum"),
    "that it charges each repeated try at a round",
)
_RECOUNTED = "recounted"
"""A record that says that this store's state was lost once."""
_LEDGER, _PLANS, _REVOKE_S = "ledger.sqlite", "plans.json", 5.0
_LOST = "every event, preference and profile on this device"
_LOST_PLACE = ", and its place in rounds: it must enrol anew, and the budget that was spent stays spent"
_LOST_BUDGET = ", its place in rounds, and the knowledge of which budget was spent: the server alone still counts it"


def _consent(trust: Trust, text: str, at_ms: int) -> bytes:
    return json.dumps({"trust": trust, "units": _UNITS[trust], "text": text, "at_ms": at_ms}).encode()


def _instead(at_ms: int) -> dict[str, bytes]:
    """What is put where the store cannot say which records are the newest: the consent may have been a no since, and
    reports of what left may be gone.
    """
    return {"consent": _consent("nobody", "", at_ms), _RECOUNTED: b""}


def _app(folder: Path, bundle: Path | None) -> tuple[App, Path | None]:
    """The app of a folder, and where the bundle that was given lies in it."""
    from penchant.common.artifacts.bundle import Bundle, write_whole

    kept = folder / _BUNDLE
    if bundle is None and not kept.exists():
        raise InvalidConfig("give bundle=, the app's .bundle file, the first time that a folder is opened")
    before = None
    if kept.exists():
        try:
            before = Bundle.app_of(kept)
        except MalformedArtifact:
            if bundle is None:
                raise
    if bundle is None:
        assert before is not None
        return before, None
    read = Bundle.app_of(bundle)
    if before is not None and before.app_id != read.app_id:
        raise InvalidConfig(f"the folder is of the app {before.app_id!r}, the bundle of {read.app_id!r}")
    data = bundle.read_bytes()
    if before is None or kept.read_bytes() != data:
        Bundle.from_bytes(data)  # whole, before it takes the other's place
        write_whole(kept, data)
    return read, kept


def _before(folder: Path, unlisted: int) -> int:
    """How many rounds were charged before the last forget; all that are not listed where its tombstone does not say."""
    from penchant.client._forget import tombstone

    try:
        kept = tombstone(folder)
    except StoreDamaged:
        return unlisted
    found = 0 if kept is None else kept.get("participations")
    return found if isinstance(found, int) and found >= 0 else unlisted


def _seen_by(left: tuple[Left, ...], before: int, silent: int, *, whole: bool) -> str:
    """
    Args:
        before: rounds that were charged before the last forget.
        silent: others that were charged, and of which there is no report. One is written before anything leaves.
        whole: whether no report can have been lost with a damaged store.
    """
    said = _seen_by_listed(left, before, nothing=whole or not silent)
    if not silent:
        return said
    more = f"{silent} more {'round was' if silent == 1 else 'rounds were'} charged"
    return f"{said}; {more}, and nothing left" + ("" if whole else ", unless the report was lost with a damaged store")


def _seen_by_listed(left: tuple[Left, ...], before: int, *, nothing: bool) -> str:
    if before > 0:
        n = f"{before} contribution{'' if before == 1 else 's'}"
        return f"as before the last forget, which is not listed here: at most {n} left before it"
    if not left:
        return "nobody: nothing has left this device" if nothing else "nobody that is known of"
    if all(one.sealed for one in left):
        return "the process that summed each round; to everybody else it was sealed"
    return "the operator's server and whoever carried it there"


def _guarantee(manifest: Manifest) -> Guarantee | None:
    from penchant.common.privacy.plan import Guarantee

    said = manifest.guarantee
    return None if said is None else Guarantee(**{f.name: said.get(f.name, ()) for f in fields(Guarantee)})


def _left(record: Mapping[str, Any]) -> Left:
    """A report of the journal, as people read it."""
    return Left(
        at_ms=record["at_ms"],
        round=record["round"],
        n_bytes=record["bytes"],
        plan=record["plan"],
        sealed=record["sealed"],
        guarantee=record["guarantee"],
    )


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
