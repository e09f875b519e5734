"""The edge: the only thing that devices reach. It passes on what a device calls, and knows nothing else.

    device ──TLS──► nginx ──TLS, checked──► SuperLink   nine paths of Flower's Fleet API, and /health
                          └─TLS, checked──► services    the methods of Distribution and Enrolment, and a health check

Flower's open build has its Control and Runtime APIs, which start runs and hand out tasks to whoever asks, on the Fleet
API's port. So each path is named here, whole, and none by its beginning: a route that a later Flower adds is closed
until somebody opens it. A request passes only if its line is, byte for byte, POST and that path; what goes on is the
path that is written here and never what came. Everything else is a 404 without a body. Of the Fleet API, register-node
and unregister-node are enrolment's to do over the Control API, and get-fab would ship code: our devices call neither.

Nothing of a person is kept. There is no access log, as a line for each request says that somebody was there, and when;
and `error_log` is at emerg, because from alert down nginx adds the client's address and the request to nearly every
line, so that it says why nginx would not start and no more. Bodies stay in memory: no contribution is written to this
disk. The SuperLink, which logs the address that it is told, is told none. The services are, as X-Real-IP, since they
count enrolments by address; whatever a client claims there is overwritten.

What it cannot do: a body that comes a byte at a time, each within the timeout, holds one of its address's connections
and nothing behind the edge; many addresses at once are a firewall's to keep away. Its answers say "Server: nginx",
without a version, which only a module that nginx-light lacks takes off.

Source: https://nginx.org/en/docs/http/ngx_http_core_module.html and its neighbours, version 1.22.
"""

from __future__ import annotations

import os
import pwd
import re
import resource
import shutil
import subprocess
from pathlib import Path

from penchant.common.errors import InvalidConfig
from penchant.server.folder import Folder

FLEET = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
"""What `client/_flower.py` calls, under /v1/fleet/."""
SERVICES = (
    "penchant.v1.Distribution/GetManifest",
    "penchant.v1.Distribution/GetModel",
    "penchant.v1.Distribution/GetCatalogue",
    "penchant.v1.Enrolment/Enrol",
    "penchant.v1.Enrolment/Revoke",
    "grpc.health.v1.Health/Check",
)
MAX_CALL = (64 << 10) + 1024
"""Bytes of a request's body: what the services take, its frame included. Flower's calls are far below."""
MAX_OBJECT = (5 << 20) + (64 << 10)
"""Bytes of a pushed object: Flower cuts a contribution, however large, into pieces of 5 MiB at most, each with a header
of its own. A limit made of the contribution's own size would be wrong once the catalogue grows."""
PUSHES = (32, 96)
"""Objects that one address, and everybody, may be pushing at once: at most 480 MiB wait in the proxy's memory."""
_STATUSES = "400 403 404 405 408 411 412 413 414 415 416 421 429 494 495 496 497 500 501 502 503 504"
_CIPHERS = (
    "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384:"
    "ECDHE-RSA-AES256-GCM-SHA384:ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305"
)
_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]")


