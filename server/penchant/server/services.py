"""What a server answers beside Flower, in one process: distribution, enrolment, and the operator's page and figures.

    python -m penchant.server.services DIR

gRPC and HTTP both listen on this machine alone; devices come through the proxy. Once a minute the roster is made to
agree with Flower's, and pointers that would expire are signed anew.
"""

from __future__ import annotations

import logging
import ssl
import sys
import threading
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from penchant.server import enrolment, logs, web
from penchant.server.database import Database
from penchant.server.distribution import Distribution
from penchant.server.folder import Folder, secret
from penchant.server.registrar import Registrar
from penchant.server.registry import Registry, release_key

log = logging.getLogger("penchant.server")
UPKEEP_S = 60.0


def main(argv: Sequence[str]) -> int:
    folder = Folder(Path(argv[0]))
    logs.configure("services", folder.logs / "services.jsonl")
    settings, at = folder.settings, folder.settings.addresses
    roster, closing = enrolment.Roster.of(folder, Registrar(folder)), threading.Event()
    keeper = threading.Thread(target=_upkeep, args=(folder, roster, closing), name="upkeep", daemon=True)
    with Distribution(
        {(settings.app_id, settings.population): folder.distribution},
        address=at.services,
        private_key=secret(folder.keys / "server.key"),
        chain=(folder.tls / "server.crt").read_bytes(),
        services=[(enrolment.SERVICE, enrolment.handlers(roster, folder))],
    ):
        keeper.start()
        host, _, port = at.operator.rpartition(":")

        def opened() -> Database:
            return Database(folder.database)

        application = web.application(
            folder,
            database_factory=opened,
            models=lambda database: Registry(folder, database, release_key(folder)),
            extra_routes=[enrolment.mint_route(folder, opened)],
            probes={"superlink": lambda: _missing(folder)},
            hosts=at.operator_names,
            closing=closing,
        )
        server = _Server(
            uvicorn.Config(
                application, host=host, port=int(port), log_config=None, access_log=False, server_header=False
            ),
            closing,
        )
        server.run()
    return 0


class _Server(uvicorn.Server):
    """Lets pages that watch go before it waits for answers under way."""

    def __init__(self, config: uvicorn.Config, closing: threading.Event) -> None:
        super().__init__(config)
        self._closing = closing

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._closing.set()
        super().handle_exit(sig, frame)


def _upkeep(folder: Folder, roster: enrolment.Roster, closing: threading.Event) -> None:
    while True:
        for name, act in (("roster", roster.reconcile), ("pointers", lambda: _renew(folder))):
            try:
                act()
            except Exception as error:  # whatever it was, the next look may mend it
                log.warning("upkeep failed", extra={"action": name}, exc_info=error)
        if closing.wait(UPKEEP_S):
            return


def _renew(folder: Folder) -> None:
    with Database(folder.database) as database:
        Registry(folder, database, release_key(folder)).renew()


def _missing(folder: Folder) -> str:
    """Why the SuperLink is not there; "" where it is."""
    trusted = ssl.create_default_context(cafile=str(folder.tls / "ca.crt"))
    where = f"https://{folder.settings.addresses.superlink}/health"
    try:
        with urllib.request.urlopen(where, timeout=2, context=trusted) as answer:  # our own address
            return "" if answer.status == 200 else "not healthy"
    except OSError:
        return "no answer"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
