"""Text metrics against the libraries that define them, on 1,000 random cases each, and what they cost."""

import importlib.util
import math
import random
import time
import unicodedata

import numpy as np
import pytest
from conftest import limit
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sklearn.calibration import calibration_curve
from sklearn.metrics.pairwise import cosine_similarity

from llmops.foundation.artifacts import package_file
from llmops.foundation.answers import squad_exact_match, squad_f1
from llmops.foundation.stats import EvaluationError
from llmops.evaluation.calibration import assign_bins, calibration_report
from llmops.foundation.textscores import rouge_scores, sentence_chrf
from llmops.evaluation.texts import (
    corpus_scores,
    cosine_similarities,
    perplexity_scores,
    score_texts,
    sentence_bleu,
)

ENGLISH = [
    "the",
    "a",
    "The",
    "tower",
    "Tower.",
    "10th-century",
    "1,200",
    "o'clock",
    "it's",
    "(north)",
    "and",
    "_x_",
    "$5",
    "U.S.",
    "\n",
    "cat",
    "cats",
]
KOREAN = ["서울은", "서울", "수도이다", "수도", "대한민국의", "한국", "1988년", "올림픽", ".", "東京", "ソウル"]


def pairs(words: list[str], seed: int, cases: int = 1000) -> list[tuple[str, str]]:
    "Random predictions and golds that share some of their words; a few are empty or equal."
    some = random.Random(seed)
    golds = [" ".join(some.choices(words, k=some.randint(1, 12))) for _ in range(cases)]
    keep = [" ".join(w if some.random() < 0.7 else some.choice(words) for w in g.split()) for g in golds]
    return [
        ("" if i % 97 == 0 else g if i % 31 == 0 else k, g) for i, (k, g) in enumerate(zip(keep, golds, strict=True))
    ]


def test_the_squad_figures_are_the_squad_script_s() -> None:
    "The official functions, as lm-eval carries them; what SQuAD 2.0 adds for unanswerable questions is tested in the notebook."
    spec = importlib.util.spec_from_file_location("squad", package_file("lm_eval", "tasks/qasper/metrics.py"))
    assert spec and spec.loader
    squad = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(squad)
    cases = [
        (p, g)
        for seed in (9, 10)
        for words in (ENGLISH, KOREAN)
        for p, g in pairs(words, seed, 400)
        if squad.normalize_answer(p) and squad.normalize_answer(g)
    ]
    assert len(cases) > 1000
    for p, g in cases:
        assert squad_f1(p, g) == pytest.approx(squad.f1_abstractive([p], [g]), abs=1e-6), (p, g)
        assert squad_exact_match(p, g) == (squad.normalize_answer(p) == squad.normalize_answer(g)), (p, g)


def test_rouge_is_the_library_s_on_english() -> None:
    reference = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for p, g in pairs(ENGLISH, 1):
        expected = {k: s.fmeasure for k, s in reference.score(g, p).items()}
        assert rouge_scores(p, g) == pytest.approx(expected, abs=1e-6), (p, g)


def test_rouge_sees_korean_where_the_library_sees_nothing() -> None:
    reference, cases = RougeScorer(["rouge1"]), pairs(KOREAN, 2)
    assert np.mean([reference.score(g, p)["rouge1"].fmeasure > 0 for p, g in cases]) < 0.6  # only digits are left
    letters = lambda text: {c for c in text if c.isalnum()}  # noqa: E731
    for p, g in cases:
        assert (rouge_scores(p, g)["rouge1"] > 0) == bool(letters(p) & letters(g)), (p, g)
        assert rouge_scores(unicodedata.normalize("NFD", p), g) == rouge_scores(p, g)


@pytest.mark.parametrize(("words", "tokenize"), [(ENGLISH, "13a"), (KOREAN, "char"), (KOREAN, "intl")])
def test_bleu_and_chrf_are_sacrebleu_s(words: list[str], tokenize: str) -> None:
    cases = pairs(words, 3)
    for p, g in cases:
        assert sentence_bleu(p, g, tokenize) * 100 == pytest.approx(
            sacrebleu.sentence_bleu(p, [g], tokenize=tokenize).score, abs=1e-6
        )
        assert sentence_chrf(p, g) * 100 == pytest.approx(sacrebleu.sentence_chrf(p, [g]).score, abs=1e-6)
    said, golds = [p for p, _ in cases], [g for _, g in cases]
    found = corpus_scores(said, [[gold] for gold in golds], tokenize)
    assert found["corpus_bleu"] * 100 == pytest.approx(
        sacrebleu.corpus_bleu(said, [golds], tokenize=tokenize).score, abs=1e-6
    )
    assert found["corpus_chrf"] * 100 == pytest.approx(sacrebleu.corpus_chrf(said, [golds]).score, abs=1e-6)
    others = golds[1:] + golds[:1]
    found = corpus_scores(said, [list(texts) for texts in zip(golds, others, strict=True)], tokenize)
    assert found["corpus_chrf"] * 100 == pytest.approx(sacrebleu.corpus_chrf(said, [golds, others]).score, abs=1e-6)


