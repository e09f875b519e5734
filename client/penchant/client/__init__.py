"""The client SDK: a person's interests on their own device, in an app's own process.

    from penchant.client import Client

    me = Client.open("state/", bundle="films.bundle", trust="server")
    me.observe("film:603", "watch", dwell_s=5400)     # stays here
    me.recommend(10)                                   # at once, offline, also with no history
    me.sync()                                          # a newer model, and maybe a round

Importing this costs a few milliseconds: what a call needs is loaded by the first such call.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penchant.client._aio import AsyncClient
    from penchant.client._client import Client
    from penchant.client._conditions import Conditions
    from penchant.client._conditions import Policy as RoundPolicy
    from penchant.client._keys import KeyFile, KeyringKey, PassphraseKey
    from penchant.client._retention import Retention
    from penchant.client._salvage import Salvaged
    from penchant.client._training import Training
    from penchant.client._types import (
        Feedback,
        Forgotten,
        Interests,
        Left,
        Privacy,
        Recommendation,
        Strengths,
        SyncResult,
        TopicShare,
        Trust,
    )

_WHERE = {
    "AsyncClient": "_aio",
    "Client": "_client",
    "Conditions": "_conditions",
    "Feedback": "_types",
    "Forgotten": "_types",
    "Interests": "_types",
    "KeyFile": "_keys",
    "KeyringKey": "_keys",
    "Left": "_types",
    "PassphraseKey": "_keys",
    "Privacy": "_types",
    "Recommendation": "_types",
    "Retention": "_retention",
    "RoundPolicy": "_conditions",
    "Salvaged": "_salvage",
    "Strengths": "_types",
    "SyncResult": "_types",
    "TopicShare": "_types",
    "Training": "_training",
    "Trust": "_types",
}
__all__ = [  # names of what `__getattr__` loads
    "AsyncClient",
    "Client",
    "Conditions",
    "Feedback",
    "Forgotten",
    "Interests",
    "KeyFile",
    "KeyringKey",
    "Left",
    "PassphraseKey",
    "Privacy",
    "Recommendation",
    "Retention",
    "RoundPolicy",
    "Salvaged",
    "Strengths",
    "SyncResult",
    "TopicShare",
    "Training",
    "Trust",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_WHERE[name]}")
    return getattr(module, "Policy" if name == "RoundPolicy" else name)


def __dir__() -> list[str]:
    return __all__
