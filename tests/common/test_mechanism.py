"""The mechanism as a whole, seen from outside: clip, sum, noise and charge together give the δ(ε) that is claimed.

One number, two neighbouring worlds (one person more), many releases through `PrivateSum`. Of all events that could tell
the worlds apart, the sharpest are half-lines, as the ratio of two shifted Gaussians is monotone (Neyman and Pearson):
    δ(ε) = max over t of  P[x > t] − e^ε P'[x > t]
and an empirical maximum over t that passes the claim by more than chance shows that the claim is false.
Source: Barthe and Olmedo 2013, hockey-stick divergence; DP-Auditorium (Google) tests mechanisms in the same way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from penchant.common.privacy import accounting, gaussian
from penchant.common.privacy.events import Gaussian, PoissonGaussian
from penchant.common.privacy.ledger import Ledger
from penchant.common.privacy.noise import Noise
from penchant.common.privacy.plan import PrivacyPlan, SumSpec
from penchant.common.privacy.sampling import draw
from penchant.common.privacy.sums import PrivateSum, clip
from penchant.common.streams import Streams

Vector = npt.NDArray[Any]
N = 400_000  # numbers in one release: as many releases of one number, since noise is independent
CLIP, SIGMA = 0.5, 1.3
FALSE_ALARM = 1e-7


def releases(present: bool, key: str, source: type[Noise] = Noise) -> Vector:
    """N releases of one number, with or without a person who says far more than the clip allows."""
    spec = SumSpec(name="sum", rounds=1, clip_norm=CLIP, noise_multiplier=SIGMA)
    total = PrivateSum({"a": (N,)}, spec)
    if present:
        total._total["a"] += clip({"a": np.array(100.0)}, CLIP)["a"]  # at every number at once
    receipt = Ledger("test", delta=1e-5).charge(1, Gaussian(noise_multiplier=SIGMA))
    return total.release(source(Streams(0).key(key)), receipt)["a"].astype(np.float64)


def breaks(claim: float, epsilon: float, absent: Vector, present: Vector) -> bool:
    """Whether these samples disprove δ(ε) ≤ claim; a true claim is called false for fewer than 1 key in 1e7.

    Thresholds are fixed beforehand. P̂ − e^ε P̂' at one of them strays from its mean by z standard errors of its two
    independent binomials; z makes room for all thresholds and both directions (Bonferroni).
    """
    thresholds = np.linspace(-4, 4, 33) * SIGMA * CLIP
    z = stats.norm.isf(FALSE_ALARM / (2 * len(thresholds)))
    for side in (1, -1):
        for t in thresholds:
            p, q = float((side * present > t).mean()), float((side * absent > t).mean())
            for a, b in ((p, q), (q, p)):
                spread = np.sqrt((a * (1 - a) + np.exp(2 * epsilon) * b * (1 - b)) / N)
                if a - np.exp(epsilon) * b > claim + z * spread + 1e-6:
                    return True
    return False


class Quiet(Noise):
    """Half of the noise that was asked for."""

    def add(self, total: Vector, stddev: float) -> Vector:
        return super().add(total, stddev / 2)


@pytest.mark.parametrize("epsilon", [0.0, 0.25, 0.5, 1.0, 2.0])
def test_a_release_keeps_its_delta_at_every_epsilon_and_half_the_noise_does_not(epsilon: float) -> None:
    claim = gaussian.delta_of(epsilon, 1 / SIGMA)
    absent, present = releases(False, "absent"), releases(True, "present")
    assert not breaks(claim, epsilon, absent, present)
    assert breaks(claim, epsilon, releases(False, "absent", Quiet), releases(True, "present", Quiet))
    if claim > 0.01:  # and the claim is no larger than it has to be: a fifth less is disproved
        assert breaks(0.8 * claim, epsilon, absent, present)


def test_a_sampled_release_keeps_what_the_accountant_says_and_one_without_coins_does_not() -> None:
    # Number i of the release is the sum that person i may be in, by the coin that the sampler tosses for person i.
    sums = (SumSpec(name="sum", rounds=1, clip_norm=CLIP, noise_multiplier=SIGMA),)
    plan = PrivacyPlan(
        unit="user", n_users=N, delta=1e-9, sampling="poisson", cohort=N // 2, sums=sums, max_participations=1
    )
    drawn = draw(plan, 1, 0, np.zeros(N, np.int64), Streams(7))
    event = plan.event(1)
    assert event is not None
    assert event == PoissonGaussian(noise_multiplier=SIGMA, rate=0.5)
    claim = 0.05
    epsilon = accounting.epsilon([event], claim).epsilon
    absent, sampled = releases(False, "absent"), releases(False, "sampled")
    sampled[drawn] += CLIP
    assert not breaks(claim, epsilon, absent, sampled)
    assert breaks(claim, epsilon, absent, releases(True, "present"))  # in every round: no coin, no amplification
