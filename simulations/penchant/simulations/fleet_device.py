"""One device of `fleet.py`: an app that embeds the SDK, opens a person's store and does as apps do.

    python -m penchant.simulations.fleet_device < spec

It ends when its standard input does, once it has the model of the last round that it waits for.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

from penchant.client import Client, Conditions, PassphraseKey
from penchant.common.errors import PenchantError, Unreachable


def main() -> int:
    spec = json.loads(sys.stdin.readline())
    leaving = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        leaving.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    here = Conditions(idle=lambda: True, charging=lambda: True, unmetered=lambda: True)
    try:
        with Client.open(
            spec["state"],
            bundle=spec["bundle"],
            trust="server",
            consent="fleet",
            key=PassphraseKey(spec["passphrase"], n=1 << 12),
            conditions=here,
        ) as me:
            live(me, spec, leaving)
    except PenchantError as error:
        say(said="error", why=str(error))
        return 1
    return 0


def live(me: Client, spec: dict[str, Any], leaving: threading.Event) -> None:
    """Observes, shows its list, enrols, and follows rounds and models until there is nothing left to wait for."""
    for event in spec["events"]:
        me.observe(event["item"], event["kind"], strength=event["strength"], at_ms=event["at_ms"])
    version = shown(me)
    _enrol(me, spec["token"], leaving)
    me.start()
    told: list[int] = []
    while not leaving.wait(0.5):
        found = me.sync(deadline_s=10.0)
        rounds = sorted({left.round for left in me.privacy().left})
        if rounds != told:
            told = rounds
            say(said="rounds", rounds=rounds)
        if found.version != version:
            version = shown(me)
        if version >= spec["version"] if spec["version"] else len(rounds) >= spec["rounds"]:
            return  # one who enrolled after the first round has no reason to wait for as many


def _enrol(me: Client, token: str, leaving: threading.Event) -> None:
    """Enrols, trying again while the server is away."""
    for pause_s in (0.5, 1.0, 2.0, 4.0, 8.0, 0.0):
        try:
            me.sync(deadline_s=10.0)  # the plan to enrol under is that of the newest signed release
            me.enrol(token)
            say(said="enrolled")
            return
        except Unreachable:
            if not pause_s or leaving.wait(pause_s):
                raise


def shown(me: Client) -> int:
    """Says the list, and the version of the model that it came from."""
    version = me.privacy().release
    items = [one.item for one in me.recommend(10)]
    number = me.export()["release"]
    say(said="list", version=number, items=items, guarantee="" if version is None else str(version))
    return int(number)


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
