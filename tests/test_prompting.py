"""A way of asking is chosen on validation, kept, evaluated, compared, and passes the gate like any version."""

import json

import pytest
from conftest import ROOT

from llmops.adaptation.prompting import PromptingParams, run_prompting
from llmops.decision.gate import GateParams, run_gate
from llmops.decision.leaderboard import LeaderboardParams, run_leaderboard
from llmops.decision.regressions import remember_case
from llmops.evaluation.metrics import MetricsParams, run_metrics
from llmops.evaluation.scorecard import ScorecardParams, run_scorecard
from llmops.evaluation.tiny_versions import tiny_evaluations
from llmops.foundation.artifacts import seal
from llmops.foundation.constraints import repair_spacing
from llmops.foundation.datasets import read_split
from llmops.foundation.evaluations import read_evaluation
from llmops.foundation.project import ParamError
from llmops.foundation.reading import DataError
from llmops.foundation.strategies import Strategy, read_strategy, strategy_rows
from llmops.foundation.tasks import Asked


def evaluate(out, **params):
    "Evaluate and seal, as the stage's notebook does, under the protocol of the tiny evaluations."
    told = json.loads((tiny_evaluations() / "base/manifest.json").read_text())["params"]
    told |= {"wandb": "disabled", "out": str(out), **params}
    cfg = MetricsParams(**told)
    result = run_metrics(cfg)
    seal(result.work, cfg.out, "evaluation", "llmops.evaluation.metrics", cfg, result.inputs, result.metrics)
    return read_evaluation(out)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompting")
    base = read_evaluation(tiny_evaluations() / "base")
    cfg = PromptingParams(
        model=str(base.model),
        questions=4,
        max_new_tokens=6,
        resamples=199,
        out=str(folder / "prompting"),
        wandb="disabled",
    )
    result = run_prompting(cfg)
    seal(result.work, cfg.out, "prompting", "llmops.adaptation.prompting", cfg, result.inputs, result.metrics)
    more = folder / "more"
    held = evaluate(
        more / "base-constrained",
        model=str(base.model),
        version="base-constrained",
        strategy=cfg.out,
        strategy_name="constrained",
    )
    return folder, result, base, held


def test_the_choice_is_the_best_on_validation_and_can_be_read_again(made):
    folder, result, _, _ = made
    assert result.chosen["f1"] == max(row["f1"] for row in result.table if row["beats_refusing"])
    kept = json.loads((folder / "prompting/scores.json").read_text())
    assert [row["strategy"] for row in kept["strategies"]] == [row["strategy"] for row in result.table]
    assert read_strategy(folder / "prompting", "few-shot-2-similar").shots == 2
    names = {row["strategy"] for row in result.table}
    assert {"zero-shot", "zero-shot-refusing", "constrained", "few-shot-2-random"} <= names
    few = [p for p in result.predictions if p["strategy"] == "few-shot-2-random"]
    zero = [p for p in result.predictions if p["strategy"] == "zero-shot"]
    assert all(a["prompt_tokens"] > b["prompt_tokens"] for a, b in zip(few, zero, strict=True))


def test_the_search_never_sees_the_test_questions(made):
    _, result, _, held = made
    assert not {p["id"] for p in result.predictions} & {p["id"] for p in held.predictions}


def test_constrained_answers_are_spans_and_compare_under_the_same_protocol(made):
    folder, _, base, held = made
    passages = {row["id"]: row["passage"] for row in read_split("tiny:data", "test")}
    for p in held.predictions:
        assert p["prediction"] == "unknown" or p["prediction"] in repair_spacing(passages[p["id"]]).text
    assert held.scores["protocol"] == base.scores["protocol"]
    assert held.scores["strategy"] == {"constrain": "spans"} and "strategy" not in base.scores
    assert read_strategy(held.path) == Strategy(constrain="spans")
    cfg = LeaderboardParams(more=str(folder / "more"), out=str(folder / "leaderboard"), resamples=199, wandb="disabled")
    rows = {row["version"]: row for row in run_leaderboard(cfg).rows}
    assert rows["base-constrained"]["f1"] == held.scores["f1"]


def test_it_passes_the_gate_as_a_candidate_and_its_cases_are_asked_in_its_way(made):
    folder, _, base, held = made
    cases = folder / "cases.jsonl"
    remember_case(base.path, base.predictions[0]["id"], "a tiny model knows nothing", cases)
    cfg = GateParams(
        candidate=str(held.path),
        current=str(base.path),
        cases=str(cases),
        history="",
        resamples=199,
        out=str(folder / "gate"),
        wandb="disabled",
    )
    [case] = run_gate(cfg).report.cases
    passage = json.loads(cases.read_text())["passage"]
    assert case["prediction"] == "unknown" or case["prediction"] in repair_spacing(passage).text


def test_suites_that_would_ask_in_another_way_refuse_it(made):
    _, _, _, held = made
    with pytest.raises(ParamError, match="asked with a strategy"):
        run_scorecard(ScorecardParams(evaluation=str(held.path), out=f"{held.path}-card", wandb="disabled"))


def test_what_is_wrong_is_said(made, tmp_path):
    folder, _, base, _ = made
    with pytest.raises(ParamError, match="strategy_name: prompting has no strategy 'spans'; it has best-prompt"):
        evaluate(tmp_path / "x", strategy=str(folder / "prompting"), strategy_name="spans")
    with pytest.raises(ParamError, match="holds no strategies.json"):
        evaluate(tmp_path / "x", strategy=str(base.path))
    with pytest.raises(ParamError, match="no labels"):
        evaluate(tmp_path / "x", constrain="labels")
    rows = read_split("tiny:data", "test")
    with pytest.raises(DataError, match="take them from the train split"):
        strategy_rows(Strategy(shots=1, examples=(rows[0],)), Asked(), rows)
    assert not (tmp_path / "x").exists()
    assert not list((ROOT / "runs").glob(".partial/x*"))
