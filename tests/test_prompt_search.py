"""Prompt search with DSPy: what it scores is what the project sends, seeds and budgets hold, and errors have names.

The model is a rule: it answers when the instruction asks for one word, or when an example shows how."""

import json
import math
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from test_packaging import settings

from llmops.adaptation import prompt_search
from llmops.adaptation.prompt_search import (
    Prompt,
    SearchResult,
    check_unseen,
    f1_metric,
    import_dspy,
    prompt_from,
    score_prompt,
    search_prompt,
)
from llmops.foundation.chat import Messages
from llmops.foundation.console import captured_output
from llmops.foundation.decoding import DataError
from llmops.foundation.generation import PromptTooLong
from llmops.foundation.project import ParamError
from llmops.foundation.prompts import DEFAULT_TEMPLATE, INSTRUCTION
from llmops.foundation.rowfiles import Row
from llmops.foundation.stats import EvaluationError

NAMES = ["Ann", "Bo", "Cy", "Di", "Eve", "Flo", "Gus", "Hal"]
CITIES = ["Oslo", "Rome", "Lima", "Bern", "Kyiv", "Nice", "Cork", "Graz"]
ROWS: list[Row] = [
    {"passage": f"{name} lives in {city}.", "question": f"Where does {name} live?", "answer": city}
    for name, city in zip(NAMES, CITIES, strict=True)
]
IDEAS = ["Answer politely.", "Answer in one word.", "Think first.", "Be brief.", "Answer with a word."]


class Model:
    "A rule that answers, and remembers what it was asked."

    def __init__(self, shown_helps: bool = False) -> None:
        self.asked: list[Messages] = []
        self.shown_helps = shown_helps  # is an example as good as the right instruction?

    def __call__(self, conversations: list[Messages]) -> list[str]:
        self.asked += conversations
        return [self.one(messages) for messages in conversations]

    def one(self, messages: Messages) -> str:
        right = messages[-1]["content"].split()[3].strip(".")
        if "one word" in messages[0]["content"] or (self.shown_helps and len(messages) > 2):
            return right
        return "" if "politely" in messages[0]["content"] else f"perhaps {right}"


class Proposer:
    "Goes through a list of instructions, and remembers what it was asked."

    def __init__(self, ideas: list[str] = IDEAS) -> None:
        self.ideas, self.asked = ideas, list[Messages]()

    def __call__(self, conversations: list[Messages]) -> list[str]:
        self.asked += conversations
        return [self.ideas[(len(self.asked) - 1) % len(self.ideas)]]


def search(answer: Callable[[list[Messages]], list[str]], **options: Any) -> SearchResult:
    "A search without a bar; skipped where DSPy is not installed."
    pytest.importorskip("dspy", reason='DSPy is not installed: pip install "llmops[prompting]"')
    return search_prompt(answer, **{"rows": ROWS, "propose": Proposer(), "progress": False, **options})


def summary(found: SearchResult) -> list[tuple[Prompt, float, int]]:
    "What two runs are compared by."
    return [(c.prompt, c.score, c.calls) for c in found.candidates]


@pytest.mark.parametrize("examples", [0, 2])
def test_what_is_scored_is_what_the_prompt_sends(examples: int) -> None:
    model = Model()
    found = search(model, examples=examples, budget=30, seed=3)
    for candidate in found.candidates:
        sent = [candidate.prompt.messages(row) for row in ROWS]
        assert sum(messages in model.asked for messages in sent) >= found.scored
    known = {turn["content"] for row in ROWS for turn in Prompt().messages(row)[1:]} | {row["answer"] for row in ROWS}
    for messages in model.asked:  # nothing of DSPy's own forms, in examples that the model made neither
        assert [turn["role"] for turn in messages[:2]] == ["system", "user"] and messages[-1]["role"] == "user"
        assert messages[0]["content"] in {INSTRUCTION, *IDEAS}
        assert {turn["content"] for turn in messages[1:]} <= known


