"""The repack is exact, and the server is one that an OpenAI client can rely on."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from openai import APIConnectionError, BadRequestError, InternalServerError, NotFoundError, OpenAI

from llmops.foundation.artifacts import begin_artifact, input_digest, seal, verify
from llmops.compression.quantization import QuantizationParams, quantize_rtn, write_checkpoint
from llmops.compression.repack import RepackError, checkpoint_tensors, gptq_weight, repack_checkpoint, unequal_tensors
from llmops.deployment.gateway import word_error
from llmops.deployment.llamacpp import LlamaCppEngine, llamacpp_reader, llamacpp_server
from llmops.deployment.completions import completion_response, parse_completion
from llmops.deployment.requests import ApiError, ChatRequest, Usage, parse_request
from llmops.deployment.token_prompts import apply_template, gguf_control_tokens, template_gaps
from llmops.deployment.transformers_engine import encode_request
from llmops.foundation.chat import ChatTemplateError, pin_templates, render
from llmops.deployment.serving import KIND, VOLATILE_FILES, ServingError, ServingParams, main, run_server, run_serving
from llmops.foundation.models import load_model, load_tokenizer
from llmops.foundation.tiny import tiny_model
from llmops.foundation.project import project_root
from llmops.studies.soak import draw_leavers, soak_leavers, soak_sequences

HELLO = [{"role": "user", "content": "Who wrote the letter?"}]


def quantize(arch: str, out: Path, **settings) -> Path:
    "A GPTQ checkpoint as GPTQModel writes it, in a process of its own: it changes torch's settings."
    code = f"""
import os; os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
from gptqmodel import GPTQModel, QuantizeConfig
model = GPTQModel.load({str(tiny_model(arch))!r}, QuantizeConfig(bits=4, sym=True, **{settings!r}), device="cpu")
model.quantize(["The letter was written by a clerk in the winter of 1911, and nobody read it."] * 8, batch_size=1)
model.save({str(out)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def rounded(arch: str, out: Path, group_size: int = 32) -> Path:
    "Plain rounding in GPTQ's format, as the quantisation stage writes it."
    out.mkdir()
    cfg = QuantizationParams(method="rtn", group_size=group_size)
    quantize_rtn(tiny_model(arch), out, cfg)
    write_checkpoint(tiny_model(arch), out, cfg, load_tokenizer(tiny_model(arch)))
    return out


@pytest.fixture(scope="module")
def gptq(tmp_path_factory):
    return quantize("llama", tmp_path_factory.mktemp("gptq") / "llama", group_size=32, desc_act=False)


def test_repack_of_a_gptqmodel_checkpoint_is_exact(gptq, tmp_path):
    types = repack_checkpoint(gptq, tmp_path / "model.gguf")
    assert types["Q4_0"] == 14 and sum(types.values()) == 20  # two layers of seven; embedding and five norms
    assert unequal_tensors(gptq, tmp_path / "model.gguf") == []


def test_our_dequantisation_is_gptqmodels(gptq):
    "The comparison would prove little if both sides of it were only ours."
    model, _ = load_model(gptq, dtype="float32")
    layers, checked = dict(model.named_modules()), 0
    for name, parts in checkpoint_tensors(gptq):
        if "qweight" in parts and hasattr(layers[name], "dequantize_weight"):
            theirs = layers[name].dequantize_weight().float().T.numpy()
            ours = gptq_weight(parts, 1)
            assert theirs.shape == ours.shape
            assert np.array_equal(ours.astype(np.float16), theirs.astype(np.float16)), name
            checked += 1
    assert checked == 14


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2"])
def test_llamacpp_reads_the_repack_as_transformers_reads_the_checkpoint(arch, tmp_path):
    "Names, row order, rotary settings and biases are right when both engines say the same."
    folder = rounded(arch, tmp_path / arch)
    repack_checkpoint(folder, tmp_path / "model.gguf")
    server = llamacpp_server(tmp_path / "model.gguf", arch, 256, 1, 1)
    rng = np.random.default_rng(0)
    rows = [rng.integers(20, 40000, 24).tolist() for _ in range(6)]
    found = [
        server.handle_completions({"prompt": r, "max_tokens": 1, "temperature": 0, "logprobs": 5})["choices"][0][
            "logprobs"
        ]
        for r in rows
    ]
    model = plain_model(folder, tiny_model(arch))
    agree = []
    for row, said in zip(rows, found, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([row])).logits[0, -1].log_softmax(-1)
        first = said["content"][0]
        agree.append(abs(expected[first["id"]].item() - first["logprob"]))
    assert np.median(agree) < 0.05, agree


def plain_model(folder: Path, base: Path):
    "The checkpoint's weights in plain float32 layers."
    model, _ = load_model(base, dtype="float32")
    state = model.state_dict()
    for name, parts in checkpoint_tensors(folder):
        if "qweight" in parts:
            state[f"{name}.weight"].copy_(torch.from_numpy(np.ascontiguousarray(gptq_weight(parts, 1))))
    return model


def test_what_has_no_exact_form_is_refused_and_leaves_nothing(gptq, tmp_path):
    ordered = quantize("llama", tmp_path / "ordered", group_size=32, desc_act=True)
    with pytest.raises(RepackError, match="act-order"):
        repack_checkpoint(ordered, tmp_path / "no.gguf")
    config = json.loads((ordered / "config.json").read_text())
    config["quantization_config"]["desc_act"] = False  # the flag lies; the tensors do not
    (ordered / "config.json").write_text(json.dumps(config))
    try:
        repack_checkpoint(ordered, tmp_path / "no.gguf")
    except RepackError as e:
        assert "group index is permuted" in str(e)
        assert not (tmp_path / "no.gguf").exists()
    with pytest.raises(RepackError, match="16 is no multiple of Q4_0's 32"):
        repack_checkpoint(rounded("llama", tmp_path / "g16", 16), tmp_path / "no.gguf")
    with pytest.raises(RepackError, match="falcon is not one of"):
        other = shutil.copytree(gptq, tmp_path / "falcon")
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {"model_type": "falcon"}))
        repack_checkpoint(other, tmp_path / "no.gguf")
    assert not list(tmp_path.glob("*.gguf"))