def configuration(
    folder: Folder,
    *,
    timeout_s: float = 30.0,
    answer_s: float = 60.0,
    at_once: int = 512,
    per_s: int = 200,
) -> str:
    """The whole nginx.conf, for run/nginx.conf in the folder; all that it names is relative to that.

    It needs no root and no file outside the folder. Certificates are read when nginx starts, and again at SIGHUP.

    Args:
        timeout_s: for the TLS handshake and a request's header, for the next bytes of its body, and for a client that
            takes none of its answer.
        answer_s: how long the SuperLink or the services may say nothing.
        at_once: requests under way for one address; a whole campus may be behind one.
        per_s: requests a second of one address, and twice as many at once; beyond that it is told 429.

    Raises:
        InvalidConfig: an address whose host is none.
    """
    addresses = folder.settings.addresses
    for name in ("edge", "superlink", "services"):
        if not _HOST.fullmatch(getattr(addresses, name).rpartition(":")[0]):
            raise InvalidConfig(f"addresses.{name} must be host:port, such as 127.0.0.1:8443")
    if not (timeout_s > 0 and answer_s > 0 and at_once > 0 and per_s > 0):
        raise InvalidConfig("the edge's times and limits must be positive")
    files = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 16384)
    timeout = f"{timeout_s * 1000:.0f}ms"
    user = f"user {pwd.getpwuid(0).pw_name};\n" if os.geteuid() == 0 else ""  # or its workers cannot read the folder
    return f"""\
{user}worker_processes auto;
worker_rlimit_nofile {files};
pid nginx.pid;
error_log ../logs/edge.log emerg;

events {{
    worker_connections {max(files // 2 - 32, 64)};
}}

http {{
    access_log off;
    log_not_found off;
    server_tokens off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;

    limit_conn_zone $binary_remote_addr zone=addresses:10m;
    limit_conn_zone $server_name zone=bodies:1m;
    limit_req_zone $binary_remote_addr zone=requests:10m rate={per_s}r/s;

    upstream superlink {{
        server {addresses.superlink};
        keepalive 64;
        keepalive_timeout 2s;  # below uvicorn's 5 s, so that no request meets a connection that ends
    }}
    upstream services {{
        server {addresses.services};
        keepalive 64;
    }}

    server {{
        listen {addresses.edge} ssl http2 default_server;

        ssl_certificate ../tls/server.crt;
        ssl_certificate_key ../keys/server.key;
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_ciphers {_CIPHERS};
        ssl_session_cache shared:tls:10m;
        ssl_session_tickets off;

        client_header_timeout {timeout};
        client_body_timeout {timeout};
        send_timeout {timeout};
        lingering_time {timeout};
        keepalive_timeout 75s;
        reset_timedout_connection on;
        http2_max_concurrent_streams 64;
        client_max_body_size {MAX_CALL};
        client_body_buffer_size {MAX_OBJECT};  # a request takes what its body needs, up to this, and never the disk
        limit_conn addresses {at_once};
        limit_conn_status 429;
        limit_req zone=requests burst={2 * per_s} nodelay;
        limit_req_status 429;

        proxy_http_version 1.1;
        proxy_connect_timeout 5s;
        proxy_send_timeout {answer_s * 1000:.0f}ms;
        proxy_read_timeout {answer_s * 1000:.0f}ms;
        proxy_buffers 16 64k;
        proxy_buffer_size 64k;
        proxy_busy_buffers_size 128k;
        proxy_max_temp_file_size 0;
        proxy_redirect off;
        proxy_ssl_protocols TLSv1.2 TLSv1.3;
        proxy_ssl_trusted_certificate ../tls/ca.crt;
        proxy_ssl_verify on;
        proxy_ssl_verify_depth 3;
        proxy_ssl_server_name on;
        proxy_ssl_name localhost;
        proxy_set_header Host localhost;
        proxy_set_header Connection "";
{_headers("proxy", "")}

        grpc_connect_timeout 5s;
        grpc_send_timeout {answer_s * 1000:.0f}ms;
        grpc_read_timeout {answer_s * 1000:.0f}ms;
        grpc_buffer_size 64k;  # of an answer under way; more is left to the services until the client took this
        grpc_ssl_protocols TLSv1.2 TLSv1.3;
        grpc_ssl_trusted_certificate ../tls/ca.crt;
        grpc_ssl_verify on;
        grpc_ssl_verify_depth 3;
        grpc_ssl_server_name on;
        grpc_ssl_name localhost;
        grpc_set_header Host localhost;
{_headers("grpc", "$remote_addr")}

        set $asked "$request_method $request_uri";
        error_page {_STATUSES} /nothing;
        location = /nothing {{  # the status stays what it was, whatever the body's size
            internal;
            client_max_body_size 0;
            return 200 "";
        }}
        location / {{ return 404; }}
        location = /health {{
            if ($asked != "GET /health") {{ return 404; }}
            proxy_pass https://superlink/health;
        }}
{"".join(_fleet(name) for name in FLEET)}{"".join(_service(name) for name in SERVICES)}    }}
}}
"""


def _headers(module: str, address: str) -> str:
    """What a client says of where it comes from, overwritten; "" takes a header away."""
    told = {"X-Real-IP": address, "X-Forwarded-For": address, "X-Forwarded-Proto": "", "X-Forwarded-Host": ""}
    said = {**told, "X-Forwarded-Port": "", "Forwarded": ""}
    return "\n".join(f'        {module}_set_header {name} "{value}";' for name, value in said.items())


def _fleet(name: str) -> str:
    size = ""
    if name == "push-object":  # its body waits in memory until it is whole, before anybody checks who sends it
        size = f"            client_max_body_size {MAX_OBJECT};\n            limit_conn addresses {PUSHES[0]};\n"
        size += f"            limit_conn bodies {PUSHES[1]};\n            limit_conn_status 429;\n"
    return f"""\
        location = /v1/fleet/{name} {{
            if ($asked != "POST /v1/fleet/{name}") {{ return 404; }}
{size}            proxy_pass https://superlink/v1/fleet/{name};
        }}
"""


def _service(name: str) -> str:
    return f"""\
        location = /{name} {{
            if ($asked != "POST /{name}") {{ return 404; }}
            grpc_pass grpcs://services;
        }}
"""


def write(folder: Folder) -> Path:
    """Writes run/nginx.conf, and has nginx check it.

    Raises:
        InvalidConfig: as `configuration` and `check`.
    """
    path, _ = folder.run / "nginx.conf", folder.logs  # made by being asked for
    path.write_text(configuration(folder), encoding="utf-8")
    check(path)
    return path


def find_nginx() -> str:
    """The program; Debian keeps it where only root's PATH looks.

    Raises:
        InvalidConfig: there is none.
    """
    where = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"))
    if (found := shutil.which("nginx", path=where)) is None:
        raise InvalidConfig("nginx is not installed; run: apt-get install nginx-light")
    return found


def command(path: Path) -> list[str]:
    """The command line that runs a configuration in the foreground: SIGTERM ends it, SIGHUP reads all files again.

    Raises:
        InvalidConfig: no nginx.
    """
    path = path.resolve()
    return [find_nginx(), "-c", str(path), "-p", str(path.parent), "-e", "stderr", "-g", "daemon off;"]


def check(path: Path) -> None:
    """Has nginx read a configuration, and the certificates and addresses that it names.

    Raises:
        InvalidConfig: no nginx, or it would not start; the message is nginx's own.
    """
    done = subprocess.run([*command(path)[:-2], "-t", "-q"], capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = next(iter(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
        raise InvalidConfig(f"nginx does not take {path}: {said.removeprefix('nginx: ')}")
