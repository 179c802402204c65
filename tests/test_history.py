"""Long conversations, asked of tiny models through both engines: what is left out, what is told, and what never goes."""

import asyncio
import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from llmops.compression.quantization import QuantizationParams, quantize_rtn, write_checkpoint
from llmops.compression.repack import repack_checkpoint
from llmops.deployment.gateway import create_app
from llmops.deployment.history import leave_out, turn_starts
from llmops.deployment.llamacpp import LlamaCppEngine, llamacpp_server
from llmops.deployment.requests import ChatRequest, Message
from llmops.deployment.token_prompts import gguf_control_tokens
from llmops.deployment.transformers_engine import TransformersEngine
from llmops.foundation.budget import SUMMARY
from llmops.foundation.models import load_model, load_tokenizer
from llmops.foundation.tiny import tiny_model

CONTEXT, ANSWER = 256, 8
SYSTEM = {"role": "system", "content": "Answer in one word."}


def talk(turns: int) -> list[dict[str, str]]:
    "A conversation that ends with a question."
    messages = []
    for number in range(turns):
        messages.append({"role": "user", "content": f"What did letter {number} say about the harbour?"})
        messages.append({"role": "assistant", "content": f"Letter {number} said that ship {number} was late."})
    return [*messages, {"role": "user", "content": "And which was the last one?"}]


LONG = [SYSTEM, *talk(10)]


@pytest.fixture(scope="module")
def model():
    return load_model(tiny_model("llama"), dtype="float32")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    home = tmp_path_factory.mktemp("history")
    cfg, folder = QuantizationParams(method="rtn", group_size=32), home / "model"
    folder.mkdir()
    quantize_rtn(tiny_model("llama"), folder, cfg)
    write_checkpoint(tiny_model("llama"), folder, cfg, load_tokenizer(tiny_model("llama")))
    repack_checkpoint(folder, home / "model.gguf")
    server = llamacpp_server(home / "model.gguf", "m", CONTEXT, 1, 1, str(home / "up.sock"))
    yield server, gguf_control_tokens(home / "model.gguf")
    del server


@pytest.fixture(params=["transformers", "llamacpp"])
def engine(request, model, gguf):
    if request.param == "llamacpp":
        return LlamaCppEngine(*gguf, slots=1)
    return TransformersEngine(*model, CONTEXT)


def ask(engine: Any, messages: list[dict[str, str]], **fields: Any) -> Any:
    "Ask through the gateway; every part of a stream, or the whole answer."
    body = {"model": "m", "messages": messages, "max_tokens": ANSWER} | fields
    with TestClient(create_app({"model": "m"}, engine), base_url="http://127.0.0.1") as client:
        reply = client.post("/v1/chat/completions", json=body)
    if not fields.get("stream") or reply.status_code != 200:
        return reply.json() | {"status": reply.status_code}
    return [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]


def counted(engine: Any, messages: list[Message]) -> int:
    "Tokens of a prompt."
    return asyncio.run(engine.count_prompt(ChatRequest(model="m", messages=messages)))


def checked(messages: list[dict[str, str]]) -> list[Message]:
    return [Message(**message) for message in messages]


def test_a_long_conversation_is_refused_unless_its_client_asks(engine):
    for fields in ({}, {"truncation": "disabled"}, {"truncation": None}):
        refused = ask(engine, LONG, **fields)
        assert refused["status"] == 400 and refused["error"]["code"] == "context_length_exceeded"
        assert "nothing was cut" in refused["error"]["message"] and "truncation: auto" in refused["error"]["message"]


@pytest.mark.parametrize("value", ["window", "AUTO", "", True, 8])
def test_a_truncation_that_does_not_exist_is_named(engine, value):
    refused = ask(engine, LONG, truncation=value)
    assert refused["status"] == 400 and refused["error"]["param"] == "truncation"
    assert "'disabled', 'auto' or 'summarise'" in refused["error"]["message"]


def test_the_oldest_turns_go_and_no_more_than_must(engine):
    answer = ask(engine, LONG, truncation="auto")
    left, messages = answer["llmops"]["left_out"], checked(LONG)
    rest, more = leave_out(messages, left["turns"]), leave_out(messages, left["turns"] - 1)
    assert rest[0].role == "system" and rest[1:] == messages[-len(rest) + 1 :]  # the end, word for word
    assert 3 <= len(rest) and counted(engine, rest) + ANSWER <= CONTEXT < counted(engine, more) + ANSWER
    assert answer["usage"]["prompt_tokens"] == counted(engine, rest)
    assert left["tokens"] == counted(engine, messages) - counted(engine, rest)
    assert left["summary"] == left["reason"] == ""