def test_name_and_licence_come_from_the_gguf_that_the_base_came_from(gptq, tmp_path):
    import gguf

    from llmops.foundation.artifacts import EMBEDDED_MODEL, resolve_source
    from llmops.compression.repack import base_gguf, gguf_fields

    base, made = tmp_path / "base", tmp_path / "gptq"
    work = begin_artifact(base)
    (work / "config.json").write_text("{}")
    seal(work, base, "model", "llmops.foundation.models", {}, {"model": EMBEDDED_MODEL})
    work = begin_artifact(made)
    shutil.copytree(gptq, work, dirs_exist_ok=True)
    seal(work, made, "gptq", "llmops.compression.quantization", {}, {"model": base})
    assert base_gguf(made) == resolve_source(EMBEDDED_MODEL) and base_gguf(gptq) is None
    repack_checkpoint(made, tmp_path / "model.gguf")
    fields = gguf_fields(tmp_path / "model.gguf", "general.")
    assert fields["general.license"][0] == "apache-2.0"
    assert fields["general.file_type"][0] == int(gguf.LlamaFileType.MOSTLY_Q4_0)


def test_one_changed_scale_is_found(gptq, tmp_path):
    repack_checkpoint(gptq, tmp_path / "model.gguf")
    data = bytearray((tmp_path / "model.gguf").read_bytes())
    data[-40] ^= 1
    (tmp_path / "model.gguf").write_bytes(data)
    assert len(unequal_tensors(gptq, tmp_path / "model.gguf")) == 1


# --- the server -------------------------------------------------------------------------------------------------------


def served(out: Path, **params):
    cfg = ServingParams(
        out=str(out), questions=1, max_tokens=8, speed_tokens=4, threads=1, **{"wandb": "disabled", **params}
    )
    before = torch.get_num_threads()
    made = run_serving(cfg)
    assert torch.get_num_threads() == before  # what runs next in this process computes as it would have
    manifest = seal(
        made.work, cfg.out, KIND, "llmops.deployment.serving", cfg, made.inputs, made.metrics, VOLATILE_FILES
    )
    return made, manifest


