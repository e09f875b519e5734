"""A real Flower server for tests: a SuperLink and its SuperExec as processes, stopped by their own number."""

from __future__ import annotations

import hashlib
import os
import signal
import ssl
import subprocess
import sys
import urllib.request
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from flwr.cli.build import build_fab_from_disk
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control import ControlHttpClient

from tests.certificates import tls
from tests.processes import within

ROOT = Path(__file__).resolve().parents[2]


def certificates(folder: Path) -> None:
    """A certificate authority, and a server's certificate for this machine alone."""
    made = tls()
    for name, data in (("ca.crt", made.ca), ("server.crt", made.chain), ("server.key", made.private_key)):
        (folder / name).write_bytes(data)


@dataclass
class Server:
    """A SuperLink and its SuperExec in a folder."""

    folder: Path
    port: int
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self, program: str, *options: str) -> None:
        parts = ("common", "client", "server", "simulations")
        paths = [*(str(ROOT / part) for part in parts), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "FLWR_HOME": str(self.folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
            "PENCHANT_FLEET": str(self.folder),
        }
        with (self.folder / f"{program}.log").open("ab") as out:
            self.processes[program] = subprocess.Popen(
                [str(Path(sys.executable).parent / program), *options],
                stdout=out,
                stderr=out,
                env=environment,
                start_new_session=True,  # its children end with it, by the group's number
            )

    def superlink(self, *, secret: bool = True) -> None:
        """
        Args:
            secret: whether only a SuperExec that knows the folder's secret is given tasks; Flower's default is not.
        """
        files = {
            name: str(self.folder / name) for name in ("server.crt", "server.key", "ca.crt", "state.db", "sx.secret")
        }
        self.start(
            "flower-superlink",
            *("--host", "127.0.0.1", "--port", str(self.port), "--isolation", "process"),
            *("--ssl-certfile", files["server.crt"], "--ssl-keyfile", files["server.key"]),
            *("--ssl-ca-certfile", files["ca.crt"], "--enable-supernode-auth", "--database", files["state.db"]),
            "--disable-runtime-dependency-installation",
            *(("--superexec-auth-secret-file", files["sx.secret"]) if secret else ()),
        )
        within(40, "the SuperLink answers", self.healthy)

    def superexec(self) -> None:
        self.start(
            "flower-superexec",
            *("--runtime-api-address", self.address, "--root-certificates", str(self.folder / "ca.crt")),
            *("--superexec-auth-secret-file", str(self.folder / "sx.secret")),
        )

    def healthy(self) -> bool:
        trusted = ssl.create_default_context(cafile=str(self.folder / "ca.crt"))
        try:
            with urllib.request.urlopen(f"https://{self.address}/health", timeout=1, context=trusted) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def control(self) -> ControlHttpClient:
        return ControlHttpClient.from_server_address(self.address, False, (self.folder / "ca.crt").read_bytes(), [])

    def submit(self, name: str, component: str) -> None:
        """Starts a run of a folder that holds nothing but a pyproject."""
        publisher, _, app = name.partition("/")
        folder = self.folder / app
        folder.mkdir()
        (folder / "pyproject.toml").write_text(
            f'[project]\nname = "{app}"\nversion = "1.0.0"\ndescription = ""\nlicense = "Apache-2.0"\n'
            "dependencies = []\n"
            f'[tool.flwr.app]\npublisher = "{publisher}"\n[tool.flwr.app.components]\nserverapp = "{component}"\n'
            'clientapp = "penchant.client._flower:client_app"\n[tool.flwr.app.config]\n'
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of flwr's own making
            bundle = build_fab_from_disk(folder)
        with self.control() as control:
            fab = Fab(hash_str=hashlib.sha256(bundle).hexdigest(), content=bundle)
            assert control.StartRun(StartRunRequest(fab=fab)).run_id

    def kill(self, program: str) -> None:
        process = self.processes.pop(program)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)

    def logs(self) -> str:
        return "\n".join(f"{p.name}:\n{p.read_text(errors='replace')[-4000:]}" for p in self.folder.glob("*.log"))
