"""deploy/: the container, what compose and systemd make of it, and what goes to Prometheus and Grafana.

No container engine and no systemd run here: the files are held by linters, schemas and the rules below, and each rule
is shown a file that breaks it.
"""

from __future__ import annotations

import configparser
import fnmatch
import json
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from penchant.common.errors import InvalidConfig
from penchant.server import web
from penchant.server.database import Database
from penchant.server.folder import Folder
from penchant.server.serve_command import serve
from tests.server.commands import run
from tests.server.history import serving
from tests.server.operators import an_operator
from tests.test_repository import ROOT

DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
RULES = "{extends: default, rules: {line-length: {max: 120}, document-start: disable}}"


def lint(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    where = BIN / program
    return subprocess.run([str(where), *words], capture_output=True, text=True, check=False, timeout=120)


def read_yaml(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------------- the container


def stages(dockerfile: str) -> list[list[tuple[str, str]]]:
    """The instructions of each stage, continued lines joined, comments left out."""
    text = re.sub(r"(?m)^\s*#.*\n", "", dockerfile).replace("\\\n", " ")
    found: list[list[tuple[str, str]]] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        if word.upper() == "FROM":
            found.append([])
        found[-1].append((word.upper(), " ".join(rest.split())))
    return found


COMPILERS = r"\b(gcc|g\+\+|clang|build-essential|make|cargo|rustc|[a-z0-9.]+-dev)\b"
SECRETS = r"(?i)(passw|passphrase|secret|token|api_?key|\.key\b|credential)"


def container_faults(dockerfile: str) -> list[str]:
    """What makes an image unsafe or not repeatable."""
    found, every = [], stages(dockerfile)
    for stage in every:
        base = stage[0][1].split(" ")[0]
        if not re.search(r":[0-9]+\.[0-9]+[0-9a-z.-]*$|@sha256:[0-9a-f]{64}$", base):
            found.append(f"{base} is not pinned")
        for word, rest in stage:
            if word == "ADD":
                found.append(f"ADD {rest}")
            if word in ("ENV", "ARG") and re.search(SECRETS, rest):
                found.append(f"{word} {rest}")
            if word == "RUN" and re.search(r"https?://|\bcurl\b|\bwget\b|\bsudo\b", rest):
                found.append(f"RUN {rest}")
    last = every[-1]
    if any(word == "RUN" and re.search(COMPILERS, rest) for word, rest in last):
        found.append("a compiler is in the image")
    users = [rest for word, rest in last if word == "USER"]
    if not users or users[-1].split(":")[0] in ("root", "0"):
        found.append("it runs as root")
    if "HEALTHCHECK" not in dict(last):
        found.append("nothing asks whether it is well")
    return found


def test_the_container_is_pinned_without_root_a_compiler_or_a_secret() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    assert container_faults(text) == []
    last = dict(stages(text)[-1])
    assert json.loads(last["ENTRYPOINT"]) + json.loads(last["CMD"]) == ["penchant", "serve", "up", "/srv/penchant"]
    assert last["VOLUME"] == "/srv/penchant"
    assert re.match(r"\d+:\d+$", last["USER"]), "a number, so that an engine can see that it is not root"


def test_a_container_that_is_unsafe_is_found() -> None:
    bad = (
        "FROM python:slim AS a\nRUN true\nFROM python\nADD https://example.org/a.tar /\nENV ADMIN_TOKEN=1\n"
        "RUN apt-get install -y libssl-dev \\\n  && curl example.org | sh\nUSER root\n"
    )
    assert container_faults(bad) == [
        "python:slim is not pinned",
        "python is not pinned",
        "ADD https://example.org/a.tar /",
        "ENV ADMIN_TOKEN=1",
        "RUN apt-get install -y libssl-dev && curl example.org | sh",
        "a compiler is in the image",
        "it runs as root",
        "nothing asks whether it is well",
    ]


def test_hadolint_has_nothing_to_say_of_the_container_and_something_of_another(tmp_path: Path) -> None:
    if not (BIN / "hadolint").exists():
        pytest.skip("hadolint is not installed")
    done = lint("hadolint", str(DEPLOY / "Dockerfile"))
    assert done.returncode == 0, done.stdout
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN cd /tmp && apt-get install nginx\n")
    assert "DL3006" in lint("hadolint", str(tmp_path / "Dockerfile")).stdout


def is_sent(path: str, ignore: str) -> bool:
    """Whether a builder gets a file, as .dockerignore's rules have it: the last that fits it or a folder of it."""
    sent = True
    for line in filter(None, ignore.splitlines()):
        if line.startswith("#"):
            continue
        pattern, sends = line.removeprefix("!"), line.startswith("!")
        parts = path.split("/")
        ways = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
        tried = (pattern, pattern.removeprefix("**/"))
        if any(
            fnmatch.fnmatchcase(way, one) and ("**" in pattern or way.count("/") == pattern.count("/"))
            for way in ways
            for one in tried
        ):
            sent = sends
    return sent


def test_a_builder_gets_what_the_wheel_needs_and_no_operator_s_folder() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = ["pyproject.toml", "constraints.txt", project["project"]["readme"], *project["project"]["license-files"]]
    needed += [f"{package}/server/ui.html" for package in wheel]
    assert [path for path in needed if not is_sent(path, ignore)] == []
    kept = ["prod/keys/release.key", "keys/release.key", "offline/root.key", "prod/server.db", "server.toml"]
    kept += ["server/release.key", "server/prod/keys/admin.token", "prod.backup", ".git/config", ".venv/bin/python"]
    assert [path for path in kept if is_sent(path, ignore)] == []
    assert is_sent("prod/keys/release.key", "*.md\n")  # the check can fail


# --------------------------------------------------------------------------------------------------------- compose


def compose_faults(compose: dict[str, Any]) -> list[str]:
    """What of the server's machine a service opens or may write to."""
    found = []
    for name, service in compose["services"].items():
        if not service.get("read_only"):
            found.append(f"{name}: its root can be written to")
        if service.get("cap_drop") != ["ALL"] or service.get("cap_add") or service.get("privileged"):
            found.append(f"{name}: it has capabilities")
        if "no-new-privileges:true" not in service.get("security_opt", []):
            found.append(f"{name}: it may get more privileges")
        if "network_mode" in service or "pid" in service:
            found.append(f"{name}: it shares the machine's network or processes")
        image = service.get("image", "")
        if "build" not in service and not re.search(r":v?[0-9]+\.[0-9]+\.[0-9]+$", image):
            found.append(f"{name}: {image} is not pinned")
        ports = [port for port in map(str, service.get("ports", [])) if not port.startswith("127.0.0.1:")]
        found += [f"{name}: {port} is open to everybody" for port in ports if port != "8443:8443"]
    return found


def test_compose_opens_the_edge_alone_and_shuts_the_rest() -> None:
    compose = read_yaml(DEPLOY / "compose.yaml")
    assert compose_faults(compose) == []
    server = compose["services"]["penchant"]
    assert server["init"] is True, "the supervisor as process 1 would leave zombies"
    assert {"8443:8443", "127.0.0.1:8444:8444"} == set(server["ports"])
    assert any(volume.endswith(":/srv/penchant") for volume in server["volumes"])
    assert {name for name, one in compose["services"].items() if "profiles" not in one} == {"penchant"}
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith("./") else source in compose["volumes"]
    build = server["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()


def test_a_compose_file_that_opens_too_much_is_found() -> None:
    bad = {"services": {"a": {"image": "b", "ports": ["8444:8444"], "privileged": True, "network_mode": "host"}}}
    assert [fault.partition(": ")[2] for fault in compose_faults(bad)] == [
        "its root can be written to",
        "it has capabilities",
        "it may get more privileges",
        "it shares the machine's network or processes",
        "b is not pinned",
        "8444:8444 is open to everybody",
    ]


def test_the_schema_of_compose_takes_the_file_and_refuses_a_misspelt_one(tmp_path: Path) -> None:
    check = ("check-jsonschema", "--builtin-schema", "vendor.compose-spec")
    done = lint(*check, str(DEPLOY / "compose.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((DEPLOY / "compose.yaml").read_text().replace("cap_drop:", "drop_caps:"))
    assert lint(*check, str(wrong)).returncode != 0


def test_yamllint_has_nothing_to_say_of_what_is_deployed() -> None:
    done = lint("yamllint", "--strict", "-d", RULES, str(DEPLOY))
    assert (done.returncode, done.stdout) == (0, "")


def test_prometheus_and_grafana_find_what_is_mounted_for_them() -> None:
    compose = read_yaml(DEPLOY / "compose.yaml")["services"]
    prometheus = read_yaml(DEPLOY / "prometheus" / "prometheus.yml")
    (job,) = prometheus["scrape_configs"]
    assert job["job_name"] == "penchant", "as the alerts have it"
    assert job["static_configs"] == [{"targets": ["penchant:8444"]}]
    assert all((DEPLOY / "prometheus" / name).is_file() for name in prometheus["rule_files"])
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = read_yaml(provisioning / "datasources" / "prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (boards,) = read_yaml(provisioning / "dashboards" / "penchant.yml")["providers"]
    mounted = {volume.split(":")[1]: volume.split(":")[0] for volume in compose["grafana"]["volumes"]}
    (board,) = [where for where in mounted if where.startswith(boards["options"]["path"])]
    assert (DEPLOY / mounted[board]).is_file()
    assert compose["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == board


def test_in_a_container_s_network_the_operator_s_page_is_asked_under_its_name_and_no_other(tmp_path: Path) -> None:
    folder = an_operator(tmp_path / "prod", toml='[addresses]\noperator_names = ["penchant"]\n')
    assert Folder(folder.path).settings.addresses.operator_names == ("penchant",)

    def status(address: str, host: str) -> int:
        asked = urllib.request.Request(f"{address}/healthz", headers={"Host": host})
        try:
            with urllib.request.urlopen(asked, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    hosts = folder.settings.addresses.operator_names
    made = lambda closing: web.application(  # noqa: E731  # passed on, and short
        folder, database_factory=lambda: Database(folder.database), hosts=hosts, closing=closing
    )
    with serving(made) as address:
        assert status(address, "penchant:8444") == 200
        assert status(address, "films.example") == 400
    for wrong in ('"penchant"', '["penchant:8444"]', '["*"]'):
        with pytest.raises(InvalidConfig, match="operator_names"):
            an_operator(tmp_path / "other", toml=f"[addresses]\noperator_names = {wrong}\n")


def test_a_folder_for_a_container_says_that_its_page_is_in_the_clear(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "items.csv").write_text("item\nfilm:1\nfilm:2\n")
    options = ("--catalogue", str(tmp_path / "items.csv"), "--host", "films.example")
    assert (
        run(serve, "init", str(tmp_path / "a"), *options, "--operator", "0.0.0.0", "--operator-name", "penchant") == 0
    )
    assert "0.0.0.0:8444 in the clear" in capsys.readouterr().out
    at = Folder(tmp_path / "a").settings.addresses
    assert (at.edge, at.operator, at.operator_names) == ("0.0.0.0:8443", "0.0.0.0:8444", ("penchant",))
    assert run(serve, "init", str(tmp_path / "b"), *options) == 0
    assert "in the clear" not in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- systemd

UNITS = sorted((DEPLOY / "systemd").glob("*@.*"))
PENCHANT = "/opt/penchant/bin/penchant"


def unit(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # names keep their case
    parser.read_string(path.read_text(encoding="utf-8"))
    return parser


def test_every_service_is_shut_in_to_its_own_folder() -> None:
    assert [path.name for path in UNITS] == ["penchant-backup@.service", "penchant-backup@.timer", "penchant@.service"]
    for path in UNITS:
        if path.suffix == ".timer":
            continue
        service = unit(path)["Service"]
        assert service["User"] == "penchant"
        assert service["ProtectSystem"] == "strict"
        assert service["ReadWritePaths"].split()[0] == "/var/lib/penchant/%i"
        for name in ("NoNewPrivileges", "PrivateTmp", "PrivateDevices", "ProtectHome", "RestrictNamespaces"):
            assert service[name] == "true", f"{path.name}: {name}"
        assert service["CapabilityBoundingSet"] == ""
        assert service["UMask"] == "0077"
    server = unit(DEPLOY / "systemd" / "penchant@.service")["Service"]
    assert server["ExecStart"] == f"{PENCHANT} serve up /var/lib/penchant/%i"
    assert (server["KillMode"], server["Restart"]) == ("mixed", "on-failure")


def test_systemd_takes_every_unit_and_refuses_a_wrong_one(tmp_path: Path) -> None:
    for path in UNITS:  # the program that they start is not at its place here
        text = path.read_text(encoding="utf-8").replace(PENCHANT, "/bin/true")
        (tmp_path / path.name).write_text(text, encoding="utf-8")
        assert unit(path).has_section("Timer" if path.suffix == ".timer" else "Service")
    if (analyze := shutil.which("systemd-analyze")) is None:
        return  # the structure above is then all that is checked

    def verify(name: str) -> subprocess.CompletedProcess[str]:
        words = [analyze, "verify", "--man=no", "--recursive-errors=no", str(tmp_path / name.replace("@", "@prod"))]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)

    for path in UNITS:
        done = verify(path.name)
        assert (done.returncode, done.stderr) == (0, "")
    wrong = (tmp_path / "penchant@.service").read_text().replace("ProtectSystem=", "ProtectSystems=")
    (tmp_path / "wrong@.service").write_text(wrong)
    assert "ProtectSystems" in verify("wrong@.service").stderr


def test_a_backup_s_command_names_the_folder_the_day_and_the_passphrase(tmp_path: Path) -> None:
    command = unit(DEPLOY / "systemd" / "penchant-backup@.service")["Service"]["ExecStart"]
    shell, _, instance = re.fullmatch(r"/bin/sh -c '(.*)' (sh) (%i)", command).groups()  # type: ignore[union-attr]  # None would raise
    assert instance == "%i"
    line = shell.replace("$$", "$").replace("%%", "%").replace(PENCHANT, "printf '%s\\n'").replace("exec ", "")
    done = subprocess.run(
        ["/bin/sh", "-c", line, "sh", "prod"],
        env={"CREDENTIALS_DIRECTORY": "/run/credentials/it", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    verb, folder, out, where, option, passphrase = done.stdout.splitlines()
    assert (verb, folder, out) == ("backup", "/var/lib/penchant/prod", "--out")
    assert re.fullmatch(r"/var/backups/penchant/prod-\d{8}T\d{6}Z\.backup", where)
    assert (option, passphrase) == ("--passphrase-file", "/run/credentials/it/passphrase")
