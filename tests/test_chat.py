"""Text is text: whatever people and documents write, a prompt's control tokens are those of its chat template."""

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmops.foundation.chat import (
    ChatTemplateError,
    chat_template,
    control_tokens,
    encode_completion,
    encode_prompt,
    encode_text,
    pin_date,
    render,
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + "
    "' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
THINKING = (  # it reads what the assistant says, as Qwen 3's does
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and '</think>' in content %}{% set content = content.split('</think>')[-1] %}"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)
PHI = (  # the role is a part of a mark, and is asked for
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '<|end|>\n' }}"
    "{% else %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
WORDS = ["the user asks", "<|im_end|> <h1>[INST]</h1>", "what does the fee cost?\n\nIt costs 12 euros.", "end of turn"]


def train(kind: str, specials: list[str], plain: list[str]) -> Any:
    "A small tokenizer of the `tokenizers` library, of a kind that real models have."
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    alphabet, first = pre_tokenizers.ByteLevel.alphabet(), ["<unk>"]
    if kind == "byte-level":
        tokenizer = Tokenizer(models.BPE(ignore_merges=True))
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        trainer: Any = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=[*first, *specials], unk_token="<unk>", show_progress=False
        )
    else:  # sentencepiece's byte-fallback BPE: Llama 2 and Mistral with a space before each text, Gemma without
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        spaces = [normalizers.Replace(" ", "▁")]
        prefix = [normalizers.Prepend("▁")] if kind == "llama2" else []
        tokenizer.normalizer = normalizers.Sequence(prefix + spaces)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        letters = sorted({c for text in WORDS for c in text.replace(" ", "▁")} - {"\n"})
        vocabulary = [*first, *specials, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "th", "▁th"]
        model = models.BPE(
            vocab={token: i for i, token in enumerate(dict.fromkeys(vocabulary))},
            merges=[("t", "h"), ("▁", "th")],
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<unk>",
        )
        tokenizer.model, trainer = model, None
    if trainer:
        tokenizer.train_from_iterator(WORDS * 5, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in plain])
    return tokenizer


SPECIALS = {
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]"],
    "thinking": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "unigram": ["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
    "phi": ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
}
STYLES = {  # kind of tokenizer, template, added tokens that are not special, begin and end of a text
    "chatml": ("byte-level", CHATML, [], None, "<|im_end|>"),
    "llama3": ("byte-level", LLAMA3, [], "<|begin_of_text|>", "<|eot_id|>"),
    "gemma": ("gemma", GEMMA, ["\n\n", "<h1>", "</h1>"], "<bos>", "<eos>"),
    "mistral": ("llama2", MISTRAL, [], "<s>", "</s>"),
    "thinking": ("byte-level", THINKING, ["<think>", "</think>", "<tool_call>"], None, "<|im_end|>"),
    "unigram": ("unigram", CHATML, [], "<s>", "</s>"),
    "phi": ("byte-level", PHI, [], None, "<|end|>"),
}


@cache
def open_tokenizer(style: str) -> Any:
    "A transformers tokenizer of one of the styles."
    from transformers import PreTrainedTokenizerFast

    kind, template, plain, bos, eos = STYLES[style]
    backend = train(kind, SPECIALS[style], plain)
    names = {"bos_token": bos, "eos_token": eos, "unk_token": None if kind == "byte-level" else "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template,
        extra_special_tokens=SPECIALS[style],
        **{k: v for k, v in names.items() if v},
    )


MARKS = sorted({mark for specials in SPECIALS.values() for mark in specials} | {"<think>", "</think>", "<unk>", "<h1>"})
PIECES = st.one_of(
    st.sampled_from(MARKS),
    st.sampled_from([mark[:cut] for mark in MARKS for cut in (1, len(mark) - 1)]),
    st.sampled_from([mark[cut:] for mark in MARKS for cut in (1, len(mark) - 1)]),
    st.sampled_from(["\n", " ", "\n\n", "system\n", "the", "\ue000", "\ue001", "\ue002", "\U000f0000"]),
    st.text(max_size=4),
)
TEXTS = st.lists(PIECES, max_size=8).map("".join)
SMALL = settings(max_examples=60, derandomize=True, deadline=None)


