"""What stands around an answer: keys, quotas, the queue, deadlines, and a ledger that equals the engine."""

import asyncio
import json
import socket
import sqlite3
import threading
import time
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from llmops.deployment.admission import FrontDesk, ServerLimits
from llmops.deployment.gateway import create_app
from llmops.deployment.keys import Held, Key, add_key, quota_wait, revoke_key, tokens_left
from llmops.deployment.ledger import Entry, Prices, open_ledger, record_usage, total_usage
from llmops.deployment.requests import ApiError
from llmops.deployment.telemetry import RequestLog, open_tracer
from llmops.deployment.transformers_engine import TransformersEngine

ABOUT = {"model": "m", "context": 1024}
HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
few = settings(derandomize=True, deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def engine():
    from llmops.foundation.models import load_model

    return TransformersEngine(*load_model("tiny:llama", dtype="float32"), 1024)


def ask(engine: Any, desk: FrontDesk, body: dict[str, Any], path: str = "/v1/chat/completions", **headers: str):
    app = create_app(ABOUT, engine, desk=desk)
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        return client.post(path, json=body, headers=headers)


# --- windows that slide -----------------------------------------------------------------------------------------------


@few
@given(
    st.lists(st.tuples(st.floats(0, 300), st.integers(1, 40)), max_size=30),
    st.integers(50, 200),
    st.floats(5, 60),
)
def test_no_window_ever_holds_more_than_the_quota_and_a_refusal_says_when(asks, quota, window):
    "Requests are let in or told to wait; whoever waits as long as told is let in."
    used: list[tuple[float, int]] = []
    for now, amount in sorted(asks):
        inside = [(when, n) for when, n in used if when > now - window]
        wait = quota_wait(inside, 0, amount, quota, window, now)
        if wait == 0:
            used.append((now, amount))
            assert sum(n for when, n in used if when > now - window) <= quota
        else:
            later = now + wait + 1e-6
            assert quota_wait([u for u in inside if u[0] > later - window], 0, amount, quota, window, later) == 0
            if wait > 0.01:  # and not earlier
                sooner = now + wait - 0.01
                assert quota_wait([u for u in inside if u[0] > sooner - window], 0, amount, quota, window, sooner) > 0


def test_a_fixed_window_would_bite_early_and_let_twice_as_much_through():
    ledger, key, start = open_ledger(), Key("ann", requests=10), 1_800_000_000.0
    for n in range(10):
        record_usage(ledger, Entry(str(n), "ann", "m", "/", start + 55 + n / 10, 0.0, 1, 0, 1, 0.0, "stop"))
    with pytest.raises(ApiError) as e:  # a new minute has begun
        tokens_left(ledger, key, 1, now=start + 61)
    assert e.value.status == 429 and e.value.headers == {"retry-after": "54"}
    assert tokens_left(ledger, key, 1, now=start + 115.05) is None


def test_running_requests_hold_their_places():
    ledger, key = open_ledger(), Key("ann", requests=2, tokens=100)
    assert tokens_left(ledger, key, 10, Held(1, 50)) == 40
    for held in (Held(2, 0), Held(1, 95)):
        with pytest.raises(ApiError, match="ask again in"):
            tokens_left(ledger, key, 10, held)


# --- keys -------------------------------------------------------------------------------------------------------------


def test_a_key_that_is_revoked_is_none_from_then_on(engine, tmp_path):
    desk = FrontDesk(ledger=open_ledger(tmp_path / "usage.sqlite"))
    bearer = {"authorization": f"Bearer {add_key(desk.ledger, Key('ann'))}"}
    assert ask(engine, desk, HELLO | {"max_tokens": 1}, **bearer).status_code == 200
    for wrong in ({}, {"authorization": "Bearer llmops-x"}, {"authorization": "Bearer "}, {"authorization": "x"}):
        refused = ask(engine, desk, HELLO, **wrong)
        assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
    revoke_key(open_ledger(tmp_path / "usage.sqlite"), "ann")  # another process
    assert "was revoked at" in ask(engine, desk, HELLO, **bearer).json()["error"]["message"]
    assert [row["requests"] for row in total_usage(desk.ledger)] == [1]  # what is refused costs nothing


def test_a_quota_that_is_reached_in_mid_stream_ends_the_answer(engine):
    desk = FrontDesk()
    bearer = {"authorization": f"Bearer {add_key(desk.ledger, Key('ann', tokens=60))}"}
    streamed = ask(
        engine, desk, HELLO | {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 500}, **bearer
    )
    parts = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert parts[-1]["usage"]["total_tokens"] == 60 and parts[-2]["choices"][0]["finish_reason"] == "length"
    assert streamed.headers["x-ratelimit-limit-tokens"] == "60"
    assert ask(engine, desk, HELLO, **bearer).status_code == 429
    too_long = ask(engine, desk, HELLO | {"messages": [{"role": "user", "content": "word " * 90}]}, **bearer)
    assert too_long.status_code == 400 and too_long.json()["error"]["code"] == "quota_too_small"


def test_the_ledger_outlives_the_server_and_so_do_the_quotas(engine, tmp_path):
    path = tmp_path / "usage.sqlite"
    desk = FrontDesk(ledger=open_ledger(path), prices=Prices(1.0, 2.0))
    bearer = {"authorization": f"Bearer {add_key(desk.ledger, Key('ann', requests=1))}"}
    used = ask(engine, desk, HELLO | {"max_tokens": 3}, **bearer).json()["usage"]
    desk.ledger.close()
    again = FrontDesk(ledger=open_ledger(path))
    assert ask(engine, again, HELLO, **bearer).status_code == 429
    [row] = total_usage(again.ledger)
    assert (row["prompt_tokens"], row["completion_tokens"]) == (used["prompt_tokens"], used["completion_tokens"])
    assert row["cost"] == pytest.approx((used["prompt_tokens"] + 2 * used["completion_tokens"]) / 1e6)


# --- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"])
@pytest.mark.parametrize(
    "body, status",
    [
        (b"", 400),
        (b"{", 400),
        (b"not json", 400),
        (b"\xff\xfe", 400),
        (b'{"model": "m", "messages": [{"role": "user", "content": "\\ud83d"}], "input": "\\ud83d"}', 400),
        (b'{"model": "m", "messages": ' + b"[" * 50_000, 400),
        (b'{"model": "m", "prompt": ' + b'{"a":' * 50_000, 400),
        (b'"' + b"x" * 2_000_000 + b'"', 413),
        (b"[]", 400),
        (b"null", 400),
    ],
)
def test_a_body_that_cannot_be_read_is_the_clients_fault(engine, path, body, status):
    app = create_app(ABOUT, engine, desk=FrontDesk(ServerLimits(body_bytes=1_000_000)))
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        answer = client.post(path, content=body)
    expected = {status, 404} if path == "/v1/embeddings" and status == 400 else {status}
    assert answer.status_code in expected and answer.json()["error"]["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    "messages prompt input model temperature top_p max_tokens max_output_tokens stop seed stream stream_options n tools "
    "tool_choice response_format logprobs top_logprobs logit_bias frequency_penalty instructions text reasoning echo "
    "suffix best_of encoding_format dimensions input_type truncation metadata user store include previous_response_id"
).split()


@few
@given(
    st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"]),
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4),
)
def test_no_request_whatever_is_a_fault_of_the_server(engine, path, fields):
    "An engine that never writes: only what the gateway itself does is tried."
    right = {"messages": HELLO["messages"], "prompt": "a", "input": "a", "model": "m"}
    names = {"/v1/chat/completions": ["messages"], "/v1/completions": ["prompt"]}.get(path, ["input"])
    body = {"model": "m", "max_tokens": 1} | {name: right[name] for name in names} | fields

    async def answers(request, usage=None, prompt=None):
        raise ApiError("reached the engine", 400)

    answer = ask(answers, FrontDesk(), body, path)
    assert answer.status_code in (400, 404), answer.text


