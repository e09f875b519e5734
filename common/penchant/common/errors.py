"""Every error that leaves a public function of penchant, as one tree.

A type exists for each thing a caller would do differently; its docstring says what to do. Messages name a field, a
limit, a file or a round, never an interest, a contribution or a device, because they reach logs that their subject
cannot see.

    PenchantError
    ├── InvalidConfig          a field or option is out of range, or a mix is impossible
    ├── MissingExtra           an optional dependency is not installed
    ├── MalformedData          a data file or row cannot be read
    ├── MalformedContribution  a contribution or partial sum is not what the round asked for
    ├── MalformedScores        a scorer gave NaN or a wrong shape
    ├── MalformedArtifact      a bundle, statement or model is cut short, changed or of an unknown version
    ├── UntrustedArtifact      it is whole, but not signed by whom it should be
    │   ├── ExpiredArtifact    its time is over, or has not come
    │   └── StaleArtifact      older than one that was seen before
    ├── Unreachable            a server did not answer in time
    ├── NotServed              a server answered that it has no such thing
    ├── NotEnrolled            a server does not know this device's key
    ├── RoundClosed            too late for this round
    ├── Busy                   another thread was at work for longer than a call waits
    ├── PrivacyRefused         releasing would break the promise
    │   ├── BudgetExhausted    the ledger has no room for the event
    │   └── UnknownMechanism   an event or mechanism this version does not know
    └── StoreError             what a person did cannot be read or kept on their device
        ├── StoreLocked        another process or thread has the store
        ├── WrongKey           the key does not open it, or cannot be had
        ├── StoreDamaged       a record, a page or a file of it is not what was written
        ├── StoreFull          the disk has no room
        └── StoreNewer         a later version of penchant wrote it
"""

from __future__ import annotations


class PenchantError(Exception):
    """Base of every error that leaves a public function. Catch it to catch them all."""


class InvalidConfig(PenchantError):
    """An option is out of range or does not go with another. Mend the option that the message names."""


class MissingExtra(PenchantError):
    """An optional dependency is not installed. Run the install line in the message."""

    def __init__(self, extra: str, missing: str) -> None:
        super().__init__(f"{missing} is not installed; run: pip install 'penchant[{extra}]'")
        self.extra = extra


class MalformedData(PenchantError):
    """A data file or row cannot be read. Mend the place named, or skip such rows where that is offered."""


class MalformedContribution(PenchantError):
    """A contribution or partial sum has wrong names, shape, type or values. It is left out; the round goes on."""


class MalformedScores(PenchantError):
    """Scores hold a NaN, or are not one row a person and one column an item. Mend the scorer; nothing is ranked."""


class MalformedArtifact(PenchantError):
    """A bundle, signed statement or model is not what it should be. Nothing of it is used; fetch it again."""


class UntrustedArtifact(PenchantError):
    """Not signed by a key that the app's root key vouches for. Nothing of it is used; ask the operator."""


class ExpiredArtifact(UntrustedArtifact):
    """Outside the time it was signed for. Set the clock, or wait for the operator to sign anew."""


class StaleArtifact(UntrustedArtifact):
    """Older than what was seen before, as when somebody replays it. What is here stays in use."""


class Unreachable(PenchantError):
    """A server did not answer in time. What is here stays in use; try again later."""


class NotServed(PenchantError):
    """The server has no such app, channel, model or catalogue. Ask for what the channel has now."""


class Busy(PenchantError):
    """Another thread was at work for longer than this call waits. Nothing was done; call again."""


class NotEnrolled(PenchantError):
    """The server does not take this device's key, or its clock is far off. Enrol the device again."""


class RoundClosed(PenchantError):
    """Too late for this round. Nothing is owed; take part when the next one opens."""


class PrivacyRefused(PenchantError):
    """Going on would break the privacy promise, so nothing is released. Change the plan, not the data."""


class BudgetExhausted(PrivacyRefused):
    """The ledger has no room for this event. No device is called; plan fewer rounds or more noise."""


class UnknownMechanism(PrivacyRefused):
    """An event or mechanism that this version does not know. Update penchant before going on."""


class StoreError(PenchantError):
    """The store on the device cannot do this now. What was kept before is still kept."""


class StoreLocked(StoreError):
    """Another process or thread has the store. Close it there, or try again; nothing was changed."""


class WrongKey(StoreError):
    """The key does not open the store, or cannot be had. Give the key it was made with; nothing was changed."""


class StoreDamaged(StoreError):
    """What the message names is not what was written. The rest stays readable: `Client.salvage` keeps it, if asked."""


class StoreFull(StoreError):
    """The disk has no room, or fails. Nothing that was kept is lost; free some room and do it again."""


class StoreNewer(StoreError):
    """A later version of penchant wrote the store. Update penchant; nothing was changed."""
