"""Tasks other than short answers: labels and texts, from the data to the gate; and the embedded task as it always was."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from sklearn.metrics import f1_score

from llmops.adaptation.finetuning import KIND as TUNED
from llmops.adaptation.finetuning import FinetuningParams, run_finetuning
from llmops.decision.comparison import CheckOptions, check_macro_f1
from llmops.decision.gate import GateParams, run_gate
from llmops.decision.leaderboard import LeaderboardParams, run_leaderboard
from llmops.decision.regressions import remember_case
from llmops.evaluation.metrics import KIND, MetricsParams, run_metrics
from llmops.evaluation.scorecard import ScorecardParams, run_scorecard
from llmops.foundation.answers import score_answers, summarize_scores
from llmops.foundation.artifacts import json_digest, seal
from llmops.foundation.checkpoints import model_path
from llmops.foundation.datasets import KIND as DATASET
from llmops.foundation.datasets import DatasetsParams, dataset_path, read_questions, read_split, run_datasets
from llmops.foundation.datasets import read_sources, split_questions
from llmops.foundation.evaluations import read_evaluation
from llmops.foundation.generation import encode_prompt
from llmops.foundation.models import load_tokenizer
from llmops.foundation.project import ParamError, read_params
from llmops.foundation.prompts import INSTRUCTION, TASKS, build_prompt
from llmops.foundation.reading import DataError
from llmops.foundation.tasks import Asked, read_asked, score_predictions, summarize_predictions
from llmops.foundation.textscores import label_cells, macro_f1, resample_macro_f1, swap_macro_f1

QUICK: dict[str, Any] = {
    "kl_questions": 2,
    "perplexity_texts": 1,
    "perplexity_max_length": 16,
    "speed_prompts": 1,
    "speed_new_tokens": 2,
    "resamples": 199,
    "wandb": "disabled",
}


def profile(stage: str, **kw: Any) -> dict[str, Any]:
    "The parameters of a stage in the classification profile."
    return read_params(ROOT / f"params/{stage}.yaml") | read_params(ROOT / f"params/classification/{stage}.yaml") | kw


def rows_of(data: Path | str) -> list[dict[str, Any]]:
    return [row for split in ("train", "valid", "test") for row in read_split(data, split)]


# The embedded task is what it was before there were others


def test_the_embedded_prompts_are_the_same_to_the_letter() -> None:
    cfg = DatasetsParams(**read_params(ROOT / "params/data.yaml") | {"tokenizer": ""})
    splits, _, _ = split_questions(cfg, read_sources(cfg)[0], {})
    rows = [row for name in ("train", "valid", "test") for row in splits[name]]
    assert {name: len(split) for name, split in splits.items()} == {"train": 696, "valid": 72, "test": 232}
    assert (
        json_digest(sorted([row["id"], row["prompt"]] for row in rows))
        == "857fc847b3b086f480fa42454a7e75855835ee8aa7cc255586abf328a14f6717"
    )
    assert json_digest(rows) == "8fd0e2c9514bb3073d5b15a99e3da764e81c59a4edd286e164ba526e41682cae"


def test_the_embedded_tokens_are_the_same() -> None:
    tokenizer = load_tokenizer(model_path("tiny:llama"))
    ids = [[row["id"], encode_prompt(tokenizer, row["prompt"])] for row in rows_of("tiny:data")]
    assert json_digest(sorted(ids)) == "54e58c02a70713d26f13b762bd71b21f5579d48b3af7e7a37c780c2714ace1a3"


def test_the_embedded_task_leaves_the_same_files(tmp_path: Path) -> None:
    result = run_metrics(MetricsParams(**QUICK | {"questions": 6, "out": str(tmp_path / "made")}))
    rows = read_split("tiny:data", "test")[:6]
    plain = score_answers(rows, [p["prediction"] for p in result.predictions])
    added = ("probability", "prompt_tokens", "completion_tokens")
    expected = [p | {name: q[name] for name in added} for p, q in zip(plain, result.predictions, strict=True)]
    lines = (result.work / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.dumps(json.loads(line)) for line in lines] == [json.dumps(p) for p in expected]
    scores = json.loads((result.work / "scores.json").read_text())
    summary = summarize_scores(plain, 42, 199)
    assert {name: scores[name] for name in summary} == summary
    assert scores.keys() - summary.keys() == {
        "over_context",
        "tokens_per_request",
        "perplexity",
        "version",
        "kind",
        "size_mb",
        "refusal",
        "protocol",
    }
    assert scores["protocol"].keys() == {
        "split",
        "questions",
        "decoding",
        "max_new_tokens",
        "kl_questions",
        "perplexity_texts",
        "perplexity_max_length",
        "rows_digest",
        "texts_digest",
    }


# Labels


@pytest.fixture(scope="module")
def pubmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The dataset of the classification profile."
    return make_data(tmp_path_factory.mktemp("pubmed") / "data", **profile("data"))


def make_data(to: Path, **kw: Any) -> Path:
    cfg = DatasetsParams(**kw | {"out": str(to), "wandb": "disabled"})
    result = run_datasets(cfg)
    seal(result.work, cfg.out, DATASET, "llmops.foundation.datasets", cfg, result.inputs)
    return to


def evaluate(model: Path | str, version: str, data: Path, out: Path, **kw: Any) -> Path:
    cfg = MetricsParams(**QUICK | {"model": str(model), "version": version, "data": str(data), "out": str(out)} | kw)
    result = run_metrics(cfg)
    seal(result.work, cfg.out, KIND, "llmops.evaluation.metrics", cfg, result.inputs, result.metrics)
    return out


def tune(data: Path, out: Path) -> Path:
    values = profile("finetuning", method="lora", model="tiny:llama", data=str(data), out=str(out), wandb="disabled")
    cfg = FinetuningParams(**values | {"max_steps": 2, "eval_every": 1, "save_every": 1})
    result = run_finetuning(cfg)
    seal(result.work, cfg.out, TUNED["lora"], "llmops.adaptation.finetuning", cfg, result.inputs, result.metrics)
    return out


def test_a_classification_goes_from_the_data_to_the_gate(pubmed: Path, tmp_path: Path) -> None:
    asked = read_asked(pubmed)
    assert (asked.task.name, asked.labels, asked.refusal) == ("classification", ("yes", "no", "maybe"), "")
    rows = rows_of(pubmed)
    assert set(Counter(row["answer"] for row in rows)) == set(asked.labels) and all(row["answerable"] for row in rows)
    assert all(row["prompt"] == asked.prompt(row["passage"], row["question"]) for row in rows)
    assert "one of: yes, no, maybe." in rows[0]["prompt"][0]["content"]

    tuned = tune(pubmed, tmp_path / "lora")
    base = evaluate("tiny:llama", "base", pubmed, tmp_path / "evaluation/base")
    candidate = evaluate(tuned, "lora", pubmed, tmp_path / "evaluation/lora")
    evaluation = read_evaluation(candidate)
    scores = evaluation.scores
    assert not {"f1", "exact_match", "says_unknown"} & scores.keys()
    assert (scores["refusal"], scores["protocol"]["task"]) == ("", "classification")
    gold = [p["gold"] for p in evaluation.predictions]
    assert scores["accuracy"] == pytest.approx(np.mean([p["accuracy"] for p in evaluation.predictions]))
    assert scores["macro_f1"] == pytest.approx(macro_f1(gold, [p["label"] for p in evaluation.predictions]))
    assert scores["most_frequent"] == Counter(gold).most_common(1)[0][1] / len(gold)

    remember_case(base, evaluation.predictions[0]["id"], "a random model knows nothing", tmp_path / "cases.jsonl")
    values = profile("gate", candidate=str(candidate), current=str(base), cases=str(tmp_path / "cases.jsonl"))
    result = run_gate(GateParams(**values | {"out": str(tmp_path / "gate")}))
    checks = {check.name: check for check in result.checks}
    assert checks["accuracy"].rows == checks["macro_f1"].rows == len(gold)
    assert checks["macro_f1"].candidate == pytest.approx(scores["macro_f1"])
    assert checks["macro_f1"].low is not None and checks["macro_f1"].p is not None
    assert [case["prediction"] for case in result.report.cases] == [evaluation.predictions[0]["prediction"]]
    assert (result.work / "report.html").read_text(encoding="utf-8").count("macro_f1")

    with pytest.raises(ParamError, match="f1: no such metric; rows have accuracy"):
        run_gate(GateParams(**values | {"margins": {"f1": 0.1}, "informs": [], "out": str(tmp_path / "wrong")}))


def test_a_right_label_is_found_however_it_is_said(pubmed: Path) -> None:
    asked, rows = read_asked(pubmed), read_split(pubmed, "test")
    right = [f" {row['answer'].upper()}, as the abstract shows." for row in rows]
    scores = summarize_predictions(asked, score_predictions(asked, rows, right), resamples=199)
    assert (scores["accuracy"], scores["macro_f1"], scores["no_label"]) == (1, 1, 0)
    rambling = ["The abstract says " + row["answer"] for row in rows]
    assert summarize_predictions(asked, score_predictions(asked, rows, rambling), resamples=199)["no_label"] == 1


def test_macro_f1_is_that_of_scikit_learn() -> None:
    draw, labels = random.Random(7), ["a", "b", "c", "d"]
    for rows in (1, 5, 60):
        gold, said = ([draw.choice(values) for _ in range(rows)] for values in (labels, [*labels, "", "e"]))
        cells, counts = label_cells(gold, said)
        present = sorted(set(gold))
        expected = f1_score(gold, said, labels=present, average="macro", zero_division=0)
        assert macro_f1(gold, said) == pytest.approx(expected)
        samples = resample_macro_f1(cells, counts, resamples=50)
        assert samples.shape == (1, 50) and ((samples >= 0) & (samples <= 1)).all()


def test_the_bootstrap_of_counts_is_the_bootstrap_of_rows() -> None:
    "Mean and spread of macro-F1 over samples of counts are those over samples of rows."
    draw = random.Random(3)
    gold = [draw.choice("aaab") for _ in range(80)]
    said = [g if draw.random() < 0.7 else draw.choice("ab") for g in gold]
    counted = resample_macro_f1(*label_cells(gold, said), resamples=4000)[0]
    rng, rows = np.random.default_rng(1), np.arange(80)
    slow = []
    for _ in range(600):
        taken = rng.choice(rows, 80)
        slow.append(macro_f1([gold[i] for i in taken], [said[i] for i in taken]))
    assert counted.mean() == pytest.approx(np.mean(slow), abs=0.01)
    assert counted.std() == pytest.approx(np.std(slow), rel=0.12)


def test_the_swap_test_is_exact_where_all_swaps_can_be_tried() -> None:
    gold, new, old = list("aabbab"), list("abbaab"), list("aabbbb")
    differing = [i for i in range(6) if new[i] != old[i]]
    seen, exact = macro_f1(gold, new) - macro_f1(gold, old), []
    for pattern in range(2 ** len(differing)):
        first, second = list(new), list(old)
        for bit, i in enumerate(differing):
            if pattern >> bit & 1:
                first[i], second[i] = second[i], first[i]
        exact.append(macro_f1(gold, first) - macro_f1(gold, second))
    chance = swap_macro_f1(*label_cells(gold, new, old), resamples=8000)
    assert (chance <= seen + 1e-12).mean() == pytest.approx(np.mean(np.array(exact) <= seen + 1e-12), abs=0.02)


@pytest.mark.parametrize(("lost", "outcome"), [(0.0, False), (0.35, True)])
def test_a_loss_in_a_rare_label_is_seen(lost: float, outcome: bool) -> None:
    draw = random.Random(5)
    gold = [draw.choice(["yes"] * 4 + ["maybe"]) for _ in range(400)]
    new = ["yes" if g == "maybe" and draw.random() < lost else g for g in gold]
    check = check_macro_f1("macro_f1", gold, new, gold, 0.01, CheckOptions(resamples=999))
    assert (check.p is not None and check.p < 0.05) == outcome


# Texts


def test_a_summary_goes_through_the_same_stages(tmp_path: Path) -> None:
    file = tmp_path / "news.jsonl"
    lines = []
    for n in range(40):
        text = f"In village {n} the old mill number {n} was opened again on day {n} of the fair, said the mayor of place {n}."
        lines.append(json.dumps({"document": text, "summary": f"Mill {n} is open again."}))
    file.write_text("\n".join(lines), encoding="utf-8")
    data = make_data(
        tmp_path / "data",
        data=str(file),
        task="summarization",
        passage_field="document",
        question_field="",
        answer_field="summary",
        instruction="Summarize the text in one sentence.",
        near_duplicate=0.99,
        test=0.3,
        valid=0.2,
        general_train=8,
        general_test=2,
    )
    row = read_split(data, "test")[0]
    assert row["prompt"][1]["content"] == row["passage"] and row["question"] == ""
    base = evaluate("tiny:llama", "base", data, tmp_path / "evaluation/base")
    tuned = evaluate(tune(data, tmp_path / "lora"), "lora", data, tmp_path / "evaluation/lora")
    scores = read_evaluation(base).scores
    assert {"rougeL", "rougeL_low", "rouge1", "chrf"} <= scores.keys() and "f1" not in scores
    margins = {"rougeL": 0.05, "chrf": 0.05, "size_mb": 1.0}
    result = run_gate(
        GateParams(
            candidate=str(tuned), current=str(base), margins=margins, resamples=199, history="", out=str(tmp_path / "g")
        )
    )
    assert {c.name for c in result.checks if c.low is not None} == {"rougeL", "chrf"}


def test_the_best_of_several_texts_counts() -> None:
    asked = Asked(TASKS["summarization"], "Summarize.", "passage", refusal="")
    row = {
        "id": "1",
        "question": "",
        "answer": "The mill is old.",
        "answers": ["The mill is old.", "It was built long ago."],
    }
    [scored] = score_predictions(asked, [row], ["It was built long ago."])
    assert (scored["rougeL"], scored["answers"]) == (1.0, row["answers"])


def test_questions_without_a_passage_are_asked_alone() -> None:
    prompt = build_prompt("", "Who built it?", "Answer in a few words.", TASKS["closed_book"].template)
    assert prompt[1]["content"] == "Who built it?"


# Parameters


def pubmed_params(**kw: Any) -> DatasetsParams:
    return DatasetsParams(**profile("data", limit=20, **kw))


def test_the_parameters_of_a_task_change_what_is_asked() -> None:
    asked = [
        read_questions(pubmed_params(**kw))[0]
        for kw in ({}, {"labels": ["maybe", "no", "yes", "perhaps"]}, {"task": "open_ended", "labels": []})
    ]
    assert asked[0] == asked[1] and [row["answer"] for row in asked[2]] == [row["answer"] for row in asked[0]]
    for kw, shown in (
        ({"template": "question-passage"}, "{question}\n\n{passage}"),
        ({"template": "Text: {passage}\nAsked: {question}\nVerdict:"}, "Text: {passage}\nAsked: {question}\nVerdict:"),
    ):
        cfg = pubmed_params(**kw)
        row = split_questions(cfg, read_questions(cfg)[0], {})[0]["train"][0]
        assert row["prompt"][1]["content"] == shown.format(passage=row["passage"], question=row["question"])


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"labels": []}, r"labels: name what an answer may be; .* have yes \(\d+\), no \(\d+\)"),
        ({"labels": ["yes", "no"]}, "expected one of yes, no, got 'maybe'"),
        ({"labels": [True, False]}, r"labels\.0: .*valid string"),
        ({"labels": ["yes", "YES"]}, "'YES' is empty, or the same"),
        ({"task": "extractive"}, "labels: the answers of extractive have none"),
        ({"template": ""}, "leaves the question out"),
        ({"template": "answer"}, "none of passage-question, question-passage"),
        ({"question_field": ""}, "shows the question, and .* have none"),
        ({"instruction": INSTRUCTION}, "write what classification asks for"),
    ],
)
def test_what_does_not_fit_a_task_is_refused_by_name(kw: dict[str, Any], message: str) -> None:
    with pytest.raises((DataError, ParamError), match=message):
        read_questions(pubmed_params(**kw))


def test_the_default_of_a_dataset_is_the_embedded_task() -> None:
    assert read_asked(dataset_path("tiny:data")) == Asked()


def test_the_leaderboard_ranks_labels(pubmed: Path, tmp_path: Path) -> None:
    tuned = tune(pubmed, tmp_path / "lora")
    for model, version in (("tiny:llama", "base"), (tuned, "qlora")):
        evaluate(model, version, pubmed, tmp_path / f"evaluation/{version}")
    board = run_leaderboard(
        LeaderboardParams(evaluations=str(tmp_path / "evaluation"), resamples=199, out=str(tmp_path / "board"))
    )
    first, *others = board.rows
    assert first["version"] == "most-frequent-label" and {r["version"] for r in others} == {"base", "qlora"}
    assert all({"accuracy", "macro_f1", "delta_accuracy"} <= row.keys() and "f1" not in row for row in board.rows)
    page = (board.work / "leaderboard.md").read_text(encoding="utf-8")
    assert "macro-F1 (95%)" in page and "Δaccuracy to base (95%)" in page and ", accuracy 0." in page
    assert json.loads((board.work / "headline.json").read_text())["base"].keys() >= {"accuracy", "macro_f1"}


def test_found_passages_are_for_questions_about_passages(pubmed: Path) -> None:
    with pytest.raises(ParamError, match="retrieved: .* is a dataset of classification"):
        run_finetuning(FinetuningParams(data=str(pubmed), retrieved="runs/retrieval"))


def test_a_scorecard_of_labels_has_their_scores(pubmed: Path, tmp_path: Path) -> None:
    evaluation = evaluate("tiny:llama", "base", pubmed, tmp_path / "evaluation", questions=4)
    nothing_else = {"tasks": [], "requests": 0, "sentences": 0, "ragas": [], "timed": 1, "robust_questions": 1}
    card = run_scorecard(ScorecardParams(evaluation=str(evaluation), out=str(tmp_path / "card"), **nothing_else))
    answers = [row["scores"] for row in card.rows if row["suite"] == "answers"]
    assert [set(scores) for scores in answers] == [{"accuracy", "probability"}] * 4
    assert card.card["suites"]["answers"].keys() >= {"accuracy", "macro_f1", "calibration"}
    [robust] = [row["scores"] for row in card.rows if row["suite"] == "robustness"]
    assert "accuracy" in robust and "f1" not in robust
