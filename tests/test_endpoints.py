"""Clients of commercial models against real servers on this machine. No paid model is called."""

import json
import pickle
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, limit
from wire_servers import KEY, Wire, run_app

from llmops.foundation.artifacts import begin_artifact, seal, verify
from llmops.foundation.decoding import DataError
from llmops.foundation.project import ParamError
from llmops.selection.endpoints import Endpoint, EndpointError, Reply, ask_endpoint
from llmops.selection.prices import TokenPrices, reply_tokens, request_price
from llmops.selection.recording import (
    NotRecorded,
    SpendingCap,
    SpendingCapReached,
    ask_recorded,
    bound_price,
    open_record,
    row_price,
)

HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who wrote the letter?"}]
PRICES = TokenPrices(input=1.0, output=4.0)
both = pytest.mark.parametrize("provider", ["openai", "anthropic"])
streamed = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, Wire]]:
    wire = Wire()
    with run_app(wire.app) as url:
        yield url, wire


@pytest.fixture
def at(address: tuple[str, Wire], provider: str):
    "An endpoint at which something happens; each test starts with a server that was not asked yet."
    url, wire = address
    wire.asked.clear()

    def endpoint(case: str, **changes) -> Endpoint:
        base = f"{url}/{case}" + ("/v1" if provider == "openai" else "")
        return Endpoint(**{"provider": provider, "model": "m", "base_url": base, "max_retries": 2} | changes)

    return endpoint


def fails(endpoint: Endpoint, **settings) -> EndpointError:
    with pytest.raises(EndpointError) as caught:
        ask_endpoint(endpoint, HELLO, **settings)
    error = caught.value
    assert error.kind in str(error) and endpoint.base_url in str(error) and error.__cause__ is None
    assert KEY not in str(error)
    return error


@both
@streamed
def test_a_reply(at, address, stream):
    reply = ask_endpoint(at("fine"), HELLO, max_tokens=30, temperature=0.0, stream=stream)
    assert reply.text.replace(" ", "") == "Hellothere." and reply.finish_reason == "stop" and reply.attempts == 1
    assert (reply.prompt_tokens, reply.completion_tokens, reply.cached_tokens) == (20, 4, 12)
    assert reply.model.startswith("m-2026") and reply.request_id.startswith("req_")
    assert (reply.first_token_seconds is not None) == stream
    assert 0 < (reply.first_token_seconds or reply.seconds) <= reply.seconds
    [body] = address[1].asked["fine"]
    assert body["model"] == "m" and body["temperature"] == 0.0
    if "system" in body:
        assert body["system"] == "Be brief." and body["messages"] == HELLO[1:] and body["max_tokens"] == 30
    else:
        assert body["messages"] == HELLO and body["max_completion_tokens"] == 30


@both
@streamed
@pytest.mark.parametrize("case, reason", [("refuses", "refusal"), ("filtered", "refusal"), ("empty", "empty")])
def test_a_refusal_and_silence_are_replies(at, stream, case, reason):
    reply = ask_endpoint(at(case), HELLO, stream=stream)
    assert reply.finish_reason == reason and reply.attempts == 1
    assert reply.text in ("", "I cannot help with that.")


@both
def test_no_key(at, monkeypatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    assert "SOME_KEY is not set" in str(fails(at("keyed", api_key_env="SOME_KEY")))


@both
def test_the_providers_own_key_is_for_the_provider_alone(at, address, monkeypatch):
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, KEY)
    assert fails(at("keyed")).kind == "wrong_key"


@both
def test_a_key_is_sent_and_never_shown(at, address, monkeypatch):
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")
    assert ask_endpoint(at("keyed", api_key_env="SOME_KEY"), HELLO).text
    monkeypatch.setenv("SOME_KEY", "sk-another-secret-key")
    error = fails(at("keyed", api_key_env="SOME_KEY"))
    assert error.kind == "wrong_key" and error.status == 401 and error.attempts == 1
    assert "another-secret" not in str(error) + repr(error) and "[key]" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    monkeypatch.setenv("SOME_KEY", "sk-\u2026")
    assert fails(at("keyed", api_key_env="SOME_KEY")).kind == "wrong_key"


@both
@pytest.mark.parametrize("case, least", [("busy", 0.25), ("busy-seconds", 0.7), ("busy-date", 0.8)])
def test_busy_once(at, case, least):
    start = time.monotonic()
    assert ask_endpoint(at(case), HELLO).attempts == 2
    assert time.monotonic() - start >= least


@both
def test_a_wait_that_is_too_long_is_told(at):
    error = fails(at("busy-hour"))
    assert (error.kind, error.attempts, error.retry_after) == ("rate_limited", 1, 3600)


@both
def test_a_server_that_stumbles_and_one_that_fell(at, address):
    assert ask_endpoint(at("stumbles"), HELLO).attempts == 2
    error = fails(at("status-500", max_retries=1))
    assert (error.kind, error.attempts, error.status) == ("server_error", 2, 500)
    assert len(address[1].asked["status-500"]) == 2