@pytest.fixture(scope="module")
def stages(gptq, tmp_path_factory):
    home = tmp_path_factory.mktemp("served")
    winner = home / "leaderboard"
    work = begin_artifact(winner)
    (work / "winner.json").write_text(
        json.dumps({"version": "tiny-gptq", "ref": str(gptq), "digest": input_digest(gptq)})
    )
    seal(work, winner, "leaderboard", "llmops.decision.leaderboard", {})
    return {
        "llamacpp": (home / "fast", *served(home / "fast", model=str(winner))),
        "transformers": (home / "plain", *served(home / "plain", model="tiny:llama")),
    }


def test_a_smaller_output_matrix_and_drafts_are_told_and_served(gptq, stages, tmp_path):
    made, _ = served(tmp_path / "q8", model=str(gptq), engine="llamacpp", output_tensor_type="q8_0", prompt_lookup=True)
    assert "the output matrix rounded to 8 bits" in made.about["reason"] and made.about["prompt_lookup"] is True
    assert made.metrics["size_mb"] < stages["llamacpp"][1].metrics["size_mb"]
    with run_server(tmp_path / "q8", threads=1) as (address, _):
        quoting = [{"role": "user", "content": "the letter of the clerk, the letter of the clerk, the letter of"}]
        body = {"model": made.about["model"], "messages": quoting, "max_tokens": 24, "ignore_eos": True}
        answers = [httpx.post(f"{address}/chat/completions", json=body, timeout=60).json() for _ in range(2)]
    assert answers[0]["usage"]["completion_tokens"] == 24
    assert answers[0]["choices"][0]["message"] == answers[1]["choices"][0]["message"]


@pytest.mark.parametrize("more", [{"output_tensor_type": "q8_0"}, {"prompt_lookup": True}])
@pytest.mark.parametrize("engine", ["auto", "transformers"])
def test_what_only_llamacpp_has_is_not_lost_on_another_engine(engine, more):
    with pytest.raises(ValueError, match="only llama.cpp has them"):
        ServingParams(engine=engine, **more)


@pytest.fixture(scope="module", params=["llamacpp", "transformers"])
def server(stages, request):
    folder, made, manifest = stages[request.param]
    with run_server(folder, threads=1) as (address, process):
        client = OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60)
        yield client, made, manifest, process


def test_stage(stages):
    folder, made, manifest = stages["llamacpp"]
    assert made.about["engine"] == "llamacpp" and made.about["model"] == "tiny-gptq"
    assert made.metrics["decode_ratio"] > 0 and "decode_tokens_per_second" in json.dumps(made.speed)
    assert set(manifest["files"]) == {"model.gguf", "serving.json"}  # answers and times stay out of the digest
    assert made.answers[0]["answer"] == made.answers[0]["streamed"]
    assert verify(folder) == manifest["digest"]
    assert stages["transformers"][1].about["reason"] == "the model is no GPTQ checkpoint"


