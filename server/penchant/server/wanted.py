"""Whether the operator wants rounds, and why not where they do not: switches in server.db that every process reads.

rounds    "running", or "paused"
hold      why they are paused, in words; "restored …" holds until the operator confirms
"""

from __future__ import annotations

from penchant.common.errors import InvalidConfig
from penchant.server.database import Database

BY_HAND = "by the operator"


def wanted(database: Database) -> bool:
    return database.switch("rounds") == "running"


def start(database: Database, *, after_restore: bool = False) -> None:
    """Wants rounds from now on.

    Args:
        after_restore: the operator knows that nothing was released since the backup that this folder came from.

    Raises:
        InvalidConfig: the folder came from a backup, and that was not said.
    """
    hold = database.switch("hold")
    if hold.startswith("restored") and not after_restore:
        raise InvalidConfig(f"{hold}: if nothing was released since the backup, penchant round start --after-restore")
    database.set_switches({"rounds": "running", "hold": ""})


def pause(database: Database, why: str = BY_HAND) -> None:
    """Wants no more rounds; one that is under way is finished. That a folder was restored stays the reason."""
    kept = database.switch("hold")
    database.set_switches({"rounds": "paused", "hold": kept if kept.startswith("restored") else why})
