"""Registers devices with the SuperLink of a folder, a connection for each call; light until the first one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from penchant.server.folder import Folder

if TYPE_CHECKING:
    from penchant.server._flower import Control


class Registrar:
    """What `enrolment.Roster` needs of Flower.

    Raises:
        Unreachable: of every call; the SuperLink is not up.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def register(self, node_key: bytes, /) -> int:
        with self._control() as control:
            return control.register(node_key)

    def unregister(self, node_id: int, /) -> None:
        with self._control() as control:
            control.unregister(node_id)

    def nodes(self) -> Mapping[bytes, int]:
        with self._control() as control:
            return {node.key: node.id for node in control.nodes()}

    def _control(self) -> Control:
        from penchant.server._flower import Control  # 1.5 s

        return Control(self._folder.settings.addresses.superlink, (self._folder.tls / "ca.crt").read_bytes())