def test_stage_gives_the_same_digest_again(stages, gptq, tmp_path):
    repack_checkpoint(gptq, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == (stages["llamacpp"][0] / "model.gguf").read_bytes()


def test_engine_that_is_asked_for_is_not_replaced(tmp_path):
    with pytest.raises(RepackError, match="is no GPTQ checkpoint"):
        served(tmp_path / "no", model="tiny:llama", engine="llamacpp")
    assert not (tmp_path / "no").exists()


def test_models_and_health(server):
    client, made, manifest, _ = server
    model = client.models.list().data[0]
    assert model.id == made.about["model"]
    assert model.digest == made.about["digest"] and model.served_digest == manifest["digest"]
    assert httpx.get(str(client.base_url).replace("/v1/", "/health")).json()["status"] == "ok"


def test_plain_and_streamed_answers_agree(server):
    client, made, *_ = server
    ask = {"model": made.about["model"], "messages": HELLO, "max_tokens": 12}
    plain = client.chat.completions.create(**ask)
    assert plain.choices[0].finish_reason in ("stop", "length")
    assert plain.usage.total_tokens == plain.usage.prompt_tokens + plain.usage.completion_tokens
    assert 0 < plain.usage.completion_tokens <= 12
    parts = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == plain.choices[0].message.content
    assert [p.choices[0].finish_reason for p in parts if p.choices][-1] == plain.choices[0].finish_reason
    assert parts[-1].usage.completion_tokens == plain.usage.completion_tokens


def test_sampling_stop_and_parts(server):
    client, made, *_ = server

    def say(**kwargs):
        return client.chat.completions.create(
            **{"model": made.about["model"], "messages": HELLO, "max_tokens": 12} | kwargs
        )

    greedy = say().choices[0].message.content
    assert say(temperature=0).choices[0].message.content == greedy
    warm = [say(temperature=1.5, seed=s).choices[0].message.content for s in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]
    stop = greedy[len(greedy) // 2 :][:3]
    cut = say(stop=[stop])
    assert cut.choices[0].message.content == greedy[: greedy.index(stop)] and cut.choices[0].finish_reason == "stop"
    assert (
        say(messages=[{"role": "user", "content": [{"type": "text", "text": HELLO[0]["content"]}]}])
        .choices[0]
        .message.content
        == greedy
    )


def test_an_answer_ends_when_nobody_says_where(server):
    client, made, *_ = server
    assert client.models.list().data[0].limits == made.about["limits"]
    for ask, most in (({"temperature": 1.5, "seed": 1}, 256), ({}, 256), ({"max_tokens": 700}, 700)):
        ask = {"model": made.about["model"], "messages": HELLO} | ask
        plain = client.chat.completions.create(**ask)
        parts = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
        assert 0 < plain.usage.completion_tokens <= most
        assert parts[-1].usage == plain.usage
        last, reason = [p for p in parts if p.choices][-1], plain.choices[0].finish_reason
        assert last.choices[0].finish_reason == reason
        told = (plain.model_extra or {}).get("llmops")
        assert (last.model_extra or {}).get("llmops") == told
        if reason == "length" and plain.usage.completion_tokens < most:
            assert told == {"stopped": "repetition"}
        elif "max_tokens" not in ask and plain.usage.completion_tokens == most:
            assert told in ({"stopped": "default_max_tokens"}, {"stopped": "repetition"})


@pytest.mark.parametrize(
    "wrong, error, says",
    [
        ({"messages": []}, BadRequestError, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, BadRequestError, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 7}]}, BadRequestError, "messages.0.content"),
        ({"model": "gpt-9"}, NotFoundError, "there is no 'gpt-9' here"),
        ({"temperature": -1}, BadRequestError, "temperature"),
        ({"max_tokens": 0}, BadRequestError, "max_tokens"),
        ({"top_p": 0}, BadRequestError, "top_p"),
        ({"n": 17}, BadRequestError, "n: "),
        (
            {"messages": [{"role": "user", "content": "letter " * 3000}]},
            BadRequestError,
            "tokens and the context holds 1024",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_get_openai_errors(server, wrong, error, says, stream):
    client, made, *_ = server
    with pytest.raises(error) as e:
        client.chat.completions.create(
            **{"model": made.about["model"], "messages": HELLO, "max_tokens": 4, "stream": stream} | wrong
        )
    assert says in e.value.body["message"] and e.value.body["type"] == "invalid_request_error"
    if "letter letter" in json.dumps(wrong):
        assert e.value.body["code"] == "context_length_exceeded" and e.value.body["param"] == "messages"


def test_what_is_not_json_and_what_is_not_there(server):
    client, *_ = server
    base = str(client.base_url)
    assert httpx.post(f"{base}chat/completions", content=b"{").status_code == 400
    assert httpx.get(f"{base}nothing").json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{base}models", headers={"host": "example.org"}).status_code == 400  # a page of another site


def test_concurrent_requests(server):
    client, made, *_ = server
    texts, answers = [f"What is {i} and {i}?" for i in range(6)], {}

    def ask(text):
        reply = client.chat.completions.create(
            model=made.about["model"], messages=[{"role": "user", "content": text}], max_tokens=8
        )
        answers[text] = reply.usage.completion_tokens

    threads = [threading.Thread(target=ask, args=(t,)) for t in texts]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert sorted(answers) == sorted(texts) and all(0 < n <= 8 for n in answers.values())


def test_the_next_request_is_answered_whoever_left_before(server):
    client, made, _, process = server
    found = soak_leavers(address_of(client), made.about["model"], process.pid, draw_leavers(24, seed=5, longest=0.3))
    assert found["unanswered"] == 0 and found["slowest_seconds"] < 2, found
    assert found["still_running"] == 0 and found["more_threads"] <= 0 and found["more_files"] <= 0, found


@pytest.mark.parametrize("clients", [1, 4, 16])
def test_requests_in_a_row(server, clients):
    found = soak_sequences(address_of(server[0]), clients, requests=34, pauses=1, seed=clients, longest=0.5)
    assert found["failed"] == 0, found


def test_a_plain_answer_that_nobody_waits_for_is_not_computed(gptq, tmp_path):
    "With a context in which llama.cpp would write for a long while."
    repack_checkpoint(gptq, tmp_path / "model.gguf")
    server = llamacpp_server(tmp_path / "model.gguf", "m", 100_000, 1, 1, str(tmp_path / "up.sock"))
    engine = LlamaCppEngine(server, gguf_control_tokens(tmp_path / "model.gguf"), slots=1)
    request = ChatRequest(model="m", messages=HELLO, max_tokens=90_000, ignore_eos=True)

    async def main() -> None:
        for stays in (0.02, 0.3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(engine(request), stays)
            async with asyncio.timeout(2):
                while (await engine.check_health())["running"]:
                    await asyncio.sleep(0.02)

    asyncio.run(main())


TURNS = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "How is the weather?"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
    },
    {"role": "tool", "content": "sunny", "tool_call_id": "call_1"},
]
NOTHING = dict.fromkeys(["temperature", "top_p", "n", "stream", "stop", "seed", "tools", "response_format", "user"])


def test_what_openai_accepts_is_accepted(server):
    client, made, *_ = server
    ask = {"model": made.about["model"], "messages": HELLO, "max_tokens": 4}
    plain = post(client, ask)
    assert "x-ignored-fields" not in plain.headers
    for more in (NOTHING, {"response_format": {"type": "text"}, "tool_choice": "none"}, {"reasoning_effort": "low"}):
        same = post(client, ask | more)
        assert same.status_code == 200, same.text
        assert same.json()["choices"] == plain.json()["choices"]
        assert same.headers.get("x-ignored-fields") == ("reasoning_effort" if "reasoning_effort" in more else None)
    turns = post(client, ask | {"messages": TURNS})
    assert turns.status_code == 200, turns.text
    dropped = post(client, ask | {"messages": [*TURNS[:2], {"role": "assistant", "content": ""}, TURNS[3]]})
    assert turns.json()["usage"]["prompt_tokens"] > dropped.json()["usage"]["prompt_tokens"]  # the call is shown
    refused = post(client, ask | {"temprature": 0.5})
    assert refused.status_code == 400 and "temprature: the" in refused.json()["error"]["message"]


def test_places_and_methods(server):
    client, made, *_ = server
    name, base = made.about["model"], str(client.base_url)
    assert client.models.retrieve(name).id == name
    assert [httpx.head(f"{base}models{slash}").status_code for slash in ("", "/", f"/{name}")] == [200, 200, 200]
    page = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    allowed = httpx.options(f"{base}chat/completions", headers=page)
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == page["Origin"]
    assert httpx.options(f"{base}chat/completions").status_code == 204


GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for turn in messages %}{% if (turn.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{{ turn.role + ':' + turn.content }}{% endfor %}"
)
DEAF = (
    "{% for turn in messages if turn.role in ('user', 'assistant') %}{{ turn.role + ':' + turn.content }}{% endfor %}"
)
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"role": "tool", "content": "sunny", "tool_call_id": "call_1"}


