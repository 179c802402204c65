"""The gate's report for who decides: its words follow from the figures for every verdict, its digest does not depend on the day,
and a phone can show it."""

import html
import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browsing import browser_page, keep_picture
from hypothesis import given, settings as examples
from hypothesis import strategies as st

from llmops.decision import gate
from llmops.decision.comparison import Check, CheckOptions, check_scores, decide_outcomes
from llmops.decision.gate import KIND, VOLATILE_FILES, GateParams, run_gate, show_verdict
from llmops.decision.gate_checks import check_figure
from llmops.decision.gate_report import Report, decide_verdict, report_page
from llmops.decision.gate_summary import about_answers, deciding_checks, next_step, summarize_verdict, title_of
from llmops.decision.regressions import remember_case
from llmops.evaluation.tiny_versions import tiny_evaluations
from llmops.foundation.artifacts import seal
from llmops.foundation.evaluations import read_evaluation

F1 = Check("f1", 0.05, 232, 0.316, 0.312, -0.005, -0.043, 0.033, 0.42, 1.0, 0.057, 305, "pass")
LATENCY = Check("latency seconds", 0.05, 30, 0.570, 0.775, -0.205, -0.293, -0.146, 0.001, 0.001, 0.109, 143, "worse")
SIZE = check_figure("size_mb", 118.768, 538.09, 0.0)
PERPLEXITY = check_figure("perplexity", 46.993, 37.237, 0.2)
COST = check_figure("cost_per_1000_answers", 0.02153, 0.01585, 0.1)
UNSURE = replace(F1, low=-0.07, required_rows=700, outcome="inconclusive")
CASE = {
    "id": "7",
    "question": "When?",
    "answer": "1900",
    "prediction": "1901",
    "why": "a date made up",
    "passed": False,
}


def report(
    checks: Sequence[Check], informs: dict[str, str] | None = None, cases: Sequence[dict[str, Any]] = ()
) -> Report:
    "The report of some checks."
    informs = informs or {}
    verdict, reasons = decide_verdict(checks, informs, cases, "USD")
    sentence = summarize_verdict(verdict, checks, informs, cases, "USD")
    step = next_step(verdict, checks, informs, cases, ("new", "old"), "USD")
    facts = {"Candidate": "new (digest 0123456789ab)", "Decided": "2026-11-22 18:47 UTC", "Machine": "Linux, 2 CPUs"}
    return Report(verdict, sentence, step, reasons, checks, informs, cases, facts, "USD")


@pytest.mark.parametrize(
    ("checks", "informs", "cases", "verdict", "sentence", "step"),
    [
        (
            [F1, SIZE],
            {},
            [],
            "ship",
            "Ship: all 2 checks that decide stayed within what was allowed. Size fell by 78%.",
            "Put new into service, and keep old to go back to.",
        ),
        (
            [F1, PERPLEXITY],
            {},
            [],
            "reject",
            "Do not ship: perplexity rose by 26%, 20% was allowed. Answers themselves stayed within their margins "
            "(F1 0.312, was 0.316).",
            "Keep old in service. The next version has to bring perplexity to at most 44.7 (now 47.0). Then evaluate it "
            "and run the gate again.",
        ),
        (
            [replace(F1, difference=0.004, candidate=0.32), COST],
            {},
            [],
            "reject",
            "Do not ship: cost of 1,000 answers rose by 36%, 10% was allowed. Answers themselves did not get worse "
            "(F1 0.320, was 0.316).",
            "Keep old in service. The next version has to bring cost of 1,000 answers to at most 0.0174 USD (now 0.0215 "
            "USD). Then evaluate it and run the gate again.",
        ),
        (
            [UNSURE, SIZE],
            {},
            [],
            "hold",
            "Do not ship yet: F1 fell from 0.316 to 0.312 (a fall of 0.07 cannot be ruled out, 0.05 was allowed).",
            "Keep old in service for now, and ask about 700 questions for F1 (232 were asked). Then run the gate again.",
        ),
        (
            [F1, PERPLEXITY],
            {"f1": "", "perplexity": ""},
            [],
            "hold",
            "Do not ship yet: no check decides, so nothing was shown.",
            "Keep old in service for now, and let at least one check decide: take it out of `informs`. Then run the "
            "gate again.",
        ),
        (
            [F1],
            {},
            [CASE],
            "reject",
            "Do not ship: the question 'When?' is answered wrong again. Answers themselves stayed within their margins "
            "(F1 0.312, was 0.316).",
            "Keep old in service. The next version has to answer 'When?' right. Then evaluate it and run the gate again.",
        ),
    ],
    ids=["ship", "a figure rejects", "a cost rejects", "too few questions hold", "nothing decides", "a case rejects"],
)
def test_the_words_follow_from_the_figures(
    checks: list[Check],
    informs: dict[str, str],
    cases: list[dict[str, Any]],
    verdict: str,
    sentence: str,
    step: str,
) -> None:
    made = report(checks, informs, cases)
    assert (made.verdict, made.sentence, made.next_step) == (verdict, sentence, step)


SCORES = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=12)
FIGURES = st.floats(0.001, 1e6)