@both
@pytest.mark.parametrize(
    "status, kind, again",
    [
        (400, "bad_request", False),
        (401, "wrong_key", False),
        (403, "wrong_key", False),
        (404, "bad_request", False),
        (422, "bad_request", False),
        (408, "timeout", True),
        (409, "server_error", True),
        (429, "rate_limited", True),
        (529, "server_error", True),
    ],
)
def test_what_is_tried_again(at, address, status, kind, again):
    error = fails(at(f"status-{status}", max_retries=1))
    assert (error.kind, error.attempts) == (kind, 2 if again else 1)
    assert len(address[1].asked[f"status-{status}"]) == error.attempts


@pytest.mark.parametrize("provider", ["openai"])
def test_an_account_without_credit_is_not_asked_again(at):
    assert fails(at("broke")).attempts == 1


@both
@pytest.mark.parametrize("case", ["breaks", "ends-early"])
def test_a_stream_that_breaks_off(at, case):
    error = fails(at(case, max_retries=1), stream=True)
    assert (error.kind, error.attempts) == ("stream_broken", 2)


@both
def test_a_stream_that_breaks_off_once(at):
    reply = ask_endpoint(at("breaks-once"), HELLO, stream=True)
    assert reply.text.replace(" ", "") == "Hellothere." and reply.attempts == 2


@pytest.mark.parametrize("provider", ["anthropic"])
def test_an_error_in_a_stream(at):
    error = fails(at("overloaded", max_retries=0), stream=True)
    assert error.kind == "stream_broken" and "Overloaded" in str(error)


@both
@pytest.mark.parametrize("case, stream", [("page", False), ("torn", False), ("other", False), ("garbled", True)])
def test_what_is_no_json(at, case, stream):
    error = fails(at(case), stream=stream)
    assert (error.kind, error.attempts) == ("invalid_json", 1)


@both
def test_silence(at):
    error = fails(at("silent", timeout=0.3, max_retries=1))
    assert (error.kind, error.attempts) == ("timeout", 2)


@both
def test_nobody_there(provider):
    error = fails(Endpoint(provider=provider, model="m", base_url="http://127.0.0.1:9", max_retries=1))
    assert (error.kind, error.attempts) == ("unreachable", 2)


# --- the record -------------------------------------------------------------------------------------------------------


@both
def test_what_was_recorded_is_not_asked_again(at, address, tmp_path):
    record, endpoint = open_record(tmp_path), at("fine")
    reply = ask_recorded(endpoint, record, HELLO, max_tokens=30)
    assert ask_recorded(endpoint, record, HELLO, max_tokens=30) == reply
    keyless = replace(endpoint, api_key_env="NOT_SET")
    assert ask_recorded(keyless, open_record(tmp_path), HELLO, max_tokens=30, replay_only=True) == reply
    assert len(address[1].asked["fine"]) == 1
    with pytest.raises(NotRecorded):  # another server may call another model by this name
        ask_recorded(at("stumbles"), open_record(tmp_path), HELLO, max_tokens=30, replay_only=True)
    with pytest.raises(NotRecorded, match="holds 1 replies, and none of m to 'Who wrote the letter"):
        ask_recorded(endpoint, record, HELLO, max_tokens=31, replay_only=True)