# --- a real server, and clients that leave ----------------------------------------------------------------------------


@pytest.fixture
def served(engine):
    "A server on a port of its own, with what it writes down."
    desk, held = FrontDesk(ServerLimits(queue=4, seconds=20, body_seconds=0.5)), socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(ABOUT, engine, desk=desk), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [held]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{held.getsockname()[1]}", desk
    server.should_exit = True
    thread.join(10)


def wait_until(happened) -> None:
    for _ in range(1000):
        if happened():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def test_tokens_are_counted_when_the_client_goes_away(served, engine):
    address, desk = served
    url, body = (
        f"{address}/v1/chat/completions",
        HELLO | {"stream": True, "max_tokens": 900, "temperature": 1.5, "seed": 3},
    )
    with httpx.Client(timeout=30) as client, client.stream("POST", url, json=body) as response:
        for number, _ in enumerate(response.iter_lines()):
            if number > 20:
                break
    wait_until(lambda: not desk.jobs)
    [row] = total_usage(desk.ledger)
    wait_until(lambda: engine.worker.current is None)
    assert row["cancelled"] == 1 and 8 < row["completion_tokens"] < 900 and row["prompt_tokens"] > 10
    assert httpx.post(url, json=HELLO | {"max_tokens": 2}, timeout=30).status_code == 200


def test_a_full_queue_says_when_to_come_again(served):
    address, desk = served
    url, answers = f"{address}/v1/chat/completions", []
    body = HELLO | {"max_tokens": 60, "temperature": 1.5, "seed": 1}

    def post() -> None:
        answers.append(httpx.post(url, json=body, timeout=60))

    threads = [threading.Thread(target=post) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = sorted(answer.status_code for answer in answers)
    assert set(told) == {200, 429} and told.count(200) >= 4
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)
    assert sum(row["requests"] for row in total_usage(desk.ledger)) == told.count(200) and not desk.jobs