@pytest.fixture(scope="module", params=[GEMMA, DEAF], ids=["gemma", "deaf"])
def strict(gptq, tmp_path_factory, request):
    "An engine, a client of its llama.cpp, and the tokenizer of a model with a template that knows little."
    home = tmp_path_factory.mktemp("strict")
    folder = shutil.copytree(gptq, home / "model")
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = request.param
    tokenizer.save_pretrained(folder)
    repack_checkpoint(folder, home / "model.gguf")
    server = llamacpp_server(home / "model.gguf", "m", 256, 1, 1, str(home / "up.sock"))
    with llamacpp_reader(server.listening_address) as reader:
        gaps = template_gaps(reader)
    yield LlamaCppEngine(server, gguf_control_tokens(home / "model.gguf"), slots=1, gaps=gaps), tokenizer
    del server


ASSISTANT = {"role": "assistant", "content": "Hi"}


@pytest.mark.parametrize("messages", [[SYSTEM], [SYSTEM, ASSISTANT], [*HELLO, ASSISTANT, TOOL]])
def test_what_a_template_does_not_take_is_refused(strict, messages):
    engine, tokenizer = strict
    request = parse_request(json.dumps({"model": "m", "messages": messages, "max_tokens": 2}).encode(), "m")
    with pytest.raises((ApiError, ChatTemplateError), match="^messages: the model's chat template") as e:
        asyncio.run(engine(request))
    assert word_error(e.value).status == 400
    with pytest.raises(ChatTemplateError, match="^messages: the model's chat template"):
        encode_request(tokenizer, request, 256)


