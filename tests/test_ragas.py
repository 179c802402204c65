"""Ragas scores over a real HTTP endpoint on this machine.

The endpoint is a fake: no model stands behind it. It reads ragas's prompts and answers by fixed rules (a statement is a
sentence; it follows when the context holds it word for word), so that every score can be worked out by hand, and it can
be told to fail in each way that a judge fails. These are tests of the protocol, not of any judge's judgement.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from conftest import ROOT
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from llmops.evaluation.ragas import RAGAS_METRICS, RagasParams, ragas_scores
from llmops.foundation.project import ParamError

JUDGED = [m for m, about in RAGAS_METRICS.items() if about.needs_judge]
KINDS = {
    "analyze the complexity of each sentence": "statements",
    "judge the faithfulness of a series": "verdicts",
    "Generate a question for the given answer": "question",
    "verify if the context was useful": "useful",
    "classify if the statement can be attributed": "recall",
    "Decompose and break down": "claims",
}
ROW = {
    "id": "a",
    "question": "Where did the cat sit?",
    "prediction": "The cat sat on the mat. The cat was red.",
    "gold": "The cat sat on the mat. It was noon.",
    "contexts": ["Plums are ripe.", "The cat sat on the mat."],
}
COPIED = ROW | {"id": "b", "contexts": ["Plums are ripe.", "The cat sat on the mat. The cat was red."]}


@dataclass
class Script:
    "What the endpoint should do, and what it was asked."

    url: str = ""
    broken: dict[str, Any] = field(default_factory=dict)  # kind of prompt -> what to say instead
    fickle: bool = False  # every second time it is asked the same, all verdicts are 1
    delay: float = 0.0  # seconds before it answers
    status: int = 200
    key: str = ""  # wanted in the header
    asked: Counter[str] = field(default_factory=Counter)  # kind -> requests
    prompts: Counter[str] = field(default_factory=Counter)


def sentences(text: str) -> list[str]:
    return [s.strip() for s in text.split(".") if s.strip()]


def judgement(script: Script, kind: str, given: dict[str, Any], prompt: str) -> dict[str, Any]:
    held = lambda s: int(s in given.get("context", ""))  # noqa: E731
    script.prompts[prompt] += 1
    generous = script.fickle and script.prompts[prompt] % 2 == 0
    return {
        "statements": lambda: {"statements": sentences(given.get("answer", given.get("text", "")))},
        "claims": lambda: {"claims": sentences(given["response"])},
        "verdicts": lambda: {
            "statements": [
                {"statement": s, "reason": "", "verdict": 1 if generous else held(s)} for s in given["statements"]
            ]
        },
        "question": lambda: {"question": "Where was the cat?", "noncommittal": int("don't know" in given["response"])},
        "useful": lambda: {"reason": "", "verdict": int(any(map(held, sentences(given["answer"]))))},
        "recall": lambda: {
            "classifications": [
                {"statement": s, "reason": "", "attributed": held(s)} for s in sentences(given["answer"])
            ]
        },
    }[kind]()


def endpoint(script: Script) -> FastAPI:
    app = FastAPI()

    @app.post("/v1/chat/completions")
    def chat(body: dict[str, Any], request: Request) -> Any:
        prompt = next(m["content"] for m in body["messages"] if m["role"] == "user")
        kind = next(v for k, v in KINDS.items() if k in prompt)
        script.asked[kind] += 1
        time.sleep(script.delay)
        if script.key and request.headers.get("authorization") != f"Bearer {script.key}":
            return JSONResponse({"error": {"message": "wrong key"}}, 401)
        if script.status != 200:
            return JSONResponse({"error": {"message": "something broke"}}, script.status)
        given = json.loads(prompt[prompt.rfind("\ninput: {") + 8 : prompt.rfind("\nOutput:")])
        wrong = script.broken.get(kind)
        said = wrong(given) if callable(wrong) else wrong
        content = (
            said
            if isinstance(said, str)
            else json.dumps(said if said is not None else judgement(script, kind, given, prompt))
        )
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }

    @app.post("/v1/embeddings")
    def embeddings(body: dict[str, Any]) -> Any:
        script.asked["embeddings"] += 1
        vectors = [[1.0, 0.0] if t == ROW["question"] else [0.6, 0.8] for t in body["input"]]
        return {
            "object": "list",
            "model": body["model"],
            "usage": {"prompt_tokens": 1, "total_tokens": 1},
            "data": [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(vectors)],
        }

    return app


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    "A running endpoint. What is judged in a test is kept in that test's folder."
    monkeypatch.chdir(tmp_path)
    found = Script()
    server = uvicorn.Server(uvicorn.Config(endpoint(found), host="127.0.0.1", port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    found.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    yield found
    server.should_exit = True
    thread.join(10)


def params(script: Script, **changes: Any) -> RagasParams:
    return RagasParams(
        **{
            "metrics": JUDGED,
            "judge_url": script.url,
            "judge_model": "fixed-rules",
            "embedding_model": "fixed-vectors",
            "repeats": 1,
            "retries": 0,
            "resamples": 199,
            **changes,
        }
    )


def test_values_by_hand(script: Script) -> None:
    done = ragas_scores([ROW, COPIED], params(script))
    assert {m: done.rows[0][m] for m in JUDGED} == pytest.approx(
        {
            "faithfulness": 1 / 2,  # the cat sat on the mat; that it was red, nobody says
            "answer_relevancy": 0.6,  # three times the same question, at a cosine of 0.6
            "context_precision": 1 / 2,  # the useful context comes second
            "context_recall": 1 / 2,  # noon is in no context
            "factual_correctness": 1 / 2,  # one of two statements is right, one of two is there
            "noise_sensitivity": 0.0,
        },
        abs=1e-6,
    )  # red is wrong, but no context says so
    assert done.rows[1]["faithfulness"] == 1  # copied from a context that is wrong
    assert done.rows[1]["noise_sensitivity"] == 1 / 2
    assert done.summary["faithfulness"]["mean"] == 0.75 and done.summary["faithfulness"]["spread"] is None
    assert done.rows[0]["missing"] == {} and not any(s["missing"] for s in done.summary.values())
    assert script.asked["embeddings"] > 0


def test_a_refusal_is_not_relevant(script: Script) -> None:
    done = ragas_scores([ROW | {"prediction": "I don't know."}], params(script, metrics=["answer_relevancy"]))
    assert done.rows[0]["answer_relevancy"] == 0


def test_vectors_that_are_handed_in(script: Script) -> None:
    done = ragas_scores(
        [ROW],
        params(script, metrics=["answer_relevancy"], embedding_model=""),
        lambda texts: [[3.0, 4.0] if "did" in t else [4.0, 3.0] for t in texts],
    )
    assert done.rows[0]["answer_relevancy"] == pytest.approx(24 / 25)
    assert not script.asked["embeddings"]


def test_repeats_tell_their_spread_and_are_kept(script: Script) -> None:
    script.fickle = True
    cfg = params(script, metrics=["faithfulness"], repeats=2)
    first = ragas_scores([ROW], cfg)
    assert first.rows[0]["faithfulness"] == 0.75 and first.rows[0]["spread"]["faithfulness"] == pytest.approx(
        0.5 / 2**0.5
    )
    assert first.summary["faithfulness"]["spread"] == pytest.approx(0.5 / 2**0.5)
    assert (first.requests, first.cache_hits) == (4, 0)  # statements and verdicts, twice
    asked = sum(script.asked.values())
    again = ragas_scores([ROW], cfg)
    assert (again.requests, again.cache_hits) == (0, 4) and again.rows == first.rows
    assert sum(script.asked.values()) == asked  # nothing left this process
    more = ragas_scores([ROW, COPIED], cfg)
    assert (
        more.requests == 2 and more.rows[0] == first.rows[0]
    )  # the same answer has the same statements; its contexts are new
    assert ragas_scores([ROW], params(script, metrics=["faithfulness"], judge_model="another")).requests == 2


def test_a_judge_that_is_down(script: Script) -> None:
    rows = [ROW | {"id": i} for i in range(6)]
    done = ragas_scores(
        rows,
        params(
            script,
            metrics=["faithfulness", "context_recall", "chrf_score"],
            judge_url="http://127.0.0.1:9/v1",
            embedding_model="",
            concurrency=1,
        ),
    )
    for name in ("faithfulness", "context_recall"):
        assert done.summary[name]["mean"] is None and done.summary[name]["missing"] == 6
        assert [r[name] for r in done.rows] == [None] * 6
    assert "APIConnectionError" in done.rows[0]["missing"]["faithfulness"]
    assert (
        "is down" in done.rows[5]["missing"]["faithfulness"]
        and "not asked again" in done.rows[0]["missing"]["context_recall"]
    )
    assert done.summary["chrf_score"]["mean"] > 0.5


def test_a_judge_that_breaks_and_comes_back(script: Script) -> None:
    script.status = 500
    cfg = params(script, metrics=["context_recall"])
    down = ragas_scores([ROW], cfg)
    assert (
        down.summary["context_recall"]["mean"] is None
        and "InternalServerError" in down.summary["context_recall"]["reason"]
    )
    script.status = 200
    assert ragas_scores([ROW], cfg).rows[0]["context_recall"] == 0.5  # a failure is not kept


def test_a_slow_judge(script: Script) -> None:
    script.delay = 1.5
    start = time.perf_counter()
    done = ragas_scores(
        [ROW | {"id": i} for i in range(12)], params(script, metrics=["context_recall"], timeout=0.2, concurrency=1)
    )
    assert time.perf_counter() - start < 10 and script.asked["recall"] <= 4  # three times, then never again
    assert (
        done.summary["context_recall"]["mean"] is None
        and "APITimeoutError" in done.rows[0]["missing"]["context_recall"]
    )
    script.delay = 0.0
    assert ragas_scores([ROW], params(script, metrics=["context_recall"], timeout=5.0)).rows[0]["context_recall"] == 0.5


NONSENSE = {
    "no JSON": ({"verdicts": "I am a teapot."}, "faithfulness", ""),
    "wrong JSON": ({"verdicts": {"teapot": True}}, "faithfulness", ""),
    "no statements": ({"statements": {"statements": []}}, "faithfulness", "statements is empty"),
    "too few verdicts": (
        {"verdicts": lambda g: {"statements": [{"statement": "x", "reason": "", "verdict": 1}]}},
        "faithfulness",
        "1 verdicts on 2 statements",
    ),
    "a verdict of 7": ({"useful": {"reason": "", "verdict": 7}}, "context_precision", "verdict is 7"),
    "no question": ({"question": {"question": "", "noncommittal": 0}}, "answer_relevancy", "question is empty"),
    "no claims": ({"claims": {"claims": []}}, "factual_correctness", "claims is empty"),
    "nothing to recall": ({"recall": {"classifications": []}}, "context_recall", "classifications is empty"),
    "uneven": ({"verdicts": lambda g: {"statements": []}}, "noise_sensitivity", "statements is empty"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_a_judge_that_answers_nonsense(script: Script, case: str) -> None:
    script.broken, metric, says = NONSENSE[case]
    other = "context_recall" if "recall" not in script.broken else "faithfulness"
    done = ragas_scores([ROW], params(script, metrics=[metric, other]))
    assert (
        done.rows[0][metric] is None and done.summary[metric]["mean"] is None
    )  # not 0, as ragas alone would say of some
    assert says in done.rows[0]["missing"][metric]
    assert done.rows[0][other] == 0.5 and done.summary[other]["missing"] == 0
    script.broken = {}
    assert ragas_scores([ROW], params(script, metrics=[metric])).rows[0][metric] is not None  # nonsense is not kept


def test_a_second_try_at_what_did_not_parse(script: Script) -> None:
    tries = iter(["{", None, None, None])
    script.broken = {"recall": lambda g: next(tries)}
    assert ragas_scores([ROW], params(script, metrics=["context_recall"], retries=1)).rows[0]["context_recall"] == 0.5
    assert script.asked["recall"] == 2


def test_one_row_without_a_score(script: Script) -> None:
    script.broken = {"recall": lambda g: {"classifications": []} if "dog" in g["answer"] else None}
    rows = [ROW | {"id": i} for i in range(9)] + [ROW | {"id": "dog", "gold": "A dog."}]
    strict = ragas_scores(rows, params(script, metrics=["context_recall"]))
    assert strict.summary["context_recall"]["mean"] is None and strict.summary["context_recall"]["missing"] == 1
    lenient = ragas_scores(rows, params(script, metrics=["context_recall"], missing_allowed=0.1))
    assert lenient.summary["context_recall"]["mean"] == 0.5 and lenient.summary["context_recall"]["reason"]
    assert lenient.rows[9]["context_recall"] is None


def test_rows_without_what_a_metric_reads(script: Script) -> None:
    rows = [{k: v for k, v in ROW.items() if k != "contexts"}]
    done = ragas_scores(rows, params(script))
    assert done.rows[0]["factual_correctness"] == 0.5
    assert done.rows[0]["missing"]["faithfulness"].startswith("contexts is missing or empty")


def test_the_key_comes_from_the_environment(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    script.key = "not-in-any-file"
    cfg = params(script, metrics=["context_recall"], judge_env="SOME_KEY")
    with pytest.raises(ParamError, match="SOME_KEY is not set"):
        ragas_scores([ROW], cfg)
    monkeypatch.setenv("SOME_KEY", "wrong")
    assert "AuthenticationError" in ragas_scores([ROW], cfg).rows[0]["missing"]["context_recall"]
    monkeypatch.setenv("SOME_KEY", script.key)
    assert ragas_scores([ROW], cfg).rows[0]["context_recall"] == 0.5


def test_many_rows_at_once_come_back_in_order(script: Script) -> None:
    rows = [ROW | {"id": i, "gold": "The cat sat on the mat. " + "No. " * i} for i in range(12)]
    done = ragas_scores(rows, params(script, metrics=["context_recall"], concurrency=8))
    assert [r["context_recall"] for r in done.rows] == pytest.approx([1 / (1 + i) for i in range(12)])
    assert [r["id"] for r in done.rows] == list(range(12))


WATCHED = """
import json, socket, sys
seen = []
real = socket.socket.connect
def connect(self, address):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1"): seen.append(address[0])
    return real(self, address)
socket.socket.connect = connect
from llmops.evaluation.ragas import RagasParams, ragas_scores
row, url = json.loads(sys.argv[1]), sys.argv[2]
cfg = RagasParams(judge_url=url, judge_model="fixed-rules", embedding_model="fixed-vectors", repeats=1, resamples=199)
done = ragas_scores([row], cfg)
assert all(s["mean"] is not None for s in done.summary.values()), done.summary
print(json.dumps(seen))
"""


def test_nothing_is_told_to_anyone(script: Script, tmp_path: Path) -> None:
    "No connection but to the judge, and no user id left in the home folder."
    home = tmp_path / "home"
    home.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAGAS", "XDG"))} | {
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
    }
    out = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps(ROW), script.url],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout.splitlines()[-1]) == []
    assert [p for p in home.rglob("*") if "ragas" in p.as_posix()] == []
