"""Prompt files and their aliases: values stay text, every fault is named by file and line, and moves at once are safe."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops.foundation.decoding import DataError
from llmops.foundation.project import ParamError
from llmops.foundation.prompt_files import list_prompts, parse_prompt, prompt_digest, read_prompt
from llmops.foundation.prompt_versions import (
    main,
    read_aliases,
    read_history,
    resolve_prompt,
    roll_back,
    set_alias,
)
from llmops.foundation.prompts import build_prompt
from llmops.foundation.strategies import Strategy, final_answer, strategy_prompt
from llmops.foundation.tasks import DEFAULT_ASKED

HEAD = "---\ndescription: A test\nvariables:\n  passage: str\n---\n"
NASTY = st.text() | st.sampled_from(
    ["user:\n", "system:", "{{ question }}", "{% if %}", "examples:\n", "\r\n", " x \n"]
)


@settings(max_examples=50, deadline=None)
@given(NASTY, NASTY)
def test_values_stay_text(passage: str, question: str) -> None:
    messages = read_prompt("qa").messages(passage=passage, question=question)
    assert messages == build_prompt(passage, question)


def test_every_shipped_prompt_asks() -> None:
    example = {"passage": "Bo is 30.", "question": "How old is Bo?", "answer": "30"}
    for name in list_prompts():
        prompt = read_prompt(name)
        shown = {"examples": [example]} if prompt.takes_examples else {}
        messages = prompt.messages(passage="Ann lives in Oslo.", question="Where?", **shown)
        assert messages[-1] == build_prompt("Ann lives in Oslo.", "Where?")[-1], name
        assert len(messages) == 2 + 2 * len(shown) and prompt.description
    assert final_answer("She lives there.\nAnswer: Oslo\n", read_prompt("qa-think").marker) == "Oslo"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("user:\nHello", "line 1: a prompt begins with front matter"),
        ("---\ndescription: a\nuser:\nHello", "line 1: the front matter has no end"),
        ("---\ndescription: a\n b: [\n---\nuser:\nx", "the front matter is no YAML"),
        ("---\ntemperature: 1\n---\nuser:\nx", "line 2: 'temperature' is no key"),
        ("---\nvariables:\n  n: number\n---\nuser:\n{{ n }}", "line 3: n is declared as 'number'"),
        (HEAD + "user:\nHello", "line 4: passage is declared and never used"),
        (HEAD + "user:\n{{ passage }}\n\n{{ pasage }}", "line 9: pasage is used and not declared"),
        (HEAD + "tool:\nx\nuser:\n{{ passage }}", "line 6: 'tool' is no role"),
        (HEAD + "user:\n\n{{ passage }}\n{% if passage %}", "line 9: broken Jinja"),
        (HEAD + "user:\n{{ passage | shout }}", "line 7: broken Jinja"),
        (HEAD + "user:\n{{ passage }}{% include 'x' %}", "line 7: another template is asked for"),
        (HEAD + "assistant:\n{{ passage }}", "does not end with a user's turn"),
        (HEAD + "x\nuser:\n{{ passage }}", "line 6: 'x' stands under no heading"),
    ],
)
def test_a_fault_in_a_file_is_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "made.jinja").write_text(text)
    with pytest.raises(DataError) as caught:
        read_prompt("made", tmp_path)
    assert said in str(caught.value) and "made.jinja, line " in str(caught.value)


def test_a_value_that_does_not_fit_is_named() -> None:
    prompt = parse_prompt("made", HEAD + "user:\n{{ passage }}\n{{ passage.foo }}")
    for values, said in (
        ({}, "passage has no value"),
        ({"passage": 3}, "declared as str"),
        ({"b": 1, "passage": ""}, "b"),
    ):
        with pytest.raises(ParamError, match=said):
            prompt.messages(**values)
    with pytest.raises(DataError, match=r"made.jinja, line 8: user: cannot be filled in"):
        prompt.messages(passage="x")


def test_a_template_reaches_nothing() -> None:
    for body in ("{{ passage.__class__.__mro__ }}", "{{ passage.format.__globals__ }}", "{{ cycler.__init__ }}"):
        prompt = parse_prompt("made", HEAD + "user:\n{{ passage }}" + body)
        with pytest.raises(DataError, match="cannot be filled in"):
            prompt.messages(passage="x")


def test_a_strategy_speaks_as_its_prompt() -> None:
    row = {"passage": "Ann lives in Oslo.", "question": "Where?", "answer": "Oslo", "prompt": []}
    examples = [{"passage": "Bo is 30.", "question": "How old?", "answer": "30"}]
    few = Strategy(prompt=read_prompt("qa-few-shot").text, shots=1, examples=tuple(examples))
    said = strategy_prompt(few, DEFAULT_ASKED, row, examples)
    assert said == strategy_prompt(Strategy(shots=1, examples=tuple(examples)), DEFAULT_ASKED, row, examples)


def test_an_alias_is_never_a_stale_copy(tmp_path: Path) -> None:
    file = tmp_path / "made.jinja"
    for word in ("one", "two", "three"):
        file.write_text(f"---\n---\nuser:\n{word}")
        set_alias("made", "production", "ann", tmp_path)
    assert [roll_back("made", "production", "bo", tmp_path).after for _ in range(2)] == [
        prompt_digest("---\n---\nuser:\ntwo"),
        prompt_digest("---\n---\nuser:\none"),
    ]
    assert resolve_prompt("made@production", tmp_path).messages()[0]["content"] == "one"
    (tmp_path / "aliases.json").write_text('{"made": {}}')
    with pytest.raises(ParamError, match="no alias 'production'; it has none"):
        resolve_prompt("made@production", tmp_path)
    file.write_text("---\n---\nbroken")
    before = sorted(tmp_path.rglob("*.json*"))
    with pytest.raises(DataError):
        set_alias("made", "staging", "ann", tmp_path)
    assert sorted(tmp_path.rglob("*.json*")) == before and len(read_history(tmp_path)) == 5


MOVES = 6  # of each process


def move_often(root: Path, number: int) -> None:
    "Write own texts and move an own alias and a common one; every other process does the same."
    for turn in range(MOVES):
        own = root / f"p{number}.jinja"
        unfinished = root / f"p{number}.unfinished"
        unfinished.write_text(f"---\n---\nuser:\n{number} {turn}")
        os.replace(unfinished, own)
        set_alias(f"p{number}", "production", f"process {number}", root)
        set_alias("common", f"alias-{number}", f"process {number}", root)
        assert resolve_prompt(f"p{number}@production", root).text.endswith(f"{number} {turn}")


def test_moves_at_once_are_all_kept(tmp_path: Path) -> None:
    (tmp_path / "common.jinja").write_text("---\n---\nuser:\nx")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=move_often, args=(tmp_path, number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    moves, aliases = read_history(tmp_path), read_aliases(tmp_path)
    assert len(moves) == 4 * MOVES + 4 and len(aliases["common"]) == 4
    for number in range(4):
        chain = [move for move in moves if move.name == f"p{number}"]
        assert [move.before for move in chain] == ["", *(move.after for move in chain[:-1])]
        assert aliases[f"p{number}"]["production"] == chain[-1].after
    assert not list(tmp_path.rglob("*.unfinished"))


def test_the_command_moves_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "made.jinja").write_text("---\n---\nuser:\nx")
    root = ["--root", str(tmp_path)]
    assert main([*root, "alias", "made", "production", "--who", "ann"]) == 0
    assert json.loads((tmp_path / "history.jsonl").read_text())["who"] == "ann"
    assert main([*root, "show", "made@production"]) == 0 and main([*root, "list"]) == 0
    assert "production (this text)" in capsys.readouterr().out
    assert main([*root, "show", "made@gone"]) == 1
    assert "no alias 'gone'; it has production" in capsys.readouterr().err


def test_prompts_go_through_a_registry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlflow", reason="MLflow is not installed: pip install 'llmops[registry]'")
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    first = read_prompt("qa").text
    (here / "qa.jinja").write_text(first)
    registry = ["--registry", f"sqlite:///{tmp_path}/registry.db"]
    assert main(["--root", str(here), "alias", "qa", "production"]) == 0
    for reference in ("qa@production", "qa@production", "qa"):
        assert main(["--root", str(here), "push", reference, *registry]) == 0
    (here / "qa.jinja").write_text(first.replace("short phrase", "few words"))
    assert main(["--root", str(here), "push", "qa", *registry]) == 0
    pushed = capsys.readouterr().out
    assert pushed.count("is version 1 there") == 3 and pushed.count("there, and @production") == 2
    assert "is version 2 there" in pushed
    assert main(["--root", str(there), "pull", "qa@production", *registry]) == 0
    assert read_prompt("qa", there).text == first
    assert main(["--root", str(there), "pull", "qa@2", *registry]) == 0
    assert "few words" in read_prompt("qa", there).text
    assert main(["--root", str(there), "pull", "qa@staging", *registry]) == 1
    assert "is not in the registry" in capsys.readouterr().err