def test_what_a_template_does_not_know_is_written_into_the_turns(strict):
    engine, tokenizer = strict
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Seoul"}'}}
    turns = [SYSTEM, *HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}, *HELLO]
    body = {"model": "m", "messages": turns, "max_tokens": 2}
    request = parse_request(json.dumps(body).encode(), "m")
    answer = json.loads(asyncio.run(engine(request)).body)
    ids = encode_request(tokenizer, request, 256)
    assert answer["usage"]["prompt_tokens"] == len(ids) and "Seoul" in tokenizer.decode(ids)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
    with pytest.raises(ApiError, match="^tools: the llama.cpp engine"):
        asyncio.run(engine(parse_request(json.dumps(body | {"tools": tools}).encode(), "m")))


def test_a_pinned_date_is_the_same_in_llamacpp(gptq, tmp_path):
    folder = shutil.copytree(gptq, tmp_path / "dated")
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}: " + DEAF
    pin_templates(tokenizer, "2026-01-31")
    tokenizer.save_pretrained(folder)
    repack_checkpoint(folder, tmp_path / "model.gguf")
    server = llamacpp_server(tmp_path / "model.gguf", "m", 256, 1, 1, str(tmp_path / "up.sock"))
    with llamacpp_reader(server.listening_address) as reader:
        assert apply_template(reader, HELLO) == render(tokenizer, HELLO, add_generation_prompt=True)
        assert apply_template(reader, HELLO).startswith("31 Jan 2026: user:")


def test_an_engine_that_is_dead_is_not_well(gptq, tmp_path):
    repack_checkpoint(gptq, tmp_path / "model.gguf")
    server = llamacpp_server(tmp_path / "model.gguf", "m", 256, 1, 1, str(tmp_path / "up.sock"))
    engine = LlamaCppEngine(server, gguf_control_tokens(tmp_path / "model.gguf"), slots=1)
    assert asyncio.run(engine.check_health()) == {"running": 0}
    del server, engine.server
    with pytest.raises(ServingError, match="llama.cpp does not answer"):
        asyncio.run(engine.check_health())


def test_an_engine_that_dies_is_started_again(gptq, tmp_path):
    "One 503 with the reason, and the next request is answered."
    repack_checkpoint(gptq, tmp_path / "model.gguf")
    opened = []

    def reopen():
        opened.append(1)
        return llamacpp_server(tmp_path / "model.gguf", "m", 256, 1, 1, str(tmp_path / f"{len(opened)}.sock"))

    async def main():
        engine = LlamaCppEngine(reopen(), gguf_control_tokens(tmp_path / "model.gguf"), slots=1, reopen=reopen)
        request = ChatRequest(model="m", messages=HELLO, max_tokens=2)
        usage = Usage()
        assert (await engine(request, usage)).status_code == 200 and usage.completion_tokens == 2
        del engine.server
        with pytest.raises(ApiError, match="runs again") as e:
            await engine(request)
        assert e.value.status == 503 and e.value.headers == {"retry-after": "1"}
        assert (await engine(request)).status_code == 200 and len(opened) == 2

    asyncio.run(main())


