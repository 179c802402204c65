"""Preferences: pairs of every source, checked, from training questions alone, the same again, and every bad input refused."""

import json
import secrets
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from unittest.mock import patch

import pytest

from llmops.adaptation import preferences
from llmops.adaptation.preferences import (
    KIND,
    PreferencesParams,
    PreferencesResult,
    preferences_path,
    read_preferences,
    run_preferences,
)
from llmops.foundation.artifacts import begin_artifact, seal, verify
from llmops.foundation.curation import normalize_text
from llmops.foundation.datasets import read_split
from llmops.foundation.project import ParamError, resolve_path
from llmops.foundation.reading import DataError, write_jsonl
from llmops.foundation.stats import EvaluationError
from llmops.judging.rating import plan_study, write_study
from llmops.judging.votes import votes_folder

SMALL = {"rows": 4, "draws": 2, "max_new_tokens": 4, "contrast_rows": 2, "wandb": "disabled"}


def made(out: Path, **params: object) -> tuple[PreferencesResult, str]:
    "Run and seal, as the stage's notebook does."
    cfg = PreferencesParams(**{**SMALL, **params, "out": str(out)})  # type: ignore[arg-type]
    result = run_preferences(cfg)
    sealed = seal(result.work, cfg.out, KIND, "llmops.adaptation.preferences", cfg, result.inputs, result.metrics)
    return result, sealed["digest"]


def pairs_file(folder: Path, *rows: dict[str, object]) -> str:
    write_jsonl(folder / "pairs.jsonl", rows)
    return str(folder / "pairs.jsonl")


def study_of(folder: Path, split: str) -> Path:
    "A sealed study of three questions of a split, in which both raters prefer `right`, with their votes beside it."
    rows = []
    for row in read_split("tiny:data", split)[:3]:
        answers = {"right": row["answer"], "wrong": "no idea, sorry"}
        rows.append({**row, "gold": row["answer"], "answers": answers})
    study = plan_study(rows, ["right", "wrong"], ["ann", "bo"], 3, 0, 1.0, "", 42)
    out = folder / f"study-{split}"
    work = begin_artifact(str(out))
    write_study(study, work)
    seal(work, str(out), "study", "llmops.judging.human", {})
    lines = []
    for rater, order in study.order.items():
        for n, (task, swapped) in enumerate(order):
            first = study.tasks[task].versions[0]
            choice = "A" if (first == "right") != swapped else "B"
            lines.append({"vote": f"v{n}", "rater": rater, "task": task, "choice": choice, "time": "2026-01-01"})
    home = votes_folder(out)
    home.mkdir()
    write_jsonl(home / "votes.jsonl", lines)
    return out


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreferencesResult, str]:
    "An artifact of the model's own answers, contrasts, votes and a file."
    folder = tmp_path_factory.mktemp("every")
    file = pairs_file(
        folder,
        {"prompt": "What is a lighthouse for?", "chosen": "To warn ships", "rejected": "For light"},
        {"prompt": "What is a lighthouse for?", "chosen": "To warn ships", "rejected": "For light"},
        {"prompt": read_split("tiny:data", "test")[0]["question"], "chosen": "yes", "rejected": "no"},
    )
    params = {
        "sources": ["samples", "contrastive", "votes", "file"],
        "study": str(study_of(folder, "train")),
        "file": file,
        "file_valid": 0.0,
    }
    return folder / "made", *made(folder / "made", **params)


def test_rows_have_the_fields_that_trainers_read(every: tuple[Path, PreferencesResult, str]) -> None:
    out, result, _ = every
    verify(out)
    for split in ("train", "valid"):
        rows = read_preferences(out, split)
        assert rows == result.pairs[split]
        for row in rows:
            assert {"id", "prompt", "chosen", "rejected", "source", "answerable"} <= set(row)
            assert row["prompt"][-1]["role"] == "user" and row["chosen"] and row["chosen"] != row["rejected"]
    assert set(result.metrics["source"]) == {"samples", "contrastive", "votes", "file"}
    assert result.metrics["source"]["votes"] == 3
    votes = [row for row in result.pairs["train"] if row["source"] == "votes"]
    assert {row["rejected"] for row in votes} == {"no idea, sorry"} and all(
        row["answerable"] is not None for row in votes
    )


def test_only_training_questions_and_no_test_prompt(every: tuple[Path, PreferencesResult, str]) -> None:
    _, result, _ = every
    test = {normalize_text(row["question"]) for row in read_split("tiny:data", "test")}
    asked = [p["prompt"][-1]["content"] for split in result.pairs.values() for p in split]
    assert not [text for text in asked if any(question in normalize_text(text) for question in test)]
    train = {row["id"] for row in read_split("tiny:data", "train")}
    own = [row for row in result.sampled if row["split"] == "train" and "contrast" not in row]
    assert own and {row["id"] for row in own} <= train
    assert result.metrics["removed"]["overlap"] == 1 and result.metrics["removed"]["duplicate"] >= 1


def test_samples_have_rewards_and_are_asked_once(every: tuple[Path, PreferencesResult, str], tmp_path: Path) -> None:
    out, result, _ = every
    rows = read_preferences(out, "samples")
    assert all(len(row["samples"]) == 3 for row in rows)
    assert all(0 <= s["reward"] <= 1 and s["logprob"] <= 0 for row in rows for s in row["samples"])
    assert result.metrics["samples"]["questions"] == len(rows)
    with patch("llmops.adaptation.sampling.generate_batch", side_effect=AssertionError("asked again")):
        again, _ = made(tmp_path / "again", sources=["samples"])
    mine = [row for row in rows if row["split"] == "train" and "contrast" not in row]
    theirs = [row for row in again.sampled if row["split"] == "train"]
    assert [row["samples"][0] for row in mine] == [row["samples"][0] for row in theirs]


