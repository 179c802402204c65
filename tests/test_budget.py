"""The context budget: nothing is left out in silence, and no prompt is longer than the context."""

import time

import pytest
from conftest import limit

from llmops.foundation.artifacts import EMBEDDED_MODEL, resolve_source
from llmops.foundation.budget import ContextBudget, fit_prompt
from llmops.foundation.chat import Messages, encode_prompt
from llmops.foundation.models import load_tokenizer
from llmops.foundation.project import ParamError
from llmops.foundation.tiny import tiny_tokenizer
from llmops.studies.budget import check_budgets

TURN = [{"role": "user", "content": "Who was it? " * 5}, {"role": "assistant", "content": "Ann. " * 5}]


def test_ten_thousand_prompts_lose_nothing_in_silence() -> None:
    tokenizer = load_tokenizer(resolve_source(EMBEDDED_MODEL))
    start = time.process_time()
    found = check_budgets(tokenizer, 10_000)
    assert time.process_time() - start < limit(300)  # a guard against a search that grows, not a measurement
    assert (found["prompts"], found["silent_cuts"], found["over_context"]) == (10_000, 0, 0)
    assert min(found["dropped_parts"][part] for part in ("evidence", "examples", "history")) > 1000


def test_a_template_that_reads_across_edges_is_counted_whole() -> None:
    tokenizer = load_tokenizer(tiny_tokenizer())
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    found = check_budgets(tokenizer, 300)
    assert (found["silent_cuts"], found["over_context"]) == (0, 0)


def test_each_part_drops_what_is_worth_least() -> None:
    tokenizer = load_tokenizer(tiny_tokenizer())
    rows = [{"passage": f"Text {n}. " * 9, "question": "Who?", "answer": "Ann"} for n in range(9)]
    passages = [f"Passage {n} is here. " * 9 for n in range(9)]
    fitted = fit_prompt(tokenizer, ContextBudget(500, 32), "Who?", "", rows, passages, TURN * 9)
    for part, best in (("evidence", range(9)), ("examples", range(8, -1, -1)), ("history", range(8, -1, -1))):
        kept = fitted.kept[part]
        assert 0 < len(kept) < 9 and kept == sorted(list(best)[: len(kept)]), part


def test_an_unused_share_is_used_by_others() -> None:
    tokenizer = load_tokenizer(tiny_tokenizer())
    passages = [f"Passage {n} is here. " * 9 for n in range(30)]
    alone = fit_prompt(tokenizer, ContextBudget(1200, 32, 0.5, 0.3, 0.2), "Who?", evidence=passages)
    strict = fit_prompt(tokenizer, ContextBudget(1200, 32, 0.5, 0.0, 0.0), "Who?", evidence=passages)
    assert len(alone.kept["evidence"]) > 1.5 * len(strict.kept["evidence"]) and alone.tokens <= 1168


def test_a_summary_is_held_to_its_share() -> None:
    tokenizer, asked = load_tokenizer(tiny_tokenizer()), list[int]()

    def summarise(turns: list[Messages], tokens: int) -> str:
        asked.append(tokens)
        return "Ann. " * len(turns)

    fitted = fit_prompt(tokenizer, ContextBudget(900, 32), "Who?", history=TURN * 20, summarise=summarise)
    assert {piece.reason for piece in fitted.dropped} == {"summarised"} and len(asked) == 1
    assert fitted.tokens == len(encode_prompt(tokenizer, fitted.messages)) <= 868
    long = fit_prompt(tokenizer, ContextBudget(900, 32), "Who?", history=TURN * 20, summarise=lambda *_: "x y " * 999)
    refused = [piece for piece in long.dropped if piece.part == "summary"]
    assert len(refused) == 1 and "and may have" in refused[0].reason and long.kept["history"]


def test_system_and_question_are_never_dropped() -> None:
    tokenizer = load_tokenizer(tiny_tokenizer())
    with pytest.raises(
        ParamError, match=r"system and question take \d+ tokens with the chat template, and 32 are there"
    ):
        fit_prompt(tokenizer, ContextBudget(64, 32), "Who? " * 40)
