"""Learners by name, built from plain JSON types, so that a plan can name one and a device can find it.

Modules are loaded when asked for: a device that does not train neural models never imports torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from penchant.common import config
from penchant.common.catalogue import Catalogue
from penchant.common.config import did_you_mean
from penchant.common.errors import InvalidConfig, MissingExtra
from penchant.common.learners.contract import Learner

_LEARNERS = {
    "als": ("penchant.common.learners.als", "Als", "AlsConfig"),
    "cooccurrence": ("penchant.common.learners.cooccurrence", "Cooccurrence", "CooccurrenceConfig"),
    "fedavg": ("penchant.common.learners.neural.fedavg", "FedAvg", "FedAvgConfig"),
    "neural-strengths": ("penchant.common.learners.neural.strengths", "NeuralStrengths", "NeuralStrengthsConfig"),
    "strengths": ("penchant.common.learners.strengths", "Strengths", "StrengthsConfig"),
}


def build(name: str, settings: Mapping[str, Any], catalogue: Catalogue, **runtime: Any) -> Learner:
    """The learner of this name.

    Args:
        settings: its config as `config.encode` gives it; missing keys take their defaults.
        runtime: what decides speed and not the result, such as where="cuda".

    Raises:
        InvalidConfig: an unknown name, key or value.
        MissingExtra: the learner needs an optional dependency.
    """
    learner, settings_type = _classes(name)
    options = runtime if name == "fedavg" else {}
    made: Learner = learner(catalogue, config.decode(settings_type, settings), **options)
    return made


def checked(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The whole settings of this learner as `config.encode` gives them: what `settings` lacks takes its default.

    Raises:
        InvalidConfig, MissingExtra: as `build` does.
    """
    return config.encode(config.decode(_classes(name)[1], settings))


def is_neural(name: str) -> bool:
    """Whether the learner of this name trains with PyTorch; of a name that is not known, no."""
    return _LEARNERS.get(name, ("",))[0].startswith("penchant.common.learners.neural.")


def _classes(name: str) -> tuple[Any, type[Any]]:
    """The learner's class and its settings'."""
    if name not in _LEARNERS:
        raise InvalidConfig(f"unknown learner {name!r}{did_you_mean(name, _LEARNERS)}")
    module_name, learner, settings_type = _LEARNERS[name]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise MissingExtra("train", str(error.name)) from None
    return getattr(module, learner), getattr(module, settings_type)