def test_the_same_again(tmp_path: Path) -> None:
    _, first = made(tmp_path / "one", sources=["samples", "contrastive"])
    _, second = made(tmp_path / "two", sources=["samples", "contrastive"])
    _, other = made(tmp_path / "three", sources=["samples", "contrastive"], margin=1.0, pairs_per_row=1)
    assert first == second != other


def test_a_killed_run_does_not_ask_again_what_it_had_asked(tmp_path: Path) -> None:
    asked: list[int] = []
    real = preferences.sample_answers.__globals__["generate_batch"]

    def generate(*given: object, **options: object) -> object:
        asked.append(1)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return real(*given, **options)

    new = secrets.randbelow(2**32)  # another seed each time: what was asked before is kept beyond the test
    params = {"sources": ["samples"], "seed": new, "batch_size": 2}
    with patch("llmops.adaptation.sampling.generate_batch", generate):
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path / "x", **params)
        assert not (tmp_path / "x").exists()
        made(tmp_path / "x", **params)
    assert len(asked) == 6 + 3 * 5 - 3  # 4 + 6 questions in batches of 2, three draws each; the first batch was kept


def test_contrasts_have_both_sides(every: tuple[Path, PreferencesResult, str]) -> None:
    _, result, _ = every
    pairs = [p for p in result.pairs["train"] if p["source"] == "contrastive"]
    refused, answered = [p for p in pairs if not p["answerable"]], [p for p in pairs if p["answerable"]]
    assert refused and answered
    assert {p["chosen"] for p in refused} == {"unknown"} == {p["rejected"] for p in answered}


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"prompt": "Where?", "chosen": "Oslo", "rejected": "Oslo"}, "is the same as chosen"),
        ({"prompt": "Where?", "chosen": "Oslo", "rejected": ""}, "field 'rejected': is empty"),
        ({"messages": [{"role": "user", "content": "Where?"}]}, "one conversation in `messages`"),
        ({"conversations": [{"from": "human", "value": "Where?"}]}, "one conversation in `conversations`"),
        ({"prompt": "Where?", "completion": "Oslo", "label": True}, "as KTO's data"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_left(row: dict[str, object], problem: str, tmp_path: Path) -> None:
    good = {"prompt": "Who wrote it?", "chosen": "Ann", "rejected": "unknown"}
    file = pairs_file(tmp_path, good, row)
    with pytest.raises(DataError, match=f"pairs.jsonl, line 2.*{problem}"):
        made(tmp_path / "made", sources=["file"], file=file)
    assert not (tmp_path / "made").exists()
    result, _ = made(tmp_path / "made", sources=["file"], file=file, invalid="drop", file_valid=0.0)
    assert len(result.pairs["train"]) == 1 and result.metrics["file_rows_refused"] == 1


def test_a_prompt_that_is_evaluated_on_can_be_an_error(tmp_path: Path) -> None:
    row = read_split("tiny:data", "test")[0]
    file = pairs_file(tmp_path, {"prompt": row["prompt"], "chosen": "yes", "rejected": "no"})
    with pytest.raises(DataError, match="pairs.jsonl, line 1: the prompt is evaluated on: asks test row"):
        made(tmp_path / "made", sources=["file"], file=file, overlap="error")
    with pytest.raises(DataError, match="gave no pair to train on; left out were {'overlap': 1}"):
        made(tmp_path / "made", sources=["file"], file=file)
    with pytest.raises(DataError, match="gave no pair to train on"):
        made(tmp_path / "made", sources=["votes"], study=str(study_of(tmp_path, "test")))


def test_a_judge_that_people_do_not_agree_with_trains_nothing(tmp_path: Path) -> None:
    with patch.object(preferences, "sample_answers", side_effect=AssertionError("the model was asked")):
        with pytest.raises(EvaluationError, match="offline judge may not train a model: .* kappa"):
            made(tmp_path / "made", sources=["judge"], min_kappa=0.95)
    assert not (tmp_path / "made").exists()


class Garbage(BaseHTTPRequestHandler):
    "A judge that answers, and says nothing."

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": "As a language model, I like both."}
        body = json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "model": "x", "id": "1",
                           "object": "chat.completion", "created": 0}).encode()  # fmt: skip
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def garbage() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Garbage)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_judge_that_is_down_or_answers_garbage_stops_the_stage(garbage: str, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="judge nobody at .* gave no verdict on any of .* answers: .*no answer"):
        made(tmp_path / "made", sources=["judge"], judge_url="http://127.0.0.1:9/v1", judge_model="nobody")
    with pytest.raises(EvaluationError, match="judge chatty at .* gave no verdict on any of .* answers: nonsense"):
        made(tmp_path / "made", sources=["judge"], judge_url=garbage, judge_model="chatty")


def test_the_offline_judge_can_be_learned_from_where_it_agrees_with_people(tmp_path: Path) -> None:
    result, _ = made(tmp_path / "made", sources=["judge"], margin=0.001, min_kappa=0.5)
    assert set(result.metrics["source"]) == {"judge"} and result.metrics["judge_kappa_low"] >= 0.5
    assert all(p["source"] == "judge" for p in result.pairs["train"])


def test_parameters_that_lack_something() -> None:
    with pytest.raises(ParamError, match="file: sources names file"):
        PreferencesParams(sources=["file"])
    assert preferences_path("runs/x") == resolve_path("runs/x")
