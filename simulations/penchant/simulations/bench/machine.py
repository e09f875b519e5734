"""What this process takes of the machine, and what the machine could do: times, memory, a float32 ceiling.

The ceiling is a roofline's flat part: the most multiplications and additions a second that torch's own matrix product
reaches here, on all cores at once. Work made of smaller operations may have a ceiling above or below it.

Source: Williams, Waterman and Patterson 2009, Roofline, https://doi.org/10.1145/1498765.1498785.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_IMPORTED = time.perf_counter()


def seconds_since_start() -> float:
    """Of this process, the interpreter's own start included; without /proc, since this module was imported.

    To the system's clock tick, usually 0.01 s.
    """
    try:
        started = int(_stat("self")[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):
        return time.perf_counter() - _IMPORTED


def peak_rss_mb() -> float:
    """Most memory this process held, with what each process below it held at its most, in MiB.

    Pages that processes share count once for each, and pages of a mapped file count while they are in memory.
    Not `getrusage` where there is /proc: its peak is also that of whoever started the process.
    """
    try:
        return sum(_high_water_kib(process) for process in ("self", *_descendants())) / 1024
    except OSError:
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _high_water_kib(process: str) -> int:
    try:
        status = (_PROC / process / "status").read_text()
    except OSError:
        if process == "self":
            raise
        return 0  # it ended
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), 0)


def _descendants() -> Iterator[str]:
    children: defaultdict[str, list[str]] = defaultdict(list)
    for folder in _PROC.glob("[0-9]*"):
        try:
            children[_stat(folder.name)[1]].append(folder.name)
        except OSError:  # it ended
            continue
    below = children[str(os.getpid())]
    while below:
        process = below.pop()
        below += children[process]
        yield process


def _stat(process: str) -> list[str]:
    """Fields of /proc/PROCESS/stat from the third on; the second is a name that may hold anything."""
    return (_PROC / process / "stat").read_text().rpartition(")")[2].split()


def cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_gflops(where: str, *, sizes: tuple[int, ...] = (512, 1024, 2048), seconds: float = 0.2) -> float:
    """The best float32 matrix product of torch on this device, in GFLOP/s; on the processor with every core.

    Args:
        sizes: n of the n × n products tried.
        seconds: for each.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(cpus())
    try:
        return max(_product_gflops(torch.ones(n, n, device=where), seconds) for n in sizes)
    finally:
        torch.set_num_threads(before)


def _product_gflops(square: object, seconds: float) -> float:
    import torch

    assert isinstance(square, torch.Tensor)
    out, best, until = torch.empty_like(square), float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < until:
        start = time.perf_counter()
        torch.mm(square, square, out=out)
        if square.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * len(square) ** 3 / best / 1e9


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    found = {"python": platform.python_version()}
    for name in ("penchant", "numpy", "torch", "numba", "flwr"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
