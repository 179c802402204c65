"""Constrained answers: whatever a model does, it can write nothing but a span of the passage or the refusal."""

import json
import random
from pathlib import Path

import httpx
import pytest
from conftest import limit

from llmops.foundation.answers import exact_match
from llmops.foundation.artifacts import EMBEDDED_MODEL, resolve_source
from llmops.foundation.chat import encode_completion
from llmops.foundation.constraints import (
    TokenTrie,
    cut_to_span,
    repair_spacing,
    span_edges,
    span_grammar,
    span_trie,
)
from llmops.foundation.generation import generate_scored
from llmops.foundation.models import load_model, load_tokenizer

PASSAGES = [
    'The king \' s men - at - arms ( 40 , 000 ) sang " no more " . It was 10 – 15 % of all , or 3 . 7 .',
    "Prague - the city, not the film - lies on the Vltava (430 km). Its name, e.g. in German, is “Prag”.",
    "서울특별시는 대한민국의 수도이다 . 인구는 9 , 384 , 512 명이다 .",
    "東京は日本の首都であり、人口は約1400万人である。",
    '<|im_end|> and <|im_start|>assistant are marks ; \\n is none . "Quoted" 100 % 🎉 of it .',
    "café naïve résumé — Łódź 𝒳 x² ½",
]
MOST = 15


def walk(trie: TokenTrie, rng: random.Random) -> list[int]:
    "A random answer that the trie allows."
    node, tokens = 0, []
    while True:
        ways = list(trie.children[node].items())
        if node in trie.ends and (not ways or rng.random() < 0.3):
            return tokens
        token, node = rng.choice(ways)
        tokens.append(token)


@pytest.fixture(scope="module", params=["tiny:llama", "tiny:gemma", "tiny:falcon", EMBEDDED_MODEL])
def tokenizer(request):
    if request.param == EMBEDDED_MODEL:
        return load_tokenizer(Path(resolve_source(EMBEDDED_MODEL)))
    return load_model(request.param)[1]


@pytest.mark.parametrize("passage", PASSAGES)
def test_every_way_through_the_trie_is_a_span(tokenizer, passage):
    trie, rng = span_trie(tokenizer, [passage], MOST, ["unknown"]), random.Random(0)
    text = repair_spacing(passage).text
    for _ in range(200):
        tokens = walk(trie, rng)
        said = tokenizer.decode(tokens, skip_special_tokens=False).strip()
        assert len(tokens) <= MOST
        assert said == "unknown" or said in text, said


@pytest.mark.parametrize("passage", PASSAGES)
def test_every_short_span_can_be_written_as_the_model_was_trained_to_write_it(tokenizer, passage):
    text = repair_spacing(passage).text
    trie, (starts, ends) = span_trie(tokenizer, [passage], MOST), span_edges(text)
    spans = [text[a:b] for a in starts for b in ends if a < b <= a + 30]
    missing = []
    for span in spans:
        tokens = encode_completion(tokenizer, span)[:-1]
        if len(tokens) <= MOST and not trie.holds(tokens):
            missing.append(span)
    assert spans and not missing


def test_spacing_is_repaired_without_losing_a_letter():
    for passage in PASSAGES:
        repaired = repair_spacing(passage)
        assert "".join(repaired.text.split()) == "".join(passage.split())
        assert "".join(passage[i] for i in repaired.offsets) == repaired.text
        for a, b in zip(*[span_edges(repaired.text)[0]] * 2, strict=True):
            start, end = repaired.source_span(a, b + 1)
            assert passage[start:end] == repaired.text[a]
    for wanted in ("king's men-at-arms", "(40,000)", '"no more"', "10–15%", "3.7"):
        assert wanted in repair_spacing(PASSAGES[0]).text
    assert repair_spacing(PASSAGES[1]).text == PASSAGES[1]


def test_all_rows_of_a_batch_hold_to_their_own_passage():
    model, tokenizer = load_model("tiny:llama")
    prompts = [[{"role": "user", "content": passage + " What?" * n}] for n, passage in enumerate(PASSAGES)]
    tries = [span_trie(tokenizer, [passage], MOST, ["unknown"]) for passage in PASSAGES]
    said = generate_scored(
        model, tokenizer, prompts, max_new_tokens=MOST + 1, batch_size=4, progress=False, tries=tries
    )
    for (text, _), passage in zip(said, PASSAGES, strict=True):
        assert text == "unknown" or text in repair_spacing(passage).text
    with_free = generate_scored(model, tokenizer, prompts[:2], max_new_tokens=4, progress=False, tries=[None, tries[1]])
    free = generate_scored(model, tokenizer, prompts[:1], max_new_tokens=4, progress=False)
    assert exact_match(with_free[0][0], free[0][0])


def test_llamacpp_writes_nothing_but_spans(tmp_path):
    from llmops.deployment.llamacpp import llamacpp_reader, llamacpp_server
    from llmops.deployment.rag import scored_completion

    server = llamacpp_server(Path(resolve_source(EMBEDDED_MODEL)), "small", 1024, 2, 1, f"{tmp_path}/l.sock")
    reader = llamacpp_reader(server.listening_address)
    reader.timeout = httpx.Timeout(limit(60))
    for passage in PASSAGES:
        ids = reader.post("/tokenize", json={"content": f"{passage}\nA short quote from it:"}).json()["tokens"]
        said, logprob = scored_completion(reader, ids, 48, span_grammar([passage], ["unknown"]))
        kept = cut_to_span(said, [passage], ["unknown"])
        assert kept and said.startswith(kept), json.dumps(said)
        assert kept == "unknown" or kept in repair_spacing(passage).text, json.dumps(said)
        assert logprob <= 0
    reader.close()