def test_a_body_that_trickles_in_is_not_waited_for(served):
    address, _ = served
    port = int(address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{")
        assert b" 408 " in slow.recv(4096).split(b"\r\n")[0]


def test_the_ledger_equals_what_clients_were_told(served):
    address, desk = served
    told, openai = [0, 0], pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    for n in range(6):
        usage = client.chat.completions.create(
            model="m", messages=HELLO["messages"], max_tokens=3 + n, n=1 + n % 2
        ).usage
        told = [told[0] + usage.prompt_tokens, told[1] + usage.completion_tokens]
    for n in range(3):
        usage = client.completions.create(model="m", prompt="Once upon a time", max_tokens=2 + n).usage
        told = [told[0] + usage.prompt_tokens, told[1] + usage.completion_tokens]
    answer = client.responses.create(model="m", input="hello", max_output_tokens=4)
    assert answer.status == "incomplete" and answer.output_text
    told = [told[0] + answer.usage.input_tokens, told[1] + answer.usage.output_tokens]
    with client.responses.stream(model="m", input="hello", max_output_tokens=4) as stream:
        events = list(stream)
    final = events[-1].response
    assert events[-1].type == "response.incomplete" and final.output_text == answer.output_text
    told = [told[0] + final.usage.input_tokens, told[1] + final.usage.output_tokens]
    wait_until(lambda: not desk.jobs)
    rows = total_usage(desk.ledger)
    assert told == [sum(row[name] for row in rows) for name in ("prompt_tokens", "completion_tokens")]
    text = httpx.get(f"{address}/metrics").text
    assert f'vllm:generation_tokens_total{{model_name="m"}} {float(told[1])}' in text


# --- what is written down ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_the_log_and_the_trace_hold_the_answer_and_no_words(engine, tmp_path, stream):
    desk = FrontDesk(tracer=open_tracer(tmp_path / "spans.jsonl", ""), log=RequestLog(tmp_path / "log.jsonl"))
    body = HELLO | {"messages": [{"role": "user", "content": "my secret"}], "max_tokens": 3, "stream": stream}
    answer = ask(engine, desk, body)
    desk.tracer.span_processor.force_flush()
    [line] = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    [span] = [json.loads(line) for line in (tmp_path / "spans.jsonl").read_text().splitlines()]
    assert (
        line["asked"] == ["[9 characters]"]
        and line["answered"].endswith("characters]")
        and line["answered"] != "[0 characters]"
    )
    assert line["id"] == answer.headers["x-request-id"] == span["attributes"]["gen_ai.response.id"]
    assert span["attributes"]["gen_ai.usage.output_tokens"] == line["completion_tokens"] == 3
    assert "secret" not in (tmp_path / "log.jsonl").read_text() + (tmp_path / "spans.jsonl").read_text()


def test_a_disk_that_is_full_stops_no_answer(engine, tmp_path, capsys):
    desk = FrontDesk(ledger=open_ledger(tmp_path / "usage.sqlite"))
    desk.ledger.execute("pragma query_only = on")
    assert [ask(engine, desk, HELLO | {"max_tokens": 1}).status_code for _ in range(3)] == [200] * 3
    assert desk.lost == 3 and capsys.readouterr().err.count("could not be written down") == 1


def test_a_request_that_takes_too_long_is_ended(engine):
    desk = FrontDesk(ServerLimits(seconds=0.2))

    async def slow(request, usage=None, prompt=None):
        await asyncio.sleep(30)

    late = ask(slow, desk, HELLO)
    assert late.status_code == 504 and late.json()["error"]["code"] == "deadline_exceeded"
    body = HELLO | {"stream": True, "max_tokens": 1000, "temperature": 1.9, "seed": 5}
    streamed = ask(engine, FrontDesk(ServerLimits(seconds=0.05)), body)
    assert streamed.status_code == 504 or "deadline_exceeded" in streamed.text.split("\n\n")[-2]


def test_four_threads_write_one_ledger(tmp_path):
    def write(name: str) -> None:
        ledger = open_ledger(tmp_path / "usage.sqlite")
        for n in range(50):
            record_usage(ledger, Entry(f"{name}{n}", name, "m", "/", time.time(), 0.1, 1, 0, 2, 0.0, "stop"))

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ledger = open_ledger(tmp_path / "usage.sqlite")
    assert [(row["key"], row["requests"], row["completion_tokens"]) for row in total_usage(ledger)] == [
        (name, 50, 100) for name in "abcd"
    ]
    with pytest.raises(sqlite3.IntegrityError):
        record_usage(ledger, Entry("a0", "a", "m", "/", time.time(), 0.1, 1, 0, 2, 0.0, "stop"))
