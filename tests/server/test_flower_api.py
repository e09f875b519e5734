"""What the server side relies on in Flower that is private there, held against a real SuperLink."""

from __future__ import annotations

import inspect
import secrets
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app.metadata import Metadata
from flwr.common.constant import ErrorCode
from flwr.superlink.grid.http_grid import HttpGrid

from penchant.common.errors import Unreachable, UntrustedArtifact
from penchant.server import _flower
from penchant.server._flower import Control
from tests.processes import free_port, within
from tests.system.superlink import Server, certificates


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("superlink")
    certificates(folder)
    (folder / "sx.secret").write_bytes(secrets.token_bytes(32))
    (folder / "sx.secret").chmod(0o600)
    made = Server(folder, free_port())
    try:
        made.superlink()
        yield made
    finally:
        for program in list(made.processes):
            made.kill(program)


@pytest.fixture
def control(superlink: Server) -> Iterator[Control]:
    with Control(superlink.address, (superlink.folder / "ca.crt").read_bytes()) as made:
        yield made


def a_key() -> bytes:
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def test_flower_is_the_version_that_this_was_held_against() -> None:
    assert version("flwr") == "1.41.0"


def test_a_device_is_let_in_once_under_one_number_and_out_for_ever(control: Control) -> None:
    key = a_key()
    number = control.register(key)
    assert control.register(key) == number  # as after a lost answer
    assert [(node.id, node.key) for node in control.nodes() if node.key == key] == [(number, key)]
    control.unregister(number)
    control.unregister(number)
    assert key not in [node.key for node in control.nodes()]
    with pytest.raises(UntrustedArtifact):
        control.register(key)


def test_numbers_are_64_bits_without_a_sign(control: Control) -> None:
    numbers = [control.register(a_key()) for _ in range(8)]
    assert all(0 < number < 1 << 64 for number in numbers)
    assert max(numbers) >= 1 << 63  # all eight below it: one time in 256


def test_a_run_of_a_folder_without_code_is_taken_seen_and_stopped(control: Control, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "rounds"\nversion = "1.0.0"\ndescription = ""\nlicense = "Apache-2.0"\ndependencies = []\n'
        '[tool.flwr.app]\npublisher = "films"\n[tool.flwr.app.components]\nserverapp = "penchant.server.app:app"\n'
        'clientapp = "penchant.client._flower:client_app"\n[tool.flwr.app.config]\n'
    )
    run = control.start(tmp_path)
    assert control.status(run) in ("pending", "starting")  # no SuperExec is there to take it
    control.stop(run)
    within(10, "the run is stopped", lambda: control.status(run) == "stopped")
    assert control.status(run + 1) == ""


def test_a_superlink_that_is_away_is_said_to_be(superlink: Server) -> None:
    with Control(f"127.0.0.1:{free_port()}", (superlink.folder / "ca.crt").read_bytes()) as nowhere:
        began = time.monotonic()
        with pytest.raises(Unreachable):
            nowhere.nodes()
        assert time.monotonic() - began < 30


def test_the_grid_can_be_bounded_and_orders_can_be_given_a_time() -> None:
    grid = HttpGrid(token="a token")
    assert grid._retry_invoker.max_time is None  # for ever, as Flower has it
    _flower._bound(grid, 5.0)
    assert grid._retry_invoker.max_time == 5.0
    assert isinstance(inspect.getattr_static(Metadata, "ttl"), property)


def test_error_codes_mean_what_they_are_counted_as() -> None:
    assert (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE) == (3, 4, 5)
