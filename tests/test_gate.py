"""The gate as its users meet it: from a script, from a page, and when somebody compares what cannot be compared."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import given, settings as examples
from hypothesis import strategies as st
from test_judges import judging

from llmops.foundation.artifacts import seal, resolve_source
from llmops.decision.gate import VOLATILE_FILES, GateParams, run_gate
from llmops.decision.gate_checks import check_figure
from llmops.decision.gate_report import describe_check
from llmops.judging.human import KIND, HumanParams, run_human
from llmops.foundation.evaluations import read_evaluation
from llmops.evaluation.tiny_versions import tiny_evaluations
from llmops.foundation.stats import EvaluationError
from llmops.judging.labels import FACTS, read_pairs
from llmops.judging.votes import open_study, rater_state, record_vote


def changed(name: str, to: Path, rewrite: Any) -> Path:
    "A copy of a tiny evaluation with other contents, sealed anew as far as its sizes go."
    folder = Path(shutil.copytree(tiny_evaluations() / name, to))
    manifest = json.loads((folder / "manifest.json").read_text())
    rewrite(folder)
    for file in manifest["files"]:
        manifest["files"][file]["bytes"] = (folder / file).stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def settings(folder: Path, **values: Any) -> None:
    scores = json.loads((folder / "scores.json").read_text())
    scores["protocol"] |= values
    (folder / "scores.json").write_text(json.dumps(scores))


def predictions(folder: Path, change: Any) -> None:
    rows = [change(json.loads(line)) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def params(tmp: Path, **values: Any) -> GateParams:
    return GateParams(**{"out": str(tmp / "gate"), "history": "", "wandb": "disabled", "resamples": 199, **values})


@pytest.mark.parametrize(
    "values, word",
    [
        ({"max_new_tokens": 99}, "max_new_tokens"),
        ({"rows_digest": "other"}, "rows_digest"),
        ({"decoding": "sampled"}, "decoding"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, values: dict[str, Any], word: str) -> None:
    other = changed("qlora", tmp_path / "other", lambda f: settings(f, **values))
    with pytest.raises(EvaluationError, match=word):
        run_gate(params(tmp_path, current=str(other)))
    assert not (tmp_path / "gate").exists()


def test_a_missing_score_is_no_zero(tmp_path: Path) -> None:
    other = changed("qlora", tmp_path / "other", lambda f: predictions(f, lambda r: r | {"f1": float("nan")}))
    found = run_gate(params(tmp_path, current=str(other), margins={"f1": 0.05, "exact_match": 1.0}))
    assert (found.verdict, [c.outcome for c in found.checks]) == ("hold", ["missing", "pass"])
    assert "a missing score is no zero" in found.reasons[0]


def test_a_figure_that_was_not_measured_holds(tmp_path: Path) -> None:
    other = changed("qlora", tmp_path / "other", lambda f: (f / "metrics.json").write_text("{}"))
    found = run_gate(params(tmp_path, candidate=str(other), margins={"decode_tokens_per_second": 0.1}))
    assert (found.verdict, found.checks[0].outcome) == ("hold", "missing")


def test_every_verdict_has_its_exit_code(tmp_path: Path) -> None:
    def right(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"f1": 1.0, "exact_match": True, "prediction": row["gold"]}

    better = changed("qlora", tmp_path / "better", lambda f: predictions(f, right))
    notebook = ROOT / "nbs/06_decision/07_gate.ipynb"
    said = {}
    for name, (candidate, current, min_rows) in {
        "ship": (better, better, 5),
        "reject": ("tiny:qlora", better, 5),
        "hold": (better, better, 500),
    }.items():
        out = tmp_path / name
        subprocess.run(
            [
                sys.executable,
                "-m",
                "papermill",
                "--engine",
                "llmops",
                str(notebook),
                str(tmp_path / f"{name}.ipynb"),
                "-p",
                "candidate",
                str(candidate),
                "-p",
                "current",
                str(current),
                "-p",
                "out",
                str(out),
                "-p",
                "history",
                str(tmp_path / "history.jsonl"),
                "-p",
                "wandb",
                "disabled",
                "-p",
                "min_rows",
                str(min_rows),
                "-y",
                "margins: {f1: 0.05, exact_match: 0.05}",
            ],
            check=True,
            cwd=ROOT,
            capture_output=True,
        )
        done = subprocess.run(
            [sys.executable, "-m", "llmops.decision.gate", str(out)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.startswith(name.upper()), done.stdout + done.stderr
        said[name] = done.returncode
        assert f"<h1 class={name}>" in (out / "report.html").read_text()
    assert said == {"ship": 0, "hold": 3, "reject": 4}
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 3
    nowhere = subprocess.run(
        [sys.executable, "-m", "llmops.decision.gate", str(tmp_path / "nowhere")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert nowhere.returncode == 1 and "not an artifact" in nowhere.stderr and "Traceback" not in nowhere.stderr


def test_the_same_gate_has_the_same_digest(tmp_path: Path) -> None:
    digests = []
    for n in range(2):
        made = run_gate(params(tmp_path, out=str(tmp_path / str(n))))
        digests.append(
            seal(
                made.work, tmp_path / str(n), "gate", "llmops.decision.gate", {}, made.inputs, volatile=VOLATILE_FILES
            )["digest"]
        )
    assert digests[0] == digests[1]


def oracle(prefers: set[str]) -> Any:
    "A judge who agrees with people about which sentence is true to its source, and prefers certain answers."
    true = {r.response for r in read_pairs(resolve_source(FACTS)) if r.label}

    def script(body: dict[str, Any], n: int) -> dict[str, str]:
        shown = json.loads(body["messages"][1]["content"])
        good = [shown[side] in (prefers if "reference answer" in shown else true) for side in "AB"]
        return {"verdict": "tie" if good[0] == good[1] else "A" if good[0] else "B"}

    return script


def judged(tmp: Path, url: str, **values: Any) -> Any:
    return run_gate(
        params(
            tmp,
            **{
                "margins": {"f1": 1.0, "judge preferred": 0.1},
                "judge_url": url,
                "judge_model": "scripted",
                "resamples": 999,
            }
            | values,
        )
    )


def test_a_judge_that_agrees_with_people_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {p["prediction"] for p in read_evaluation(tiny_evaluations() / "qlora").predictions}
    with judging(oracle(mine), monkeypatch, tmp_path) as judge:
        found = judged(tmp_path, judge.endpoint.base_url)  # the judge prefers the version in service
        assert (found.verdict, found.checks[1].outcome) == ("reject", "worse"), found.reasons
        assert found.checks[1].candidate is not None and found.checks[1].candidate < 0.2
        asked = len(judge.bodies)
        turned = judged(tmp_path, judge.endpoint.base_url, candidate="tiny:qlora", current="tiny:qlora-merged-base")
        assert (turned.verdict, len(judge.bodies)) == ("ship", asked)  # and is not asked the same again


def test_a_weak_judge_informs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first(body: dict[str, Any], n: int) -> dict[str, str]:
        "Prefers the version in service, and of two sentences the one that it sees first."
        shown = json.loads(body["messages"][1]["content"])
        return oracle(mine)(body, n) if "reference answer" in shown else {"verdict": "A"}

    mine = {p["prediction"] for p in read_evaluation(tiny_evaluations() / "qlora").predictions}
    with judging(first, monkeypatch, tmp_path) as judge:
        found = judged(tmp_path, judge.endpoint.base_url)
        assert (found.verdict, found.checks[1].outcome) == ("ship", "worse")  # it sees a loss, and is not believed
        assert "does not decide: its judge agrees with people by a kappa of 0.00" in found.reasons[-1]


def test_a_judge_that_is_down_or_talks_nonsense_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with judging(lambda body, n: "I like both.", monkeypatch, tmp_path) as judge:
        nonsense = judged(tmp_path, judge.endpoint.base_url)
    down = judged(tmp_path, judge.endpoint.base_url)  # its server has ended
    for found in (nonsense, down):
        assert (found.verdict, found.checks[1].outcome, found.checks[1].candidate) == ("hold", "missing", None)
        assert "a missing score is no zero" in found.reasons[0]


def study(tmp: Path, values: dict[str, Any], prefers: str) -> str:
    "A rating study of two tiny versions in which everybody prefers one of them."
    cfg = HumanParams(out=str(tmp / "human"), wandb="disabled", resamples=100, comparisons=40, **values)

    def made() -> None:
        done = run_human(cfg)
        seal(done.work, cfg.out, KIND, "llmops.judging.human", {}, done.inputs, done.metrics)

    made()
    texts = {p["prediction"] for p in read_evaluation(tiny_evaluations() / prefers).predictions}
    with open_study(cfg.out) as (opened, _):
        for rater in cfg.raters:
            while task := rater_state(opened, rater)["task"]:
                choice = 3 if task["kind"] == "grade" else "A" if task["answers"][0] in texts else "B"
                record_vote(
                    opened,
                    {
                        "vote": f"{rater}{rater_state(opened, rater)['done']}",
                        "rater": rater,
                        "task": task["task"],
                        "choice": choice,
                    },
                )
    made()
    return cfg.out


def test_people_decide(tmp_path: Path) -> None:
    rated = study(tmp_path, {"evaluations": ["tiny:qlora", "tiny:qlora-merged-base"], "grades": 12}, "qlora")
    asked = {"people": rated, "margins": {"people preferred": 0.1}, "resamples": 999}
    assert run_gate(params(tmp_path, **asked)).verdict == "reject"
    assert (
        run_gate(params(tmp_path, **asked, candidate="tiny:qlora", current="tiny:qlora-merged-base")).verdict == "ship"
    )
    graded = run_gate(params(tmp_path, people=rated, margins={"people grade": 0.5}, min_rows=2))
    assert graded.checks[0].candidate == 3.0, graded.reasons  # nobody gave anything else
    with pytest.raises(EvaluationError, match="not about these answers of base"):
        run_gate(params(tmp_path, **asked, current="tiny:base"))


def test_a_study_without_votes_is_refused(tmp_path: Path) -> None:
    cfg = HumanParams(
        out=str(tmp_path / "human"), wandb="disabled", evaluations=["tiny:qlora", "tiny:qlora-merged-base"]
    )
    made = run_human(cfg)
    seal(made.work, cfg.out, KIND, "llmops.judging.human", {}, made.inputs, made.metrics)
    with pytest.raises(EvaluationError, match="nobody has voted"):
        run_gate(params(tmp_path, people=cfg.out, margins={"people preferred": 0.1}))


FIGURES = st.sampled_from([0.0, -0.0]) | st.floats(0, 1e12, allow_subnormal=False)


@given(name=st.sampled_from(["size_mb", "decode_tokens_per_second"]), candidate=FIGURES, current=FIGURES)
@examples(derandomize=True, deadline=None, max_examples=100)
def test_every_figure_that_was_measured_is_compared(name: str, candidate: float, current: float) -> None:
    check = check_figure(name, candidate, current, 0.1)
    worse = candidate > current if name == "size_mb" else candidate < current
    assert check.outcome in ("pass", "worse") and "no such figure" not in describe_check(check)
    assert worse or check.outcome == "pass"
    assert not worse or current or check.outcome == "worse"  # of 0 there is no share that may be lost
    json.dumps(check.difference, allow_nan=False)
