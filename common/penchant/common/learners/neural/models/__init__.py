"""The PyTorch models that FedAvg can train, by name.

mf, mlp, neumf                       the person is a vector of their own; any privacy unit
gru, lstm, cnn-lstm, transformer     the person is their history; user-level privacy only
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from penchant.common.config import did_you_mean
from penchant.common.errors import InvalidConfig
from penchant.common.learners.neural.models.base import InterestModel, group_loss, pad
from penchant.common.learners.neural.models.conv_lstm import ConvLstm
from penchant.common.learners.neural.models.mf import MF
from penchant.common.learners.neural.models.mlp import MLP
from penchant.common.learners.neural.models.neumf import NeuMF
from penchant.common.learners.neural.models.recurrent import Recurrent
from penchant.common.learners.neural.models.sequence import Dropout, SequenceModel, untied
from penchant.common.learners.neural.models.transformer import Transformer
from penchant.common.learners.training import DIM, OPTIONS, Option

__all__ = [
    "MF",
    "MLP",
    "MODELS",
    "ConvLstm",
    "Dropout",
    "InterestModel",
    "ModelConfig",
    "NeuMF",
    "Recipe",
    "Recurrent",
    "SequenceModel",
    "Transformer",
    "all_scores",
    "build",
    "group_loss",
    "pad",
    "reads_history",
    "seeded",
    "untied",
]

_STREAM = threading.Lock()


@dataclass(frozen=True)
class Recipe:
    """How to make a model.

    Attributes:
        make: the model's class, or a `functools.partial` of it; takes n_items and every option by keyword.
        options: the options it has, with its defaults; every model has `dim` and, read or not, `max_length`.
    """

    make: Callable[..., InterestModel]
    options: Mapping[str, Option]


MODELS: dict[str, Recipe] = {
    "mf": Recipe(MF, OPTIONS["mf"]),
    "mlp": Recipe(MLP, OPTIONS["mlp"]),
    "neumf": Recipe(NeuMF, OPTIONS["neumf"]),
    "gru": Recipe(partial(Recurrent, kind="gru"), OPTIONS["gru"]),
    "lstm": Recipe(partial(Recurrent, kind="lstm"), OPTIONS["lstm"]),
    "cnn-lstm": Recipe(ConvLstm, OPTIONS["cnn-lstm"]),
    "transformer": Recipe(Transformer, OPTIONS["transformer"]),
}


def reads_history(name: str) -> bool:
    """Whether a training sample of the model reads other interactions of the person, by a key of `MODELS`.

    >>> reads_history("mf"), reads_history("gru")
    (False, True)
    """
    make = MODELS[name].make
    model: Any = make.func if isinstance(make, partial) else make
    return bool(model.reads_history)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and its size. Public: it says nothing about anyone.

    An option left at None takes the model's default; one that the model does not have is refused.

    Attributes:
        name: a key of `MODELS`.
        dim: size of an item vector, ≥ 1.
        layers: recurrent cells or attention blocks on top of each other, ≥ 1.
        heads: attention patterns in each block, a divisor of dim.
        max_length: most recent items of a history that are read, ≥ 1. Models that read no history ignore it.
        dropout: share hidden in training, in [0, 1).
        hidden: width of the inner layer, ≥ 1: MLP's, NeuMF's first (even), the recurrent state, a feed-forward.
    """

    name: str
    dim: int | None = None
    layers: int | None = None
    heads: int | None = None
    max_length: int | None = None
    dropout: float | None = None
    hidden: int | None = None

    def __post_init__(self) -> None:
        if self.name not in MODELS:
            raise InvalidConfig(f"unknown model {self.name!r}{did_you_mean(self.name.lower(), MODELS)}")
        for option in ("dim", "layers", "heads", "max_length", "dropout", "hidden"):
            value = getattr(self, option)
            if value is None:
                continue
            if option not in {"dim", "max_length", *MODELS[self.name].options}:
                raise InvalidConfig(f"{self.name} has no option {option!r}")
            if option == "dropout":
                if not 0 <= value < 1:  # also refuses NaN
                    raise InvalidConfig(f"dropout must be in [0, 1), not {value}")
            elif not isinstance(value, int) or value < 1:
                raise InvalidConfig(f"{option} must be a whole number ≥ 1, not {value}")
        options = self.options
        if options["dim"] % options.get("heads", 1):
            raise InvalidConfig(f"heads must divide dim; {options['heads']} does not divide {options['dim']}")
        if self.name == "neumf" and options["hidden"] % 2:
            raise InvalidConfig(f"hidden must be even for neumf, not {options['hidden']}")

    @property
    def options(self) -> dict[str, Option]:
        """Every option of the model, with its defaults filled in.

        >>> ModelConfig(name="neumf", dim=8).options
        {'dim': 8, 'hidden': 32}
        """
        defaults = {"dim": DIM, **MODELS[self.name].options}
        chosen = {name: getattr(self, name) for name in defaults}
        return {name: defaults[name] if value is None else value for name, value in chosen.items()}


@contextmanager
def seeded(seed: int, where: torch.device | None = None) -> Iterator[None]:
    """Initial weights and dropout draw from here: the one stream that torch has, for one thread at a time.

    Args:
        where: the device whose stream is meant, beside the processor's.
    """
    cuda = [where] if where is not None and where.type == "cuda" else []
    with _STREAM, torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every accelerator
        for device in cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def build(config: ModelConfig, n_items: int, seed: int) -> InterestModel:
    """The model with initial weights that depend on the config, `n_items` and the seed only.

    Guarantees:
        The program's own random state and default device neither matter nor change.

    Raises:
        InvalidConfig: an empty catalogue.
    """
    if n_items < 1:
        raise InvalidConfig(f"n_items must be ≥ 1, not {n_items}")
    with seeded(seed), torch.device("cpu"):
        return MODELS[config.name].make(n_items, **config.options)


def all_scores(model: InterestModel, history: Tensor) -> Tensor:
    """Logits float32[B, n_items] for int64[B, L], as on a device: nothing dropped out, no gradients kept."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model.score_all(history)
    finally:
        model.train(training)
