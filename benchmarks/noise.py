"""How fast production noise is beside NumPy's Gaussian generator, in one run: python benchmarks/noise.py

Medians of interleaved repetitions on one core; a ratio of 1 means as fast as `np.random.default_rng().standard_normal`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from penchant.common.privacy.noise import Noise


def measure(size: int, repeat: int) -> dict[str, float]:
    """Median nanoseconds per number of each way."""
    noise, numpy, total = Noise.from_os(), np.random.default_rng(), np.zeros(size)
    ways: dict[str, Callable[[], object]] = {
        "numpy standard_normal": lambda: numpy.standard_normal(size),
        "penchant normal": lambda: noise.normal((size,)),
        "numpy sum + noise": lambda: total + 1.5 * numpy.standard_normal(size),
        "penchant sum + noise, on its grid": lambda: noise.add(total, 1.5),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeat + 1):  # the first warms up
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e9 * statistics.median(times[1:]) / size for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Production noise beside NumPy's.")
    parser.add_argument("--size", type=int, default=1 << 21, help="numbers in one draw")
    parser.add_argument("--repeat", type=int, default=15)
    args = parser.parse_args()
    found = measure(args.size, args.repeat)
    base = found["numpy standard_normal"]
    for name, nanoseconds in found.items():
        print(f"{name:36} {nanoseconds:7.2f} ns   {base / nanoseconds:5.2f} of NumPy's speed")


if __name__ == "__main__":
    main()
