"""DP-SGD on one person's device, with Opacus: what leaves is private for each interaction, whoever looks.

    each of `steps` steps:  g = Σ clip(∇ loss(sample), C) + N(0, (σC)² I),   w ← w − lr · g / divisor

A sample is one positive with its negatives, clipped once as a group. A step takes each interaction by a coin of its
own (probability `rate`), negatives come from the whole public catalogue with hits allowed, and rate, steps, lr and
divisor are public constants, so nothing but the noisy g depends on the history, not even its length. The first
`min_history − 1` interactions are left out, so that a history too short takes part with noise alone and one more
interaction still means at most one more sample; a threshold that let them all in at once would not. The person's
vector starts from the released weights, like all others, and is inside what is clipped and noised. Interaction by
interaction this is a sampled Gaussian for each step.

Whoever sends the weights may be the one to hide from, so no weights may make one interaction count for more, or fail
the device. Each sample's gradient is materialised by Opacus and clipped by the norm of those very values, cut to the
grid of exact sums (`privacy/sums.py`); a gradient that is not finite counts as zero. Ghost clipping computes norms
without the gradients, but they cancel in float32: there are weights under which one interaction moved a step by five
times C. To keep the gradients small, tables are cut to the rows that a few samples touch.

Noise comes from `privacy/noise.py`, under a key from the person's stream: torch's CPU generator keeps 32 bits of its
seed, few enough to try them all against the rows that no gradient reached.

Source: Abadi et al. 2016, https://arxiv.org/abs/1607.00133, Algorithm 1; per-sample gradients: https://opacus.ai.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Set
from typing import Any

import numpy as np
import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from penchant.common.arrays import Arrays, Float64, Int64
from penchant.common.interactions import History
from penchant.common.learners.neural.models import InterestModel, group_loss
from penchant.common.learners.training import LocalTraining
from penchant.common.privacy import sums
from penchant.common.privacy.noise import KEY_BYTES, Noise
from penchant.common.privacy.plan import DeviceNoise

_CHUNK = 32  # samples whose gradients are held at once


class DeviceSgd:
    """Trains one person's copy at a time; the wrapped model is reused, its weights are not.

    Args:
        model: reads one interaction in a sample.
        noise: what decides the guarantee.
        local: `lr` and `negatives` are read; epochs and batch are not, as `noise` fixes steps and rate.
        frozen: names of weights that stay as they are: they get no noise, no part of the clip, and are not sent.
    """

    def __init__(
        self, model: InterestModel, noise: DeviceNoise, local: LocalTraining, frozen: Set[str] = frozenset()
    ) -> None:
        self._noise, self._local, self._n_items, self._frozen = noise, local, model.n_items, frozen
        self._private, self._tables = model.private, model.item_tables
        self._module = _PerSample(_cut(model, _CHUNK * (1 + local.negatives)), loss_reduction="sum")

    def train(self, weights: Mapping[str, Tensor], history: History, random: np.random.Generator) -> Arrays:
        """The trained minus the received shared weights, noise included.

        Args:
            random: the person's stream. Noise has a key from a child of it (`spawn`), so that no draw that depends on
                the history moves it; another call with the same object gets other noise.
        """
        rule, now, held = self._noise, dict(weights), {*self._private, *self._frozen}
        noise = Noise(random.spawn(1)[0].bytes(KEY_BYTES))
        items = history.items[rule.min_history - 1 :]
        for _ in range(rule.steps):
            chosen = items[random.random(len(items)) < rule.rate]
            for name, total in self._clipped_sum(now, chosen, random).items():
                noised = noise.add(total, rule.noise_multiplier * rule.clip_norm)
                step = torch.from_numpy((self._local.lr / rule.divisor * noised).astype(np.float32))
                now[name] = now[name] - step.to(now[name].device)
        return {name: (now[name] - weights[name]).cpu().numpy() for name in now if name not in held}

    def _clipped_sum(
        self, weights: Mapping[str, Tensor], chosen: np.ndarray[Any, Any], random: np.random.Generator
    ) -> dict[str, Float64]:
        """Σ clip(∇ loss(sample), C) over the chosen interactions, for every parameter that trains; zeros for none."""
        drawn = random.integers(0, self._n_items, (len(chosen), self._local.negatives))
        groups = np.column_stack([chosen, drawn]).astype(np.int64)  # [n, 1 + k]
        totals = {name: np.zeros(tuple(values.shape)) for name, values in weights.items() if name not in self._frozen}
        for start in range(0, len(groups), _CHUNK):
            rows, places = np.unique(groups[start : start + _CHUNK], return_inverse=True)
            samples = self._gradients(weights, rows, places.reshape(-1, groups.shape[1]))
            for name, part in _clip_each(samples, self._noise.clip_norm):
                if name in self._tables:
                    totals[name][rows] += part[: len(rows)]
                else:
                    totals[name] += part
        return totals

    def _gradients(self, weights: Mapping[str, Tensor], rows: Int64, places: Int64) -> dict[str, Tensor]:
        """The gradient of each group's loss, [B, …]; a table's first rows are `rows`, in which `places` are given."""
        parameters: dict[str, Any] = dict(self._module._module.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                if name in self._tables:
                    parameter[: len(rows)] = weights[name][torch.from_numpy(rows).to(weights[name].device)]
                else:
                    parameter.copy_(weights[name])
                parameter.grad_sample = None
        candidates = torch.from_numpy(places).to(next(iter(weights.values())).device)
        self._module.train()
        group_loss(self._module(candidates[:, :0], candidates)).sum().backward()  # type: ignore[no-untyped-call]  # torch's
        return {name: parameter.grad_sample for name, parameter in parameters.items() if name not in self._frozen}


def _clip_each(samples: Mapping[str, Tensor], bound: float) -> Iterator[tuple[str, Float64]]:
    """For each parameter the sum of its samples' gradients, each sample scaled, over all of them, to at most `bound`.

    Exact, as `sums.Clip` is: one sample more moves the sums by at most `bound`.
    """
    square = torch.zeros(len(next(iter(samples.values()))), dtype=torch.float64)
    for values in samples.values():
        square += (values.double() ** 2).flatten(1).sum(1).cpu()
    scale = torch.clamp(bound * sums.SAFETY / torch.sqrt(square), max=1.0)
    scale[~torch.isfinite(square)] = 0.0  # 0 · NaN is not 0: the values are cleared below
    for name, values in samples.items():
        wide = torch.nan_to_num(values.double(), nan=0.0, posinf=0.0, neginf=0.0).cpu().numpy()
        scaled = wide * scale.numpy().reshape(-1, *(1,) * (wide.ndim - 1))
        yield name, sums.on_grid(scaled, bound).sum(axis=0)


def _cut(model: InterestModel, n_rows: int) -> InterestModel:
    """A copy with tables of so many items."""
    shell = copy.copy(model)
    shell._modules = dict(model._modules)
    for name in model.item_tables:
        module, _, _ = name.rpartition(".")
        shell._modules[module] = None  # not copied: they may be large
    own = copy.deepcopy(shell)
    for name in model.item_tables:
        module, _, _ = name.rpartition(".")
        weight = model.get_parameter(name)
        own._modules[module] = nn.Embedding(n_rows, weight.shape[1], device=weight.device)
    return own


class _PerSample(GradSampleModule):  # type: ignore[misc]  # opacus ships no types
    """Opacus's wrapper, which hears of a layer's backward pass from the layer's output.

    Opacus uses torch's backward hooks of modules. They warn at an embedding, whose inputs are whole numbers without a
    gradient, and a filter against that would be the whole process's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for backward in self.autograd_grad_sample_hooks[1::2]:  # they alternate with forward hooks
            backward.remove()

    def capture_activations_hook(self, module: Any, forward_input: Any, _forward_output: Any) -> None:
        super().capture_activations_hook(module, forward_input, _forward_output)
        heard: Any = self.capture_backprops_hook
        if _forward_output.requires_grad:
            _forward_output.register_hook(lambda g: heard(module, None, (g,), loss_reduction="sum", batch_first=True))
