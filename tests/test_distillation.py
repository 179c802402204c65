"""Distillation: real divergences, a student that gets nearer to its teacher, guards, and the same bytes after a kill."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_apart
from starlette.requests import Request
from starlette.responses import Response
from wire_servers import Wire, fault, run_app

from llmops.compression.distillation import (
    KIND,
    DistillationParams,
    DistillationResult,
    check_sizes,
    check_vocabularies,
    run_distillation,
    token_divergence,
)
from llmops.foundation.artifacts import seal, verify
from llmops.foundation.checkpoints import model_kind, model_path
from llmops.foundation.datasets import read_split
from llmops.foundation.decoding import DataError
from llmops.foundation.models import load_model
from llmops.foundation.project import ParamError
from llmops.foundation.tiny import tiny_model

STAGE = "llmops.compression.distillation"
SMALL = {"learning_rate": 0.003, "epochs": 9.0, "max_steps": 8, "batch_size": 4, "micro_batch_size": 2, "eval_every": 2,
         "save_every": 2, "patience": 9, "max_new_tokens": 4, "rank": 4, "alpha": 8, "wandb": "disabled"}  # fmt: skip


def distilled(out: Path, **params: Any) -> tuple[DistillationResult, dict[str, Any]]:
    "Run and seal, as the stage's notebook does."
    cfg = DistillationParams(**{**SMALL, **params, "out": str(out)})
    result = run_distillation(cfg)
    return result, seal(result.work, cfg.out, KIND[cfg.train], STAGE, cfg, result.inputs, result.metrics)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_divergence_is_that_of_trl(beta: float, temperature: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 11), torch.randn(2, 5, 11)
    labels = torch.tensor([[-100, 1, 2, 3, -100], [-100, -100, 4, 5, 6]])
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta, temperature)
    ours = token_divergence(student[labels != -100], teacher[labels != -100], beta, temperature).mean()
    assert float(ours) == pytest.approx(float(theirs), abs=1e-5)


@pytest.mark.parametrize("method, train", [("logits", "full"), ("on_policy", "lora"), ("sequence", "full")])
def test_a_student_comes_nearer_to_its_teacher(method: str, train: str, tmp_path: Path) -> None:
    rate = {"full": 0.003, "lora": 0.02}[train]
    result, made = distilled(tmp_path / "out", method=method, train=train, learning_rate=rate)
    assert result.metrics["valid_loss"] < result.metrics["valid_loss_before"] - 0.01
    assert made["kind"] == model_kind(tmp_path / "out") == KIND[train] and verify(tmp_path / "out")
    assert set(result.inputs) == {"teacher", "student", "data"}
    load_model(tmp_path / "out")


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path: Path) -> None:
    result, _ = distilled(tmp_path / "out", teacher="tiny:llama", max_steps=2, beta=0.5)
    assert result.metrics["valid_loss_before"] == pytest.approx(0.0, abs=1e-5)


def test_killed_and_resumed_gives_the_same_bytes_with_the_students_own_answers(tmp_path: Path) -> None:
    told = SMALL | {"method": "on_policy", "train": "lora", "max_steps": 5, "out": str(tmp_path / "killed")}
    assert run_apart(STAGE, told, kill_at=4).returncode == -signal.SIGKILL
    resumed = run_apart(STAGE, told)
    assert "continuing from step" in resumed.stdout, resumed.stdout + resumed.stderr
    whole = run_apart(
        STAGE, told | {"out": str(tmp_path / "whole")}
    )  # another process, as sums depend on what ran before
    assert whole.returncode == 0 and resumed.stdout.split()[-1] == whole.stdout.split()[-1]


def test_models_with_other_tokens_learn_from_answers_only(tmp_path: Path) -> None:
    model, tokenizer = load_model("tiny:llama")
    tokenizer.add_tokens(["<new>"])  # as long as before only in the model's eyes
    with pytest.raises(ParamError, match="1 entries of their tokenizers differ.* method: sequence"):
        check_vocabularies(load_model("tiny:mistral"), (model, tokenizer))
    model.resize_token_embeddings(49160)
    with pytest.raises(ParamError, match="scores 49,160 tokens, its teacher 49,152"):
        check_vocabularies(load_model("tiny:mistral"), (model, load_model("tiny:llama")[1]))


def test_a_larger_student_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ParamError, match="were they exchanged"):
        distilled(tmp_path / "out", teacher="tiny:llama", student="tiny:mistral")
    assert not list(tmp_path.iterdir())
    check_sizes(model_path("tiny:mistral"), tiny_model("llama"))


class Tired(Wire):
    "A server that falls after so many requests."

    left = 3

    async def take(self, request: Request, key: str | None) -> tuple[str, dict[str, Any], Response | None]:
        case, body, failed = await super().take(request, key)
        self.left -= 1
        return case, body, fault(404, "gone", False) if self.left < 0 else failed


def test_a_teacher_that_goes_down_half_way_is_asked_for_the_rest_only(tmp_path: Path) -> None:
    wire = Tired()
    with run_app(wire.app) as url:
        told = {"method": "sequence", "teacher": "m", "teacher_url": f"{url}/teacher/v1", "max_steps": 2,
                "replies": str(tmp_path / "replies")}  # fmt: skip
        with pytest.raises(DataError, match=r"teacher: m at .* 3 answers of \d+ so far are in .*replies"):
            distilled(tmp_path / "out", **told)
        assert not (tmp_path / "out").exists() and len(wire.asked["teacher"]) == 4
        wire.left = 999
        result, made = distilled(tmp_path / "out", **told)
        asked = len(wire.asked["teacher"])
        again, same = distilled(tmp_path / "again", **told)
    assert len(wire.asked["teacher"]) == asked and made["digest"] == same["digest"]
    questions = sum(len(read_split("tiny:data", split)) for split in ("train", "valid"))
    assert set(result.inputs) == {"student", "data", "replies"} and asked == 1 + questions
    assert again.metrics["valid_loss"] < result.metrics["valid_loss_before"]  # it learns to say "Hello there."
