"""The ServerApp that an operator's flower-app names as `penchant.server.app:app`: the installed package's.

What is submitted to Flower holds no code. The folder is the one that PENCHANT_SERVER names, in the environment that
`penchant serve up` gives to Flower's SuperExec.
"""

from __future__ import annotations

import os
from pathlib import Path

from penchant.common.errors import InvalidConfig
from penchant.server import logs
from penchant.server._flower import operated
from penchant.server.folder import Folder
from penchant.server.operation import Operation


def operation() -> Operation:
    """
    Raises:
        InvalidConfig: PENCHANT_SERVER is not set, or names no operator's folder.
    """
    if not (where := os.environ.get("PENCHANT_SERVER")):
        raise InvalidConfig("PENCHANT_SERVER names no folder: rounds are started by penchant serve up")
    folder = Folder(Path(where))
    logs.configure("rounds", folder.logs / "rounds.jsonl")
    return Operation(folder)


app = operated(operation)