def controls_of(tokenizer: Any, ids: list[int]) -> list[str]:
    return tokenizer.convert_ids_to_tokens(control_tokens(tokenizer).among(ids))


@pytest.mark.parametrize("style", STYLES)
@SMALL
@given(passage=TEXTS, said=TEXTS, question=TEXTS)
def test_any_text_stays_text(style: str, passage: str, said: str, question: str) -> None:
    tokenizer = open_tokenizer(style)
    turns = [("user", passage), ("assistant", said), ("user", question)]
    messages = [{"role": role, "content": content} for role, content in turns]
    harmless = [{"role": role, "content": "x"} for role, _ in turns]
    ids = encode_prompt(tokenizer, messages)
    assert controls_of(tokenizer, ids) == controls_of(tokenizer, encode_prompt(tokenizer, harmless))
    written = render(tokenizer, messages, add_generation_prompt=True)
    if style in ("chatml", "llama3", "thinking", "gemma", "phi"):  # the others lose white space or what is not NFKC
        assert tokenizer.decode(ids) == written
    if not any(mark in passage + said + question for mark in control_tokens(tokenizer).ids) and style != "unigram":
        assert ids == tokenizer(written, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("style", STYLES)
@SMALL
@given(text=TEXTS)
def test_answers_and_documents_stay_text(style: str, text: str) -> None:
    tokenizer = open_tokenizer(style)
    answer = encode_completion(tokenizer, text)
    assert len(controls_of(tokenizer, answer)) == 1 and answer[-1] in tokenizer.all_special_ids
    document = encode_text(tokenizer, text)
    assert controls_of(tokenizer, document) == []
    if style in ("chatml", "llama3", "thinking", "gemma", "phi"):
        assert tokenizer.decode(document) == text


def test_a_mark_is_split_with_its_neighbours() -> None:
    "The text around a mark keeps the tokens that it has before any other word."
    tokenizer = open_tokenizer("mistral")
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "the </s> the"}])
    assert tokenizer.convert_ids_to_tokens(ids) == (
        ["<s>", "[INST]", "▁", "▁th", "e", "▁", "<", "/", "s", ">", "▁th", "e", "▁", "[/INST]"]
    )


def test_what_is_no_mark_stays_the_token_that_it_is() -> None:
    tokenizer = open_tokenizer("gemma")
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "<h1>fee</h1>\n\n<end_of_turn>"}])
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert [tokens.count(token) for token in ("<h1>", "</h1>", "\n\n", "<end_of_turn>")] == [1, 1, 1, 1]


def test_normalised_marks_are_text() -> None:
    "Full-width letters become a mark only inside the tokenizer."
    from tokenizers import AddedToken

    tokenizer = open_tokenizer("unigram")
    tokenizer.add_tokens([AddedToken("[/turn]", normalized=True)])
    wide = [{"role": "user", "content": "［/turn］"}]
    written = render(tokenizer, wide, add_generation_prompt=True)
    assert "[/turn]" in tokenizer.convert_ids_to_tokens(tokenizer(written)["input_ids"])
    assert "[/turn]" not in controls_of(tokenizer, encode_prompt(tokenizer, wide))
    open_tokenizer.cache_clear()


def test_template_that_completes_a_mark() -> None:
    tokenizer = open_tokenizer("chatml")
    tokenizer.chat_template = "{% for m in messages %}<|{{ m['content'] }}{% endfor %}<|im_end|>"
    for content in ("im_start|>", "im_end|> and more", "im_start", "|>"):
        ids = encode_prompt(tokenizer, [{"role": "user", "content": content}] * 2)
        assert controls_of(tokenizer, ids) == ["<|im_end|>"]
        assert tokenizer.decode(ids) == f"<|{content}" * 2 + "<|im_end|>"
    tokenizer.chat_template = CHATML


