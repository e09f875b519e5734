"""The edge's nginx over a folder, for tests: ports that are free, and a process that ends with the test."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from penchant.server import proxy
from penchant.server.folder import Folder
from tests.processes import free_port, within
from tests.server.operators import an_operator


def a_folder(path: Path, *, superlink: int = 0, services: int = 0, **more: Any) -> Folder:
    """An operator's folder on free ports of this machine.

    Args:
        superlink, services: the ports of what runs already.
        more: of `an_operator`.
    """
    edge = f"127.0.0.1:{free_port()}"
    listening = {"edge": edge, "public": edge, "operator": f"127.0.0.1:{free_port()}"}
    listening["superlink"] = f"127.0.0.1:{superlink or free_port()}"
    listening["services"] = f"127.0.0.1:{services or free_port()}"
    lines = "".join(f'{name} = "{address}"\n' for name, address in listening.items())
    return an_operator(path, toml=f"[addresses]\n{lines}", **more)


@dataclass(frozen=True)
class Edge:
    """How a device, or somebody else, reaches an edge.

    Attributes:
        folder: whose authority is trusted.
    """

    folder: Folder
    port: int

    def ask(self, data: bytes, *, wait_s: float = 20.0) -> tuple[int, bytes, bytes]:
        """Status, headers and body of the answer to bytes; 0 where the line was cut without one."""
        with self.line(wait_s) as line:
            line.sendall(data)
            return answer(line)

    def post(self, path: str, body: bytes = b"", *headers: str) -> tuple[int, bytes, bytes]:
        return self.ask(request("POST", path, body, *headers))

    def line(self, wait_s: float = 20.0) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=self.folder.tls / "ca.crt")
        plain = socket.create_connection(("127.0.0.1", self.port), wait_s)
        return context.wrap_socket(plain, server_hostname="localhost")

    def channel(self) -> grpc.Channel:
        trusted = grpc.ssl_channel_credentials((self.folder.tls / "ca.crt").read_bytes())
        return grpc.secure_channel(f"127.0.0.1:{self.port}", trusted)

    def call(self, method: str, message: bytes = b"", **more: Any) -> bytes:
        with self.channel() as channel:
            found: bytes = channel.unary_unary(method, lambda m: m, lambda m: m)(message, timeout=10, **more)
            return found


def request(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", "Connection: close"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


def answer(line: ssl.SSLSocket) -> tuple[int, bytes, bytes]:
    data = bytearray()
    try:
        while piece := line.recv(1 << 16):
            data += piece
    except (ConnectionResetError, ssl.SSLEOFError):
        pass
    head, _, body = bytes(data).partition(b"\r\n\r\n")
    return (int(head.split(b" ")[1]) if head else 0), head, body


@contextlib.contextmanager
def an_edge(folder: Folder, **options: Any) -> Iterator[int]:
    """A running edge; its port."""
    path = folder.run / "nginx.conf"
    path.write_text(proxy.configuration(folder, **options))
    assert folder.logs.is_dir()  # made by being asked for
    proxy.check(path)
    port = int(folder.settings.addresses.edge.rpartition(":")[2])
    with (folder.run / "nginx.out").open("ab") as out:
        process = subprocess.Popen(proxy.command(path), stdout=out, stderr=out)
    try:
        within(10, "the edge listens", lambda: _listens(port))
        yield port
    finally:
        process.terminate()
        process.wait(10)


def _listens(port: int) -> bool:
    with socket.socket() as line:
        line.settimeout(1)
        return line.connect_ex(("127.0.0.1", port)) == 0