def test_a_completion_of_llamacpp_is_the_continuation_of_the_prompt(gptq, tmp_path):
    repack_checkpoint(gptq, tmp_path / "model.gguf")
    server = llamacpp_server(tmp_path / "model.gguf", "m", 256, 1, 1, str(tmp_path / "up.sock"))
    engine = LlamaCppEngine(server, gguf_control_tokens(tmp_path / "model.gguf"), slots=1)
    ids = [50, 60, 70]
    alone = server.handle_completions({"prompt": ids, "max_tokens": 3, "temperature": 0})["choices"][0]["text"]

    async def main():
        request, prompt = parse_completion(json.dumps({"model": "m", "prompt": ids, "max_tokens": 3}).encode(), "m")
        usage = Usage()
        answer = json.loads(completion_response(await engine(request, usage, prompt)).body)
        assert answer["choices"][0]["text"] == alone and answer["usage"]["prompt_tokens"] == 3
        assert (usage.prompt_tokens, usage.completion_tokens) == (3, 3)

    asyncio.run(main())


def address_of(client: OpenAI) -> str:
    return str(client.base_url).rstrip("/")


def post(client: OpenAI, body: dict) -> httpx.Response:
    return httpx.post(f"{client.base_url}chat/completions", json=body, timeout=60)


def test_port_in_use(stages):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "llmops.deployment.serving", str(stages["llamacpp"][0]), "--port", str(port)],
            cwd=project_root(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 1
        assert done.stderr.strip() == (
            f"error: port {port}: cannot be used (Address already in use); "
            "end the program that has it, or choose another with --port (0 for any)"
        )
        with pytest.raises(ServingError, match="cannot be used"), run_server(stages["llamacpp"][0], port):
            pass


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_ends_cleanly(stages, end):
    with run_server(stages["llamacpp"][0], threads=1) as (address, process):
        OpenAI(base_url=address, api_key="none").models.list()
        process.send_signal(end)
        assert process.wait(120) == 0


def test_killed_server(stages):
    with run_server(stages["llamacpp"][0], threads=1) as (address, process):
        client = OpenAI(base_url=address, api_key="none", max_retries=0, timeout=20)
        stream = client.chat.completions.create(
            model="tiny-gptq", messages=HELLO, max_tokens=900, stream=True, temperature=2, seed=1
        )
        next(iter(stream))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with pytest.raises(Exception):  # noqa: B017 - the transport names it in different ways
            list(stream)
        with pytest.raises(APIConnectionError):
            client.models.list()


def test_altered_or_missing_artifact_is_not_served(stages, tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "no serving.json" in capsys.readouterr().err
    copy = shutil.copytree(stages["llamacpp"][0], tmp_path / "copy")
    data = bytearray((copy / "model.gguf").read_bytes())
    data[-1] ^= 1
    (copy / "model.gguf").write_bytes(data)
    assert main([str(copy), "--port", "0"]) == 1
    assert "model.gguf: altered since it was sealed" in capsys.readouterr().err


def test_the_log_has_no_content(stages):
    folder = stages["llamacpp"][0]
    process = subprocess.Popen(
        [sys.executable, "-m", "llmops.deployment.serving", str(folder), "--port", "0"],
        cwd=project_root(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    line = next(x for x in process.stdout if x.startswith("serving "))
    client = OpenAI(base_url=line.split()[-1], api_key="none")
    client.chat.completions.create(model="tiny-gptq", messages=[{"role": "user", "content": "xyzzy"}], max_tokens=2)
    process.send_signal(signal.SIGINT)
    log, _ = process.communicate(timeout=120)
    assert "POST /v1/chat/completions" in log and "200" in log and "xyzzy" not in log
    assert "Traceback" not in log