@pytest.mark.parametrize("examples", [0, 2])
def test_the_result_needs_no_dspy_and_scores_the_same(examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = search(Model(shown_helps=True), examples=examples, budget=60, seed=0)
    monkeypatch.setitem(sys.modules, "dspy", None)
    scored, _ = prompt_search.split_rows(ROWS, 0.5, 0)
    for candidate in found.candidates:
        prompt = prompt_from(asdict(candidate.prompt))
        scores = score_prompt(Model(shown_helps=True), prompt, scored)
        assert sum(scores) / len(scores) == pytest.approx(candidate.score)
    assert found.best.score == 1.0 and found.start.prompt == Prompt() and found.start.score < 1


@pytest.mark.parametrize("examples", [0, 2])
def test_a_seed_gives_the_same_candidates_also_seed_0(examples: int) -> None:
    runs = [search(Model(), examples=examples, budget=30, seed=seed) for seed in (0, 0, 1, 1)]
    assert summary(runs[0]) == summary(runs[1]) and len(runs[0].candidates) > 1
    assert runs[0] == runs[1] and runs[2] == runs[3]
    assert runs[0].seed == 0


def test_dspy_gets_the_seed_and_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    dspy = pytest.importorskip("dspy", reason='DSPy is not installed: pip install "llmops[prompting]"')
    seeds, set_seeds = [], dspy.MIPROv2._set_random_seeds
    monkeypatch.setattr(dspy.MIPROv2, "_set_random_seeds", lambda self, s: (seeds.append(s), set_seeds(self, s)))
    for seed in (0, 7):
        search(Model(), examples=1, budget=20, seed=seed)
    assert seeds == [0, 7]
    drawn, compile_ = [], dspy.GEPA.compile
    monkeypatch.setattr(
        dspy.GEPA, "compile", lambda self, *rest, **named: (drawn.append(self.seed), compile_(self, *rest, **named))
    )
    search(Model(), budget=20, seed=0)
    assert drawn == [0]


def test_what_is_worked_around_in_dspy_is_still_so(monkeypatch: pytest.MonkeyPatch) -> None:
    "When this fails, DSPy has changed: see what `run_mipro` and its notebook say about seeds and examples."
    dspy = pytest.importorskip("dspy", reason='DSPy is not installed: pip install "llmops[prompting]"')
    seeds, set_seeds = [], dspy.MIPROv2._set_random_seeds
    monkeypatch.setattr(dspy.MIPROv2, "_set_random_seeds", lambda self, s: (seeds.append(s), set_seeds(self, s)))
    scored, shown = prompt_search.split_rows(ROWS, 0.5, 0)
    model = Model()
    ledger = prompt_search.Ledger(model, Proposer(["Be brief.", "Say it."]), f1_metric, scored, 1000)
    answers = prompt_search.make_model("answer", lambda messages: ledger.answer_all([messages])[0])
    writes = prompt_search.make_model("propose", lambda messages: ledger.ask("propose", [messages])[0])
    rows = [prompt_search.dspy_rows(part, DEFAULT_TEMPLATE, part is scored) for part in (shown, scored)]
    with captured_output(), dspy.context(adapter=prompt_search.make_adapter(DEFAULT_TEMPLATE)):
        optimizer = dspy.MIPROv2(
            prompt_search.make_metric(ledger, words=False), writes, answers, auto=None, num_candidates=6,
            max_bootstrapped_demos=0, max_labeled_demos=0, num_threads=1,
        )  # fmt: skip
        program = optimizer.compile(
            prompt_search.make_program(Prompt()), trainset=rows[0], valset=rows[1], num_trials=2, minibatch=False,
            program_aware_proposer=False, data_aware_proposer=False, seed=0,
        )  # fmt: skip
    assert seeds == [9]  # dspy#10321: not 0
    spent = [messages for messages in model.asked if messages[-1] in [Prompt().messages(row)[-1] for row in shown]]
    assert spent  # dspy#9938: examples are made although none is wanted
    assert program.predictors()[0].demos == []  # but they reach neither the program nor what is scored
    assert all(len(messages) == 2 for messages in model.asked)


def test_another_seed_draws_other_rows() -> None:
    parts = {tuple(row["answer"] for row in prompt_search.split_rows(ROWS, 0.5, seed)[0]) for seed in range(5)}
    assert len(parts) > 1


def test_without_examples_none_is_shown() -> None:
    model = Model()
    found = search(model, examples=0, budget=25, seed=0)
    assert found.optimizer == "GEPA" and all(not c.prompt.examples for c in found.candidates)
    assert all([turn["role"] for turn in messages] == ["system", "user"] for messages in model.asked)


def test_examples_come_from_rows_that_score_nothing() -> None:
    found = search(Model(shown_helps=True), examples=2, budget=80, seed=0)
    shown = {row["question"]: row for row in prompt_search.split_rows(ROWS, 0.5, 0)[1]}
    used = [example for c in found.candidates for example in c.prompt.examples]
    assert found.optimizer == "MIPROv2" and used and max(len(c.prompt.examples) for c in found.candidates) <= 2
    for example in used:
        assert f1_metric(shown[example.question], example.answer) == 1.0
        assert example.passage == shown[example.question]["passage"]


@pytest.mark.parametrize("examples", [0, 1])
@pytest.mark.parametrize("budget", [5, 6, 9, 14, 23])
def test_no_call_is_made_beyond_the_budget(examples: int, budget: int) -> None:
    model, proposer = Model(), Proposer(["Answer politely.", "Think first.", "Be brief."])
    found = search(model, propose=proposer, examples=examples, budget=budget, seed=0)
    assert found.answer_calls == len(model.asked) and found.propose_calls == len(proposer.asked)
    assert found.answer_calls + found.propose_calls <= budget and found.stopped == "budget"
    assert found.start == found.candidates[0] and found.best.score >= found.start.score
    assert found.best.calls <= budget


def test_nothing_is_asked_twice() -> None:
    model = Model()
    search(model, examples=2, budget=80, seed=0)
    assert all(model.asked.count(messages) == 1 for messages in model.asked)


def test_the_proposing_model_reads_answers_and_their_scores() -> None:
    proposer = Proposer()
    search(Model(), propose=proposer, budget=20, seed=0)
    shown = proposer.asked[0][-1]["content"]
    assert INSTRUCTION in shown and "is right: it scores 0." in shown and "lives in" in shown
    scored, _ = prompt_search.split_rows(ROWS, 0.5, 0)
    assert not any(row["passage"] in str(proposer.asked) for row in scored)


def test_a_perfect_start_ends_the_search_and_is_kept() -> None:
    proposer = Proposer()
    found = search(Model(), instruction="Answer in one word.", propose=proposer, budget=20, seed=0)
    assert found.stopped == "perfect" and found.best is found.start and not proposer.asked


def test_an_empty_proposal_changes_nothing() -> None:
    found = search(Model(), propose=Proposer(["", "``` ```"]), budget=12, seed=0)
    assert found.best == found.start and found.stopped == "budget" and found.propose_calls > 1


def test_no_network_and_no_litellm(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for examples in (0, 1):
        search(Model(), examples=examples, budget=20, seed=0)
    assert "litellm" not in sys.modules


@pytest.mark.parametrize("examples", [0, 1])
def test_a_metric_that_is_not_finite_ends_the_search(examples: int) -> None:
    def sometimes(row: Row, answer: str) -> float:
        return math.nan if answer == "" else f1_metric(row, answer)

    model, polite = Model(), Proposer(["Answer politely."])
    with pytest.raises(EvaluationError, match="metric: nan for the answer '' to 'Where does .* is no finite number"):
        search(model, metric=sometimes, propose=polite, examples=examples, budget=40, seed=0)
    assert len(model.asked) < 40


@pytest.mark.parametrize("examples", [0, 1])
def test_an_error_of_the_model_ends_the_search_under_its_own_name(examples: int) -> None:
    class Fragile(Model):
        def one(self, messages: Messages) -> str:
            if "politely" in messages[0]["content"]:
                raise ConnectionError("the endpoint is gone")
            return super().one(messages)

    model = Fragile()
    with pytest.raises(ConnectionError, match="the endpoint is gone"):
        search(model, propose=Proposer(["Answer politely."]), examples=examples, budget=40, seed=0)
    assert sum("politely" in messages[0]["content"] for messages in model.asked) == 1


@pytest.mark.parametrize("examples", [0, 1])
def test_a_prompt_that_does_not_fit_is_dropped(examples: int) -> None:
    class Small(Model):
        def one(self, messages: Messages) -> str:
            if "politely" in messages[0]["content"]:
                raise PromptTooLong("1 of 1 prompts do not fit")
            return super().one(messages)

    found = search(Small(), examples=examples, budget=60, seed=0)
    assert found.best.score == 1.0
    assert not any("politely" in c.prompt.instruction for c in found.candidates)


def test_the_same_model_proposes_where_no_other_is_named() -> None:
    def both(conversations: list[Messages]) -> list[str]:
        wanted = "Write the new instruction" in conversations[0][-1]["content"]
        return ["Answer in one word." for _ in conversations] if wanted else Model()(conversations)

    found = search(both, propose=None, budget=20, seed=0)
    assert found.best.prompt.instruction == "Answer in one word." and found.propose_calls >= 1


def test_other_templates_are_searched() -> None:
    def say(conversations: list[Messages]) -> list[str]:
        return ["5" if "one word" in m[0]["content"] else "five, I think" for m in conversations]

    rows = [{"question": f"How much is {n} and {5 - n}?", "answer": "5"} for n in range(6)]
    found = search(say, rows=rows, template="question", budget=20, seed=0)
    assert found.best.score == 1.0 and found.best.prompt.messages(rows[0])[-1]["content"] == rows[0]["question"]
    with pytest.raises(DataError, match="6 of 6 were given to the search"):
        check_unseen(found, rows)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"rows": []}, DataError, "rows: got 0; a search needs at least two train rows"),
        ({"rows": [{"question": "Who?", "answer": "Ann"}] * 3}, DataError, "row 1 has no text in `passage`"),
        ({"rows": [*ROWS, {**ROWS[0], "answer": " "}]}, DataError, "row 9 has no text in `answer`"),
        ({"budget": 4}, ParamError, "budget: 4 calls are too few: the prompt that there is takes 4"),
        ({"examples": -1}, ParamError, "examples: -1 is below 0"),
        ({"scored_share": 0.0}, ParamError, "scored_share: 0.0 is not between 0 and 1"),
        ({"template": "nonsense"}, ParamError, "template: 'nonsense' is none of"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_asked(
    options: dict[str, Any], error: type[Exception], said: str
) -> None:
    model = Model()
    with pytest.raises(error, match=said):
        search_prompt(model, **{"rows": ROWS, "progress": False, **options})
    assert not model.asked


def test_a_model_that_returns_too_little_is_refused() -> None:
    with pytest.raises(EvaluationError, match="4 conversations were asked and 1 came back"):
        search(lambda conversations: ["Oslo"], budget=20)


def test_without_dspy_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = [f'{word}; extra == "prompting"' for word in settings()["prompting_requirements"].split()]
    monkeypatch.setattr(metadata, "requires", lambda name: declared)
    monkeypatch.setitem(sys.modules, "dspy", None)
    with pytest.raises(ModuleNotFoundError, match=r'dspy is not installed: .* pip install "llmops\[prompting\]"'):
        import_dspy()
    model = Model()
    with pytest.raises(ModuleNotFoundError, match="llmops.prompting"):
        search_prompt(model, ROWS, progress=False)
    assert not model.asked


def test_the_study_searches_and_judges_a_tiny_model(tmp_path: Path) -> None:
    pytest.importorskip("dspy", reason='DSPy is not installed: pip install "llmops[prompting]"')
    from llmops.studies.prompt_search import main

    options = ["--rows", "4", "--judged", "3", "--budget", "6", "--out", str(tmp_path / "found.json")]
    main(["--base", "tiny:llama", "--data", "tiny:data", *options])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["answer_calls"] + found["propose_calls"] <= 6 and len(found["proposed"]) == found["propose_calls"]
    assert found["gains"]["search"]["rows"] == 3 and found["gains"]["search"]["verdict"] == "undecided"
    assert found["candidates"][0]["instruction"] == found["control"][0]["instruction"] == INSTRUCTION
