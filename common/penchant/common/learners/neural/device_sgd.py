"""DP-SGD on one person's device, with Opacus: what leaves is private for each interaction, whoever looks.

    each of `steps` steps:  g = Σ clip(∇ loss(sample), C) + N(0, (σC)² I),   w ← w − lr · g / divisor

A sample is one positive with its negatives, clipped once as a group. A step takes each interaction by a coin of its
own (probability `rate`), negatives come from the whole public catalogue with hits allowed, and rate, steps, lr and
divisor are public constants, so nothing but the noisy g depends on the history, not even its length. The first
`min_history − 1` interactions are left out, so that a history too short takes part with noise alone and one more
interaction still means at most one more sample; a threshold that let them all in at once would not. The person's
vector starts from the released weights, like all others, and is inside what is clipped and noised. Interaction by
interaction this is a sampled Gaussian for each step. Noise comes from `privacy/noise.py`, under a
key from the person's stream: torch's CPU generator keeps 32 bits of its seed, few enough to try them all against the
rows that no gradient reached. Gradients, their norms and their sum are float32, which may carry a sum past its
sensitivity in the fourth digit; the noise is wider by 1/1000 to cover that.

Sources: Abadi et al. 2016, https://arxiv.org/abs/1607.00133, Algorithm 1; ghost clipping: Li et al. 2022,
https://arxiv.org/abs/2110.05679, and its Opacus form, https://opacus.ai.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor

from penchant.common.arrays import Arrays
from penchant.common.interactions import History
from penchant.common.learners.neural.local import LocalTraining
from penchant.common.learners.neural.models import InterestModel, group_loss
from penchant.common.privacy.noise import KEY_BYTES, Noise
from penchant.common.privacy.plan import DeviceNoise

_FLOAT32_MARGIN = 1.001


class DeviceSgd:
    """Trains one person's copy at a time; the wrapped model is reused, its weights are not.

    Args:
        model: reads one interaction in a sample.
        noise: what decides the guarantee.
        local: `lr` and `negatives` are read; epochs and batch are not, as `noise` fixes steps and rate.
    """

    def __init__(self, model: InterestModel, noise: DeviceNoise, local: LocalTraining) -> None:
        self._noise, self._local, self._n_items = noise, local, model.n_items
        self._private = model.private
        own = copy.deepcopy(model)  # its hooks would break scoring
        self._module = _GhostClipping(own, max_grad_norm=noise.clip_norm, use_ghost_clipping=True, loss_reduction="sum")

    def train(self, weights: dict[str, Tensor], history: History, random: np.random.Generator) -> Arrays:
        """The trained minus the received shared weights, noise included.

        Args:
            random: the person's stream. Noise has a child of it (`spawn`), so that no draw that depends on the history
                moves it; another call with the same object gets other noise.
        """
        module, noise = self._module, self._noise
        parameters = dict(module._module.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
        where = next(iter(weights.values())).device
        optimizer = _Optimizer(
            torch.optim.SGD(parameters.values(), lr=self._local.lr / noise.divisor),
            noise_multiplier=noise.noise_multiplier,
            max_grad_norm=noise.clip_norm,
            expected_batch_size=None,
            loss_reduction="sum",
            noise=Noise(random.spawn(1)[0].bytes(KEY_BYTES)),
        )
        module.train()
        items = history.items[noise.min_history - 1 :]
        for _ in range(noise.steps):
            chosen = items[random.random(len(items)) < noise.rate]
            optimizer.zero_grad()
            if len(chosen):
                self._backward(optimizer, chosen, random, where)
            else:  # an empty draw is an ordinary step: noise alone
                for parameter in parameters.values():
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        return {
            name: (parameter.detach() - weights[name]).cpu().numpy()
            for name, parameter in parameters.items()
            if name not in self._private
        }

    def _backward(
        self,
        optimizer: DPOptimizerFastGradientClipping,
        chosen: np.ndarray[tuple[int], np.dtype[np.int32]],
        random: np.random.Generator,
        where: torch.device,
    ) -> None:
        drawn = random.integers(0, self._n_items, (len(chosen), self._local.negatives))
        candidates = torch.from_numpy(np.column_stack([chosen, drawn]).astype(np.int64)).to(where)  # [B, 1 + k]
        losses = group_loss(self._module(candidates[:, :0], candidates))  # [B]
        DPTensorFastGradientClipping(self._module, optimizer, losses, "sum").backward()


class _GhostClipping(GradSampleModuleFastGradientClipping):  # type: ignore[misc]  # opacus ships no types
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


class _Optimizer(DPOptimizerFastGradientClipping):  # type: ignore[misc]  # opacus ships no types
    """Opacus's optimizer with noise from a stream cipher, and what it sums in float32 made fit for that noise."""

    def __init__(self, *args: Any, noise: Noise, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._noise = noise

    def add_noise(self) -> None:
        stddev = self.noise_multiplier * self.max_grad_norm * _FLOAT32_MARGIN
        params: list[Any] = self.params
        for p in params:
            noised = self._noise.add(p.summed_grad.cpu().numpy().astype(np.float64), stddev)
            p.grad = torch.from_numpy(noised.astype(np.float32)).to(p.device)
