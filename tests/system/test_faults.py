"""A real server lives through each fault of faults.py with every invariant true. All of them: make test-all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.faults import ALL, Fault, Seen, seen
from tests.system.site import Site


@contextlib.contextmanager
def a_site(path: Path) -> Iterator[Site]:
    made = Site(path / "prod")
    try:
        made.await_round(1)
        yield made
    finally:
        made.close()


def failed(site: Site, faults: list[Fault]) -> list[Seen]:
    """Those after which an invariant did not hold."""
    found = [seen(site, fault) for fault in faults]
    for one in found:
        print(f"{one.fault.group}: {one.fault.name} ({one.seconds:.0f} s): {one.observed}; {one.figures}")
    if wrong := [one for one in found if not one.holds]:
        print(site.logs())
        return wrong
    return []


def test_a_server_lives_through_a_fault_of_each_kind(tmp_path: Path) -> None:
    with a_site(tmp_path) as site:
        assert not failed(site, [fault for fault in ALL if fault.quick])


@pytest.mark.slow
@pytest.mark.parametrize("group", dict.fromkeys(fault.group for fault in ALL))
def test_a_server_lives_through_every_fault(group: str, tmp_path: Path) -> None:
    with a_site(tmp_path) as site:
        assert not failed(site, [fault for fault in ALL if fault.group == group])