def test_similarity_is_scikit_learn_s_cosine() -> None:
    rng = np.random.default_rng(4)
    known = {f"text {i}": rng.normal(size=16) for i in range(500)}
    some = random.Random(4)
    said, golds = some.choices(list(known), k=1000), some.choices(list(known), k=1000)
    asked: list[str] = []

    def encode(texts: list[str]) -> np.ndarray:
        asked.extend(texts)
        return np.stack([known[t] for t in texts])

    expected = [cosine_similarity([known[p]], [known[g]])[0, 0] for p, g in zip(said, golds, strict=True)]
    assert cosine_similarities(said, golds, encode) == pytest.approx(expected, abs=1e-6)
    assert len(asked) == len(set(asked)) == len(set(said + golds))  # each text once


def ece_as_defined(p: np.ndarray, right: np.ndarray, bins: int) -> float:
    "Guo et al. 2017, equations 2 to 4, one bin after the other: ((m-1)/M, m/M]."
    total = 0.0
    for m in range(1, bins + 1):
        low, high = np.linspace(0, 1, bins + 1)[m - 1 : m + 1]
        inside = (p > low) & (p <= high) | ((p == 0) & (m == 1))
        if inside.any():
            total += inside.sum() / len(p) * abs(right[inside].mean() - p[inside].mean())
    return total


def test_calibration_is_the_definition_and_scikit_learn_s() -> None:
    rng = np.random.default_rng(5)
    for _ in range(1000):
        n, bins = int(rng.integers(1, 60)), int(rng.integers(1, 20))
        p = rng.choice([rng.random(n), np.round(rng.random(n), 1)])  # edges too
        right = (rng.random(n) < p).astype(float)
        found = calibration_report(p, right, bins, draws=1)
        assert found["ece"] == pytest.approx(ece_as_defined(p, right, bins), abs=1e-6)
        accuracy, confidence = calibration_curve(right, p, n_bins=bins)
        assert [r["accuracy"] for r in found["table"]] == pytest.approx(list(accuracy), abs=1e-6)
        assert [r["confidence"] for r in found["table"]] == pytest.approx(list(confidence), abs=1e-6)
        assert sum(r["answers"] for r in found["table"]) == n
    assert (assign_bins(np.array([0.0, 1.0]), 5) == [0, 4]).all()


def test_a_calibrated_model_stays_within_chance() -> None:
    rng = np.random.default_rng(6)
    above = 0
    for i in range(200):
        p = rng.random(60)
        found = calibration_report(p, rng.random(60) < p, seed=i, draws=199)
        above += found["ece"] > found["ece_by_chance"]
    assert 2 <= above <= 22  # 5% of 200 is 10


def test_perplexity_and_bits_per_byte_are_lm_eval_s() -> None:
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity

    rng = np.random.default_rng(7)
    for _ in range(1000):
        logprobs = [list(-rng.random(int(rng.integers(1, 30))) * 9) for _ in range(int(rng.integers(1, 6)))]
        texts = ["".join(random.Random(int(rng.integers(1e9))).choices("abé서 ", k=12)) for _ in logprobs]
        found = perplexity_scores(logprobs, texts)
        sums = [sum(x) for x in logprobs]
        assert found["perplexity"] == pytest.approx(
            weighted_perplexity(list(zip(sums, map(len, logprobs), strict=True))), rel=1e-6
        )
        size = [len(t.encode()) for t in texts]
        assert found["bits_per_byte"] == pytest.approx(bits_per_byte(list(zip(sums, size, strict=True))), rel=1e-6)


def test_many_rows_are_scored_in_seconds() -> None:
    rows = [{"id": i, "gold": g, "prediction": p} for i, (p, g) in enumerate(pairs(ENGLISH, 8))]
    start = time.perf_counter()
    scores, summary = score_texts(rows)
    assert time.perf_counter() - start < limit(20)
    assert len(scores) == summary["questions"] == 1000 and all(math.isfinite(v) for s in scores for v in s.values())
    assert score_texts(rows)[1] == summary


@pytest.mark.parametrize(
    "bad",
    [{"id": 1, "gold": "x"}, {"id": 1, "gold": "x", "prediction": float("nan")}, {"gold": "x", "prediction": "y"}],
)
def test_a_missing_answer_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(EvaluationError, match="row 2"):
        score_texts([{"id": 0, "gold": "x", "prediction": "y"}, bad])