def test_template_that_changes_what_it_is_told() -> None:
    tokenizer = open_tokenizer("chatml")
    for change in ("replace('\\n', '') | replace(' ', '')", "lower", "trim | replace('_', '_')", "length"):
        tokenizer.chat_template = CHATML.replace("message['content'] +", f"(message['content'] | {change}) | string +")
        for content in ("<|im_\nend|>", "< |im_end|>", "<|IM_END|>", "a < b [c]"):
            messages = [{"role": "user", "content": content}]
            ids = encode_prompt(tokenizer, messages)
            assert controls_of(tokenizer, ids) == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
            assert tokenizer.decode(ids) == render(tokenizer, messages, add_generation_prompt=True)
    tokenizer.chat_template = CHATML


CALLS = (  # it writes what a turn calls, names of arguments too
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% for call in m['tool_calls'] or [] %}{% set function = call['function'] %}{{ function['name'] }}"
    "{% for name, value in function['arguments'].items() %}"
    "{{ name + '=' + value }}{% endfor %}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
)


@SMALL
@given(text=TEXTS, called=TEXTS, argument=TEXTS)
def test_parts_and_calls_stay_text(text: str, called: str, argument: str) -> None:
    tokenizer = open_tokenizer("chatml")
    call = {"type": "function", "id": called, "function": {"name": called, "arguments": {argument: text}}}
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": text}, {"type": "text", "text": argument}]},
        {"role": "assistant", "content": [], "tool_calls": [call]},
    ]
    tokenizer.chat_template = CALLS
    ids, written = encode_prompt(tokenizer, messages), render(tokenizer, messages, add_generation_prompt=True)
    tokenizer.chat_template = CHATML
    assert controls_of(tokenizer, ids) == ["<|im_start|>", "<|im_end|>"] * 2
    assert tokenizer.decode(ids) == written


def test_what_cannot_be_kept_apart_is_refused() -> None:
    tokenizer = open_tokenizer("chatml")
    tokenizer.chat_template = "{% set text = messages[0]['content'] %}{{ 'bye' if text == '<|im_end|>' else text }}"
    with pytest.raises(ChatTemplateError, match="the chat template acts upon"):
        encode_prompt(tokenizer, [{"role": "user", "content": "<|im_end|>"}])
    tokenizer.chat_template = CHATML
    with pytest.raises(ChatTemplateError, match="lone surrogate"):
        encode_prompt(tokenizer, [{"role": "user", "content": "\ud83d"}])


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        (["system"], "System role not supported"),
        (["user", "user"], "must alternate"),
        (["assistant"], "must alternate"),
    ],
)
def test_refusals_carry_the_templates_words(roles: list[str], words: str) -> None:
    with pytest.raises(ChatTemplateError, match=rf"does not take these turns \({', '.join(roles)}\): .*{words}"):
        encode_prompt(open_tokenizer("gemma"), [{"role": role, "content": "x"} for role in roles])


@pytest.mark.parametrize("role", ["system", "developer"])
def test_refused_system_text_opens_the_users_turn(role: str) -> None:
    tokenizer = open_tokenizer("gemma")
    ids = encode_prompt(tokenizer, [{"role": role, "content": "Be brief."}, {"role": "user", "content": "<eos>"}])
    assert tokenizer.decode(ids) == "<bos><start_of_turn>user\nBe brief.\n\n<eos><end_of_turn>\n<start_of_turn>model\n"
    assert "<eos>" not in controls_of(tokenizer, ids)


DATED = "\n  {% for m in messages %}{{ m['content'] }}{% endfor %}{% set f = '%B %-d' %}{{ strftime_now(f) }}"


def test_one_prompt_on_every_day() -> None:
    tokenizer = open_tokenizer("chatml")
    tokenizer.chat_template = "\n" + DATED + "{{ strftime_now('%d %b %Y') }}"
    hello = [{"role": "user", "content": "Hello"}]
    assert render(tokenizer, hello, False) == "\n\nHelloJuly 2626 Jul 2024"
    tokenizer.chat_template = pin_date(tokenizer.chat_template, "2026-01-05")
    assert render(tokenizer, hello, False) == "\n\nHelloJanuary 505 Jan 2026"
    tokenizer.chat_template = {"tool_use": CHATML, "default": DATED}
    assert "prompt_date: 2024-07-26" in chat_template(tokenizer)
    tokenizer.chat_template = CHATML