@given(
    scores=st.dictionaries(st.sampled_from(["f1", "exact_match", "latency seconds", "safety harmful"]), SCORES),
    figures=st.dictionaries(
        st.sampled_from(["size_mb", "decode_tokens_per_second", "perplexity"]), st.tuples(FIGURES, FIGURES)
    ),
    margin=st.sampled_from([0.0, 0.05, 0.3]),
    informs=st.sets(st.sampled_from(["f1", "size_mb", "latency seconds"])),
    failed=st.booleans(),
)
@examples(derandomize=True, deadline=None, max_examples=60)
def test_no_sentence_says_what_the_checks_do_not(
    scores: dict[str, list[tuple[float, float]]],
    figures: dict[str, tuple[float, float]],
    margin: float,
    informs: set[str],
    failed: bool,
) -> None:
    options = CheckOptions(min_rows=4, resamples=100)
    made = [check_figure(name, new, old, margin) for name, (new, old) in figures.items()]
    for name, pairs in scores.items():
        new, old = map(list, zip(*pairs, strict=True))
        made.append(check_scores(name, new, old, margin, name != "f1" and name != "exact_match", options))
    checks = decide_outcomes(made)
    informing = {name: "" for name in informs if name in {check.name for check in checks}}
    shown = report(checks, informing, [CASE] if failed else [])
    begins = {"ship": "Ship: ", "hold": "Do not ship yet: ", "reject": "Do not ship: "}
    assert shown.sentence.startswith(begins[shown.verdict])
    deciding = deciding_checks(checks, informing)
    against = [check for check in deciding if check.outcome != "pass"]
    named = [check for check in deciding if check.outcome == "worse"] if shown.verdict == "reject" else against
    for check in named[: 2 if failed else 3]:
        assert title_of(check.name) in shown.sentence
    answers = about_answers(deciding)
    if "Answers themselves" in shown.sentence:
        assert answers and all(check.outcome == "pass" for check in answers)
        assert "did not get worse" not in shown.sentence or all((c.difference or 0) >= 0 for c in answers)
    in_sight = re.sub(r"<details>.*?</details>", "", report_page(shown), flags=re.S)
    for check in checks:
        row = f"<td data-label='check'>{html.escape(title_of(check.name))}<"
        decides = check in against or (not against and not failed and check.name not in informing)
        assert (row in in_sight) == decides, check.name


def test_two_numbers_never_look_equal_when_they_are_not() -> None:
    close = check_figure("perplexity", 120.04, 100.0, 0.2)
    assert "rose by 20.04%, 20.00% was allowed" in report([close]).sentence


def gated(folder: Path, **values: Any) -> dict[str, Any]:
    "The manifest of a gate that was run and sealed."
    cfg = GateParams(out=str(folder), history="", wandb="disabled", resamples=199, currency="USD", **values)
    made = run_gate(cfg)
    return seal(made.work, folder, KIND, "llmops.decision.gate", cfg, made.inputs, volatile=VOLATILE_FILES)


def test_the_digest_does_not_depend_on_the_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digests = []
    for day in ("2026-11-22 18:47 UTC", "2031-01-01 00:00 UTC"):
        monkeypatch.setattr(gate, "decided_at", lambda day=day: day)
        folder = tmp_path / day[:4]
        digests.append(gated(folder)["digest"])
        assert f"<dt>Decided<dd>{day}" in (folder / "report.html").read_text()
        show_verdict(str(folder))
        assert f"\nDecided: {day}\n" in capsys.readouterr().out
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ({"current": "tiny:qlora-merged-base"}, "ship"),
        ({"min_rows": 500, "margins": {"f1": 0.05}}, "hold"),
        ({"margins": {"f1": 1.0}}, "reject"),
    ],
    ids=["ship", "hold", "reject"],
)
def test_the_stage_writes_the_words_that_it_prints(
    values: dict[str, Any], verdict: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if verdict == "reject":  # a tiny random model answers the question of a case wrong again
        asked = tiny_evaluations() / "qlora"
        remember_case(asked, read_evaluation(asked).predictions[0]["id"], "made up", tmp_path / "cases.jsonl")
        values = values | {"cases": str(tmp_path / "cases.jsonl")}
    gated(tmp_path / "gate", **values)
    found = json.loads((tmp_path / "gate/verdict.json").read_text())
    assert found["verdict"] == verdict, found["sentence"]
    page = (tmp_path / "gate/report.html").read_text()
    show_verdict(str(tmp_path / "gate"))
    printed = capsys.readouterr().out
    for text in (found["sentence"], found["next"], *found["facts"].values()):
        assert html.escape(text) in page and text in printed
    assert "<script" not in page


@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_it_at_a_desk_and_on_a_phone(width: int, tmp_path: Path) -> None:
    informing = {"size_mb": "the parameters say so"}
    pages = {"reject": [F1, SIZE, PERPLEXITY, LATENCY, COST], "hold": [UNSURE, SIZE], "ship": [F1, SIZE]}
    with browser_page() as (page, problems):
        page.set_viewport_size({"width": width, "height": 900})
        for name, checks in pages.items():
            file = tmp_path / f"{name}.html"
            file.write_text(report_page(report(checks, informing)))
            page.goto(file.as_uri())
            heading = page.locator("h1")
            assert heading.inner_text().upper().startswith(name.upper())
            assert float(heading.evaluate("e => parseFloat(getComputedStyle(e).fontSize)")) >= 20
            overflow = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
            assert not page.evaluate(overflow), f"{name} at {width}: wider than the screen"
            row = page.locator(".decision tbody tr").first
            assert row.is_visible() and row.bounding_box()["width"] <= width  # type: ignore[index]
            assert not page.get_by_text("size: the parameters say so").is_visible()
            page.get_by_text("What only informs").click()
            assert page.get_by_text("size: the parameters say so").is_visible()
            page.get_by_text("How sure this is").click()
            assert not page.evaluate(overflow), f"{name} at {width}, opened: wider than the screen"
            if "TOUR" in os.environ:
                page.reload()
                keep_picture(page, f"gate-{name}-{width}", full_page=True)
        assert not problems, problems
