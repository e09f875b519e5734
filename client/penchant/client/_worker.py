"""The process that trains one contribution and ends: python -P -m penchant.client._worker MEMORY_BYTES

What it trains on comes over its standard input (`_pipe.py`) and the sum goes back over its standard output. Nothing of
the person is on its command line, in its environment or on a disk; it leaves no core dump. It is the same `Node` that
answers in the app's process, under the same checks, and it charges nothing: whoever started it does, before what it
computed leaves.

It ends with its parent: by a signal on Linux, and everywhere because its standard input ends then. It is nicer than the
app, the first that a Linux short of memory kills, and bounded in memory before anything large is loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from penchant.client import _pipe
from penchant.client.node import Node
from penchant.common.arrays import Arrays
from penchant.common.catalogue import Catalogue
from penchant.common.errors import PenchantError
from penchant.common.interactions import History, Interactions
from penchant.common.learners import registry
from penchant.common.learners.contract import Learner
from penchant.common.streams import Streams
from penchant.common.wire import Order

_PARENT_DEATH, _DUMPABLE = 1, 4  # prctl(2)


def main() -> None:
    _confine(int(sys.argv[1]))
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no answer
    try:
        head, arrays = _pipe.read(sys.stdin.buffer)
    except EOFError:
        os._exit(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    said: Mapping[str, Any] = {}
    answer: Arrays = {}
    try:
        answer = answered(head, arrays)
    except PenchantError as error:  # the words of ours name no person and no item
        said = {"error": type(error).__name__, "detail": str(error)}
    except Exception as error:
        # NumPy's; torch's and the system's; an import's that found no room to say what failed
        memory = isinstance(error, MemoryError | SystemError) or "allocate memory" in str(error).lower()
        said = {"error": "MemoryError" if memory else "", "detail": type(error).__name__}
    with contextlib.suppress(OSError):
        _pipe.write(out, said, answer)
    os._exit(0)  # what was loaded is not worth taking apart


def answered(head: Mapping[str, Any], arrays: Arrays) -> Arrays:
    """What a node that hosts this one person answers.

    Args:
        head: "order" (flat), "catalogue" (its record), "n_items", "taken": how often this person took part under the
            plan, "seed" of the streams, None but in tests.
        arrays: the history's columns, and the state, each name after "state/".
    """
    order = Order.from_flat(head["order"])
    catalogue = Catalogue.from_record(head["catalogue"])
    history = History(arrays["items"], arrays["times"], arrays["strengths"])

    def learners(name: str, settings: Mapping[str, Any]) -> Learner:
        return registry.build(name, settings, catalogue)

    node = Node(
        Interactions.one(history, head["n_items"]),
        learners,
        Streams.from_os() if head["seed"] is None else Streams(head["seed"]),
        plan=order.plan,
        participations=np.array([head["taken"]], np.int64),
    )
    state = {name.removeprefix("state/"): values for name, values in arrays.items() if name.startswith("state/")}
    return node.answer(order, state)


def _confine(memory_bytes: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
        prctl = ctypes.CDLL(None).prctl
        prctl(_PARENT_DEATH, ctypes.c_ulong(signal.SIGKILL))
        prctl(_DUMPABLE, ctypes.c_ulong(0))
    if sys.platform != "win32":
        import resource

        os.nice(10)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if memory_bytes:
            resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))


def _end_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main()
