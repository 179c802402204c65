"""Selection: candidates of three kinds on the same questions, faults that keep their row, and a replay to the byte."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from wire_servers import KEY, Wire, run_app

from llmops.foundation.artifacts import verify
from llmops.foundation.datasets import read_split
from llmops.foundation.project import ParamError
from llmops.foundation.tiny import tiny_model
from llmops.selection.candidates import TaskNeeds, examine, read_candidates
from llmops.selection.recording import bound_price
from llmops.selection.selection import KIND, REPLIES, SelectionParams, SelectionResult, run_selection, seal

LOCAL = {"name": "tiny", "model": "tiny:llama", "licence": "Apache-2.0"}
SERVED = {"provider": "openai", "licence": "MIT", "input_price": 1.0, "output_price": 4.0}
NEEDS = TaskNeeds("research", 100)
FILES = (REPLIES, "predictions.jsonl", "selection.json", "selection.md")


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, Wire]]:
    wire = Wire()
    with run_app(wire.app) as url:
        yield url, wire


@pytest.fixture
def select(tmp_path: Path) -> Callable[..., SelectionResult]:
    "Run the stage and seal it."

    def run(*candidates: dict[str, Any], out: str = "selection", **changes: Any) -> SelectionResult:
        cfg = SelectionParams(
            **{
                "candidates": list(candidates),
                "questions": 4,
                "max_new_tokens": 4,
                "resamples": 100,
                "spending_cap": 1.0,
                "record": str(tmp_path / "record"),
                "out": str(tmp_path / out),
            }
            | changes
        )
        result = run_selection(cfg)
        seal(result.work, cfg.out, KIND, "llmops.selection.selection", cfg, result.inputs, result.metrics)
        return result

    return run


def served(url: str, case: str, provider: str = "openai", **changes: Any) -> dict[str, Any]:
    base = f"{url}/{case}" + ("/v1" if provider == "openai" else "")
    return SERVED | {"name": f"{provider}-{case}", "model": "m", "provider": provider, "base_url": base} | changes


def row_of(result: SelectionResult, name: str) -> dict[str, Any]:
    return next(row for row in result.rows if row["name"] == name)


def test_three_kinds_answer_the_same_questions(address, select, tmp_path):
    url, wire = address
    candidates = (LOCAL, served(url, "fine"), served(url, "fine", "anthropic"))
    result = select(*candidates)
    assert [row["reason"] for row in result.rows] == ["", "", ""]
    one = row_of(result, "openai-fine")
    # 20 tokens read, 4 written, at 1 and 4 US dollars a million
    assert one["price_per_1000"] == pytest.approx(1000 * (20 * 1 + 4 * 4) / 1e6)
    assert one["prompt_tokens"] == 20 and one["p50_seconds"] > 0 and one["kind"] == "commercial"
    assert row_of(result, "tiny")["fits"] == {"bfloat16": True, "int8": True, "nf4": True}
    assert result.metrics["spent"] == pytest.approx(8 * 36 / 1e6)
    asked = {case: len(bodies) for case, bodies in wire.asked.items()}
    again = select(*candidates, out="again")
    assert {case: len(bodies) for case, bodies in wire.asked.items()} == asked  # what is recorded is not paid twice
    assert again.metrics["spent"] == 0
    more = select(*candidates, out="more", questions=5)
    assert len(wire.asked["fine"]) == asked["fine"] + 2 and more.metrics["spent"] == pytest.approx(2 * 36 / 1e6)
    verify(tmp_path / "selection")


def test_a_replay_needs_no_server_no_key_and_no_model(address, select, tmp_path, monkeypatch):
    url, wire = address
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    candidates = (
        LOCAL | {"model": str(folder)},
        served(url, "fine", name="one"),
        served(url, "status-400", name="broken"),
        {"name": "gpt", "model": "gpt-5.4-nano", "provider": "openai", "api_key_env": "NOT_SET"},
    )
    first = select(*candidates)
    assert [bool(row["reason"]) for row in first.rows] == [False, False, True, True]
    wire.asked.clear()
    shutil.rmtree(folder)
    kept = {name: (tmp_path / "selection" / name).read_bytes() for name in FILES}
    select(*candidates, out="replayed", replay=str(tmp_path / "selection"), record=str(tmp_path / "unused"))
    assert {name: (tmp_path / "replayed" / name).read_bytes() for name in FILES} == kept
    assert not wire.asked and not (tmp_path / "unused").exists()
    verify(tmp_path / "selection")


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("status-401", "wrong_key"),
        ("broke", "no credit"),
        ("status-404", "bad_request"),
        ("torn", "invalid_json"),
        ("page", "invalid_json"),
    ],
)
@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_a_fault_keeps_its_row(address, select, case, said, provider):
    result = select(LOCAL, served(address[0], case, provider))
    reason = row_of(result, f"{provider}-{case}")["reason"]
    assert reason.startswith("after 0 of 4 questions") and said in reason and KEY not in reason
    assert list(result.choice.worth) == ["tiny"] and "f1" not in row_of(result, f"{provider}-{case}")


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_an_empty_reply_and_a_refusal_are_answers(address, select, provider):
    result = select(served(address[0], "empty", provider), served(address[0], "refuses", provider))
    empty, refuses = (row_of(result, f"{provider}-{case}") for case in ("empty", "refuses"))
    assert empty["reason"] == refuses["reason"] == "" and empty["empty"] == 4 and empty["f1"] == 0


def test_the_cap_stops_before_it_is_crossed(address, select, tmp_path):
    url, wire = address
    wire.asked.clear()
    (candidate,) = read_candidates([served(url, "fine", name="capped")])
    rows = read_split("tiny:data", "valid")[:6]
    bounds = [bound_price(candidate.endpoint(), row["prompt"], 4, candidate.prices) for row in rows]
    cap = bounds[5] + 4 * 36e-6  # each reply costs 36 millionths, and the longest question comes after five of them
    assert max(bounds[:5]) + 4 * 36e-6 <= cap
    result = select(served(url, "fine", name="capped"), spending_cap=cap, questions=6)
    assert "after 5 of 6 questions: spending cap" in row_of(result, "capped")["reason"]
    assert result.metrics["spent"] <= cap and len(wire.asked["fine"]) == 5
    whole = select(served(url, "fine", name="capped"), out="whole", questions=6)  # goes on where it stopped
    assert row_of(whole, "capped")["reason"] == "" and len(wire.asked["fine"]) == 6


def test_an_unknown_price_is_unknown(address, select, tmp_path):
    result = select(LOCAL, served(address[0], "fine", name="free", input_price=None, output_price=None))
    assert "nobody knows what m costs" in row_of(result, "free")["reason"]
    table = (tmp_path / "selection/selection.md").read_text()
    assert "| free |" in table and "nobody knows" in table


def test_what_does_not_fit_is_refused_before_it_is_had():
    (large,) = read_candidates([{"name": "large", "model": "Qwen/Qwen3-32B", "licence": "Apache-2.0"}])
    facts = examine(large, replace(NEEDS, memory=24))
    assert facts.fits == {"bfloat16": False, "int8": False, "nf4": True} and facts.digest == ""
    assert facts.reason.startswith("large does not fit on 24 GB") and "What would:" in facts.reason
    assert "gptq-g128" in facts.reason
    (four,) = read_candidates(
        [{"name": "four", "model": "Qwen/Qwen3-32B", "precision": "nf4", "licence": "Apache-2.0"}]
    )
    assert examine(four, replace(NEEDS, memory=24)).reason == ""


def test_a_model_without_a_chat_template_and_one_that_takes_no_system(select, tmp_path):
    plain, strict = tmp_path / "plain", tmp_path / "strict"
    for folder in (plain, strict):
        shutil.copytree(tiny_model("llama"), folder)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings.pop("chat_template", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (strict / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    )
    result = select(*({"name": f.name, "model": str(f), "licence": "MIT"} for f in (plain, strict)), LOCAL)
    assert [row["reason"] for row in result.rows] == ["", "", ""]
    assert min(row["prompt_tokens"] for row in result.rows) > 20  # both were asked the whole question


@pytest.mark.parametrize(
    ("candidate", "said"),
    [
        ({"name": "a b", "model": "x"}, "number 1"),
        ({"name": "a", "model": "x", "provider": "google"}, "provider"),
        ({"name": "a", "model": "x", "temprature": 1}, "temprature"),
        ({"name": "a", "model": "x", "provider": "openai", "api_key_env": KEY}, "looks like a key"),
        ({"name": "a", "model": "x", "provider": "openai", "constrain": "spans"}, "behind a server"),
    ],
)
def test_a_candidate_at_fault_is_named(candidate, said):
    with pytest.raises(ParamError, match=said):
        SelectionParams(candidates=[candidate])