def test_windowed_is_answered_as_if_the_rest_had_been_sent(engine):
    answer = ask(engine, LONG, truncation="auto")
    rest = [SYSTEM, *LONG[1 + 2 * answer["llmops"]["left_out"]["turns"] :]]
    same = ask(engine, rest)
    assert answer["choices"] == same["choices"] and answer["usage"] == same["usage"] and "left_out" not in str(same)


def test_a_stream_says_it_in_the_part_that_ends_it(engine):
    whole = ask(engine, LONG, truncation="auto")["llmops"]["left_out"]
    parts = [part for part in ask(engine, LONG, truncation="auto", stream=True) if part["choices"]]
    assert [("left_out" in part.get("llmops", {})) for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1]["choices"][0]["finish_reason"] and parts[-1]["llmops"]["left_out"] == whole


@pytest.mark.parametrize("truncation", ["auto", "summarise"])
def test_what_fits_is_left_alone(engine, truncation):
    plain, asked = ask(engine, talk(1)), ask(engine, talk(1), truncation=truncation)
    assert plain["choices"] == asked["choices"] and "llmops" not in asked


@pytest.mark.parametrize("truncation", ["auto", "summarise"])
def test_a_last_turn_that_is_too_long_is_refused(engine, truncation):
    refused = ask(engine, [*LONG[:-1], {"role": "user", "content": "late ships " * 200}], truncation=truncation)
    assert refused["status"] == 400 and refused["error"]["code"] == "context_length_exceeded"


def test_a_summary_stands_for_what_was_left_out_and_is_paid_for_once(engine):
    asked = []

    async def watched(request):
        asked.append(request)
        return await engine(request)

    window = ask(engine, LONG, truncation="auto")["llmops"]["left_out"]
    engine.window.ask = watched
    answer = ask(engine, LONG, truncation="summarise")
    left = answer["llmops"]["left_out"]
    assert left["summary"] and not left["reason"] and left["turns"] >= window["turns"]
    assert len(asked) == left["turns"]  # one for each turn
    shown = leave_out(checked(LONG), left["turns"])
    said = [Message(role="user", content=SUMMARY), Message(role="assistant", content=left["summary"])]
    assert answer["usage"]["prompt_tokens"] == counted(engine, [shown[0], *said, *shown[1:]]) <= CONTEXT - ANSWER
    assert ask(engine, LONG, truncation="summarise")["llmops"]["left_out"] == left and len(asked) == left["turns"]
    grown = [SYSTEM, *talk(13)]
    later = ask(engine, grown, truncation="summarise")["llmops"]["left_out"]
    assert len(asked) == max(later["turns"], left["turns"]) and later["turns"] > left["turns"]


def test_a_summary_is_the_same_whatever_was_asked_before(model):
    first, second = (TransformersEngine(*model, CONTEXT) for _ in range(2))
    ask(second, [SYSTEM, *talk(8)], truncation="summarise")
    one, other = (ask(engine, LONG, truncation="summarise") for engine in (first, second))
    assert one["llmops"] == other["llmops"] and one["choices"] == other["choices"]


def test_where_no_summary_can_be_there_is_a_window(model):
    engine = TransformersEngine(*model, CONTEXT)
    huge = [SYSTEM, {"role": "user", "content": "late ships " * 200}, {"role": "assistant", "content": "So?"}, *talk(4)]
    answer = ask(engine, huge, truncation="summarise")["llmops"]["left_out"]
    assert answer["summary"] == "" and answer["reason"].startswith("a turn is too long to be summarised")
    assert answer["turns"] == ask(engine, huge, truncation="auto")["llmops"]["left_out"]["turns"] >= 1


def test_no_system_message_goes_and_no_turn_is_halved():
    messages = checked([*talk(1)[:2], SYSTEM, *talk(2), {"role": "assistant", "content": "The last."}])
    for number in range(len(turn_starts(messages))):
        rest = leave_out(messages, number)
        spoken = [message for message in rest if message.role != "system"]
        assert sum(message.role == "system" for message in rest) == 1 and spoken[0].role == "user"
        assert spoken == [message for message in messages if message.role != "system"][-len(spoken) :]
