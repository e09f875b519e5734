"""Real devices against a real server: each person of a data set is a process of its own with the SDK in it.

    spec on stdin ──► open store, observe the history, enrol, take part in the background, follow new models
                 ──► lines of JSON on stdout: what happened, and the list before and after

Nothing is simulated but who the people are. Stores, keys, TLS, the proxy, the server's rounds and its signed models are
the ones of production, so that what this shows an operator would see.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penchant.common.artifacts.bundle import Bundle
from penchant.common.errors import InvalidConfig
from penchant.simulations.data.dataset import Dataset

MOST_EVENTS = 1000
"""Of one person's history, the latest that their device is given."""


@dataclass
class Device:
    """What one process told of itself.

    Attributes:
        user: of the data set.
        rounds: that it took part in.
        version: of the model that it has now.
        before, after: the first ten of its list with the bundle's model, and with the newest.
        error: why it ended early; "" where it did not.
    """

    user: str
    rounds: list[int] = field(default_factory=list)
    version: int = 0
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    error: str = ""

    @property
    def changed(self) -> int:
        """How many of the ten are others than before."""
        return len(set(self.after) - set(self.before))


@dataclass(frozen=True)
class Server:
    """Where devices go.

    Attributes:
        bundle: of the app, whose root key and CA devices trust.
        tokens: gives a new one for each device.
        follows: whether each round's model reaches devices without anybody's doing.
    """

    bundle: Path
    tokens: Callable[[], str]
    follows: bool = False


def server_at(url: str, *, bundle: Path | None, token: str | None) -> Server:
    """
    Args:
        url: an operator's folder on this machine, or https://host:port of a server elsewhere.
        bundle, token: of the app and its backend, for a server elsewhere; a token needs as many uses as devices.

    Raises:
        InvalidConfig: no such folder, or a server elsewhere without a bundle and a token, or with one of another.
    """
    if url.startswith("https://"):
        if bundle is None or token is None:
            raise InvalidConfig("a server elsewhere needs --bundle FILE of its app, and --token of its operator")
        if (goes := Bundle.app_of(bundle).fleet) != url.removeprefix("https://").rstrip("/"):
            raise InvalidConfig(f"this bundle's devices go to https://{goes}: take that --url, or the server's bundle")
        return Server(bundle, lambda: token)
    from penchant.server.enrolment import NotRunning, Roster
    from penchant.server.folder import Folder

    folder = Folder(Path(url.removeprefix("file://")))

    def minted() -> str:
        return Roster.of(folder, NotRunning()).mint(ttl_s=3600.0).text

    return Server(bundle or folder.bundle, minted, folder.settings.models.promote == "automatic")


def people(data: Dataset, bundle: Bundle, n: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The first n people who know at least ten items of the app's catalogue, and what each did.

    Raises:
        InvalidConfig: there are fewer: the data are of other items than the app's.
    """
    known, log, found = bundle.catalogue.index, data.interactions, 0
    for row in range(log.n_users):
        part = slice(log.offsets[row], log.offsets[row + 1])
        items = [data.catalogue.ids[item] for item in log.items[part]]
        events = [
            {"item": item, "kind": "view", "strength": float(strength), "at_ms": int(at)}
            for item, strength, at in zip(items, log.strengths[part], log.times[part], strict=True)
            if item in known
        ]
        if len({event["item"] for event in events}) < 10:
            continue
        yield (log.users[row] if log.users else str(row)), events[-MOST_EVENTS:]
        found += 1
        if found == n:
            return
    raise InvalidConfig(f"{found} people know ten of the app's items: take fewer --devices, or the app's own --data")


class DeviceProcess:
    """A device that runs. What it says is taken in by a thread of its own.

    Args:
        told: of each line; called by that thread.
    """

    def __init__(self, user: str, spec: Mapping[str, Any], told: Callable[[Device, dict[str, Any]], None]) -> None:
        self.device = Device(user)
        self._told = told
        self.process = subprocess.Popen(
            [sys.executable, "-m", "penchant.simulations.fleet_device"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._send(spec)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _send(self, spec: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None  # a pipe
        self.process.stdin.write(json.dumps(spec) + "\n")  # a command line could be read by others on this machine
        self.process.stdin.flush()

    def _read(self) -> None:
        assert self.process.stdout is not None  # a pipe
        for text in self.process.stdout:
            line = json.loads(text)
            _take(self.device, line)
            self._told(self.device, line)

    @property
    def running(self) -> bool:
        return self._reader.is_alive()

    def end(self, wait_s: float = 10.0) -> None:
        """Lets it close its store and leave, and makes it after so many seconds."""
        if self.process.stdin is not None:
            self.process.stdin.close()  # which it reads as the end
        try:
            self.process.wait(wait_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(wait_s)
        if self.process.stdout is not None:
            self.process.stdout.close()


def spec(
    server: Server, events: Sequence[Mapping[str, Any]], state: Path, *, rounds: int, version: int
) -> dict[str, Any]:
    """What a device process is told.

    Args:
        state: folder of its store.
        version: of the model that it waits for before it leaves by itself; 0 where models do not come by themselves.
        rounds: that it takes part in before it leaves, then.
    """
    return {
        "state": str(state),
        "bundle": str(server.bundle),
        "token": server.tokens(),
        "events": list(events),
        "rounds": rounds,
        "version": version,
        "passphrase": secrets.token_urlsafe(16),
    }


def run_fleet(
    data: Dataset,
    server: Server,
    n_devices: int,
    *,
    rounds: int,
    wait_s: float,
    states: Path | None = None,
    told: Callable[[Device, dict[str, Any]], None] = lambda device, line: None,
) -> list[Device]:
    """Starts the devices, waits until each took part in so many rounds and has the newest model, and ends them.

    Args:
        rounds: to wait for; a device may take part in fewer, where its plan has others drawn.
        wait_s: after which what was reached by then is the result.
        states: where stores are kept; a temporary folder if None.
        told: of each line that a device says, from threads.

    Raises:
        InvalidConfig: fewer people than devices.
        MalformedArtifact, UntrustedArtifact: the bundle.
    """
    bundle = Bundle.read(server.bundle)
    version = bundle.manifest.version + rounds if server.follows else 0
    with ExitStack() as stack:
        if states is None:
            states = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penchant-fleet-")))
        devices: list[DeviceProcess] = []
        for user, events in list(people(data, bundle, n_devices)):
            one = spec(server, events, states / str(len(devices)), rounds=rounds, version=version)
            devices.append(DeviceProcess(user, one, told))
            stack.callback(devices[-1].end)
        until = time.monotonic() + wait_s
        while any(one.running for one in devices) and time.monotonic() < until:
            time.sleep(0.2)
    return [one.device for one in devices]


def _take(device: Device, line: dict[str, Any]) -> None:
    match line.get("said"):
        case "list":
            device.version = line["version"]
            device.before = device.before or line["items"]
            device.after = line["items"]
        case "rounds":
            device.rounds = line["rounds"]
        case "error":
            device.error = line["why"]