@pytest.mark.parametrize("provider", ["openai"])
def test_a_record_becomes_an_artifact(at, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    work = begin_artifact(tmp_path / "out")
    reply = ask_recorded(at("keyed", api_key_env="SOME_KEY"), open_record(work), HELLO)
    seal(work, tmp_path / "out", "replies", "llmops.selection.recording", {}, {})
    assert verify(tmp_path / "out") and KEY not in (tmp_path / "out/replies.jsonl").read_text()
    assert ask_recorded(at("keyed"), open_record(tmp_path / "out"), HELLO, replay_only=True) == reply
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["digest.txt", "manifest.json", "replies.jsonl"]


@pytest.mark.parametrize("provider", ["openai"])
def test_a_half_written_line_is_dropped_and_asked_again(at, address, tmp_path):
    record, endpoint = open_record(tmp_path), at("fine")
    for n in (30, 31):
        ask_recorded(endpoint, record, HELLO, max_tokens=n)
    whole = record.file.read_bytes()
    record.file.write_bytes(whole[:-20])
    with pytest.warns(UserWarning, match="replies.jsonl: line 2 is half-written"):
        record = open_record(tmp_path)
    assert record.lines == 1 and record.file.read_bytes() == whole.splitlines(True)[0]
    ask_recorded(endpoint, record, HELLO, max_tokens=31)
    assert len(address[1].asked["fine"]) == 3 and open_record(tmp_path).lines == 2
    record.file.write_bytes(record.file.read_bytes().replace(b"letter", b"litter", 1))
    with pytest.raises(DataError, match="replies.jsonl, line 1: its question is not"):
        open_record(tmp_path)


WRITER = """
import sys
from llmops.selection.endpoints import Endpoint
from llmops.selection.recording import ask_recorded, open_record
url, folder, first = sys.argv[1:]
endpoint, record = Endpoint(provider="openai", model="m", base_url=url), open_record(folder)
for n in range(int(first), int(first) + 12):
    ask_recorded(endpoint, record, [{"role": "user", "content": f"{n} " + "long " * 4000}])
"""


@pytest.mark.parametrize("provider", ["openai"])
def test_two_processes_do_not_interleave(at, address, tmp_path):
    "Each asks twelve questions, six of them the other's, too; 20 kB a line."
    command = [sys.executable, "-c", WRITER, at("fine").base_url, str(tmp_path)]
    started = [subprocess.Popen([*command, first], cwd=ROOT) for first in ("0", "6")]
    try:
        assert [process.wait(limit(30)) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
            process.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = open_record(tmp_path)
    assert len(record.rows) == 18 and record.lines == len(address[1].asked["fine"])


@both
def test_a_cap_stops_before_it_is_crossed(at, address, tmp_path):
    record, endpoint = open_record(tmp_path), at("fine")
    bound = bound_price(endpoint, HELLO, 30, PRICES)
    cap = SpendingCap(limit=2 * bound)
    asked = 0
    with pytest.raises(SpendingCapReached, match="spent, the next request may cost up to .* the limit is"):
        for n in range(100):
            messages = [*HELLO[:1], {"role": "user", "content": f"Who wrote letter {n:03}"}]
            ask_recorded(endpoint, record, messages, max_tokens=30, cap=cap, prices=PRICES)
            asked += 1
    assert record.lines == asked
    billed = sum(row_price(row, PRICES) for row in record.rows.values())
    assert len(address[1].asked["fine"]) == asked > 2
    assert cap.spent == pytest.approx(billed) and cap.spent <= cap.limit < cap.spent + bound


@both
def test_attempts_that_may_have_been_billed_are_counted(at, tmp_path):
    endpoint = at("breaks-once", max_retries=1)
    bound, cap = bound_price(endpoint, HELLO, 30, PRICES), SpendingCap(limit=1.0)
    reply = ask_recorded(endpoint, open_record(tmp_path), HELLO, max_tokens=30, stream=True, cap=cap, prices=PRICES)
    assert cap.spent == pytest.approx(bound + request_price(endpoint, reply_tokens(reply), prices=PRICES))
    tight = SpendingCap(limit=1.5 * bound)
    with pytest.raises(SpendingCapReached):  # there is no room for the second attempt
        ask_recorded(
            at("breaks"), open_record(tmp_path / "b"), HELLO, max_tokens=30, stream=True, cap=tight, prices=PRICES
        )
    turned_away = SpendingCap(limit=1.0)
    with pytest.raises(EndpointError):
        ask_recorded(at("status-400"), open_record(tmp_path / "c"), HELLO, cap=turned_away, prices=PRICES)
    assert turned_away.spent == pytest.approx(0.0)


@pytest.mark.parametrize("provider", ["openai"])
def test_threads_share_a_cap(at, tmp_path):
    record, endpoint = open_record(tmp_path), at("fine")
    cap, stopped = SpendingCap(limit=3.5 * bound_price(endpoint, HELLO, 30, PRICES)), []

    def ask(n: int) -> None:
        try:
            for m in range(4):
                ask_recorded(
                    endpoint,
                    record,
                    [*HELLO, {"role": "user", "content": f"{n} {m}"}],
                    max_tokens=30,
                    cap=cap,
                    prices=PRICES,
                )
        except SpendingCapReached as e:
            stopped.append(e)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cap.spent <= cap.limit and record.lines == len(record.rows) >= 3


@pytest.mark.parametrize("provider", ["openai"])
def test_a_cap_needs_a_price(at, address, tmp_path):
    with pytest.raises(ParamError, match="nobody knows what m costs"):
        ask_recorded(at("fine"), open_record(tmp_path), HELLO, cap=SpendingCap(limit=1.0))
    assert "fine" not in address[1].asked


# --- this project's own gateway -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gateway() -> Iterator[str]:
    from llmops.deployment.gateway import create_app
    from llmops.deployment.transformers_engine import TransformersEngine
    from llmops.foundation.models import load_model
    from llmops.foundation.tiny import tiny_model

    engine = TransformersEngine(*load_model(tiny_model("llama"), dtype="float32"), 1024)
    with run_app(create_app({"model": "tiny", "context": 1024}, engine)) as url:
        yield f"{url}/v1"


@streamed
def test_the_projects_own_gateway(gateway, stream, tmp_path: Path):
    endpoint, record = Endpoint(provider="openai", model="tiny", base_url=gateway), open_record(tmp_path)
    reply = ask_recorded(endpoint, record, HELLO, max_tokens=8, temperature=0.0, seed=1, stream=stream)
    assert reply.text and reply.finish_reason == "length" and reply.completion_tokens == 8 and reply.prompt_tokens
    again: Reply = ask_endpoint(endpoint, HELLO, max_tokens=8, temperature=0.0, seed=1)
    assert again.text == reply.text
    assert json.loads(record.file.read_text())["reply"]["text"] == reply.text
    with pytest.raises(EndpointError, match="HTTP 404.*bad_request"):
        ask_endpoint(Endpoint(provider="openai", model="gpt-9", base_url=gateway), HELLO)
