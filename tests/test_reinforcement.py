"""Reward models and reinforcement: real figures, controls, guards, and the same bytes after a kill."""

import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from llmops.adaptation import alignment, policy_gradient, reward_model
from llmops.adaptation.alignment import AlignmentError, Policy, open_policy, score_pairs
from llmops.adaptation.policy_gradient import (
    PolicyGradientParams,
    PolicyGradientResult,
    answer_questions,
    group_advantages,
    learn_from,
    run_policy_gradient,
)
from llmops.adaptation.preference_losses import Group, score_answers
from llmops.adaptation.preferences import read_preferences
from llmops.adaptation.reward_model import RewardModel, RewardModelParams, RewardModelResult, run_reward_model
from llmops.foundation.artifacts import lineage, seal, verify
from llmops.foundation.checkpoints import model_path
from llmops.foundation.models import load_model
from llmops.foundation.project import ParamError
from llmops.foundation.reading import DataError
from llmops.foundation.stats import EvaluationError

REWARD = {"rank": 4, "alpha": 8, "learning_rate": 0.02, "max_steps": 4, "epochs": 9.0, "batch_size": 4, "save_every": 2,
          "resamples": 199, "wandb": "disabled"}  # fmt: skip
POLICY = {"rank": 4, "alpha": 8, "learning_rate": 0.01, "steps": 3, "group_size": 3, "prompts_per_step": 2, "eval_every": 2,
          "eval_questions": 2, "max_new_tokens": 3, "informative": False, "reward": "length",
          "wandb": "disabled"}  # fmt: skip


def rewarded(out: Path, **params: object) -> tuple[RewardModelResult, str]:
    cfg = RewardModelParams(**{**REWARD, **params, "out": str(out)})  # type: ignore[arg-type]
    result = run_reward_model(cfg)
    kind, stage = reward_model.KIND, "llmops.adaptation.reward_model"
    return result, seal(result.work, cfg.out, kind, stage, cfg, result.inputs, result.metrics)["digest"]


def learned(out: Path, **params: object) -> tuple[PolicyGradientResult, str]:
    cfg = PolicyGradientParams(**{**POLICY, **params, "out": str(out)})  # type: ignore[arg-type]
    result = run_policy_gradient(cfg)
    kind, stage = policy_gradient.KIND, "llmops.adaptation.policy_gradient"
    return result, seal(result.work, cfg.out, kind, stage, cfg, result.inputs, result.metrics)["digest"]


@pytest.fixture(scope="module")
def distant() -> tuple[Policy, list[Group]]:
    "A tiny policy that is some way from its reference, in float32, and answers to three questions."
    cfg = policy_gradient.training_params(PolicyGradientParams(**{**POLICY, "out": "x"}))  # type: ignore[arg-type]
    with patch.object(alignment, "load_model", lambda place, train: load_model(place, train=train, dtype="float32")):
        policy = open_policy(cfg, model_path("tiny:llama"))
    torch.manual_seed(0)
    for name, parameter in policy.model.named_parameters():
        if f"lora_B.{alignment.ALIGNED}" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    policy.model.eval()
    return policy, alignment.encode_pairs(cfg, policy, read_preferences("tiny:preferences", "train")[:3], "train")[1]


def gradients(policy: Policy) -> torch.Tensor:
    "What was filled, as one vector, and emptied again."
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    found = torch.cat([p.grad.flatten() for p in trained])  # type: ignore[union-attr]
    policy.model.zero_grad()
    return found


@pytest.mark.parametrize("method, beta", [("grpo", 0.04), ("grpo", 0.0), ("rloo", 0.0)])
def test_the_gradient_is_that_of_trl(
    method: Any, beta: float, distant: tuple[Policy, list[Group]], tmp_path: Path
) -> None:
    import trl
    from datasets import Dataset

    policy, groups = distant
    cfg = PolicyGradientParams(**{**POLICY, "method": method, "beta": beta, "out": "x"})  # type: ignore[arg-type]
    rewards = [[1.0, 0.0], [0.5, math.nan], [0.2, 0.7]]
    ours = learn_from(cfg, policy, groups, rewards)
    own = gradients(policy)
    config, build = getattr(trl, f"{method.upper()}Config"), getattr(trl, f"{method.upper()}Trainer")
    kind = {"loss_type": "grpo"} if method == "grpo" else {}
    args = config(output_dir=str(tmp_path), beta=beta, num_generations=2, per_device_train_batch_size=2, use_cpu=True,
                  bf16=False, gradient_checkpointing=False, report_to="none", **kind)  # fmt: skip
    model, _ = load_model("tiny:llama", dtype="float32")
    data = Dataset.from_list([{"prompt": "a"}])
    trainer = build(model, lambda **told: [0.0], args, data, processing_class=policy.tokenizer)
    trainer.model.eval()
    pad = policy.tokenizer.pad_token_id
    answers = [torch.tensor(answer) for group in groups for answer in group.answers]
    prompts = [torch.tensor(group.prompt) for group in groups for _ in group.answers]
    left = {"batch_first": True, "padding_side": "left"}
    inputs = {
        "prompt_ids": pad_sequence(prompts, padding_value=pad, **left),
        "prompt_mask": pad_sequence([torch.ones_like(p) for p in prompts], **left),
        "completion_ids": pad_sequence(answers, batch_first=True, padding_value=pad),
        "completion_mask": pad_sequence([torch.ones_like(a) for a in answers], batch_first=True),
        "advantages": torch.tensor([a for group in rewards for a in group_advantages(group, method)]),
    }
    whole = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)

    def plain(*_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor, None]:  # their fused head needs Triton
        first = inputs["prompt_ids"].shape[1]
        scores = policy.model(input_ids=whole, attention_mask=seen).logits[:, first - 1 : -1].log_softmax(-1)
        return scores.gather(2, whole[:, first:, None])[..., 0], -(scores.exp() * scores).sum(-1), None

    trainer._get_per_token_logps_and_entropies = plain
    with torch.no_grad():
        inputs["old_logps"] = (plain()[0] * inputs["completion_mask"]).sum(1)
        with policy.reference():
            inputs["ref_per_token_logps"] = plain()[0]
    theirs = trainer._compute_loss(policy.model, inputs)
    theirs.backward()
    other = gradients(policy)
    if method == "grpo":  # RLOO's value is -advantage for any policy
        assert ours["loss"] == pytest.approx(float(theirs.detach()), abs=2e-4)
    assert own.norm() > 1e-3
    assert float((own - other).norm() / other.norm()) < 1e-3


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RewardModelResult, str]:
    out = tmp_path_factory.mktemp("reward") / "made"
    return out, *rewarded(out)


def test_a_reward_model_is_held_against_what_needs_no_understanding(
    reward: tuple[Path, RewardModelResult, str],
) -> None:
    out, result, _ = reward
    verify(out)
    figures = result.metrics
    assert {"accuracy", "length_accuracy", "words_accuracy", "margin_over_baselines", "ece"} <= set(figures)
    best = max(figures["length_accuracy"], figures["words_accuracy"])
    assert figures["margin_over_baselines"] == pytest.approx(figures["accuracy"] - best)
    assert figures["held_out_pairs"] == len(read_preferences("tiny:preferences", "valid"))
    assert sum(row["answers"] for row in result.calibration["table"]) == figures["held_out_pairs"]


def test_it_scores_the_same_when_it_is_read_again(reward: tuple[Path, RewardModelResult, str]) -> None:
    out, result, _ = reward
    model, pairs = RewardModel(out), read_preferences("tiny:preferences", "valid")
    scores = model.score([p["prompt"] for p in pairs], [[p["chosen"], p["rejected"]] for p in pairs])
    right = [0.5 if a == b else float(a > b) for a, b in scores]
    assert sum(right) / len(right) == pytest.approx(result.metrics["accuracy"], abs=0.15)  # bfloat16, other batches


def test_a_head_on_frozen_states_has_no_adapter(tmp_path: Path) -> None:
    result, _ = rewarded(tmp_path / "head", method="head")
    assert result.history == [] and not (tmp_path / "head/adapter").exists()
    scores = RewardModel(tmp_path / "head").score([[{"role": "user", "content": "Where?"}]], [["Oslo", "unknown"]])
    assert all(math.isfinite(score) for score in scores[0]) and scores[0][0] != scores[0][1]


def test_a_reward_model_that_is_stopped_goes_on_to_the_same_bytes(
    reward: tuple[Path, RewardModelResult, str], tmp_path: Path
) -> None:
    real, steps = reward_model.reward_step, []

    def stop(cfg: Any, trainer: Any, groups: Any) -> Any:
        steps.append(trainer.state.step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real(cfg, trainer, groups)

    with patch.object(reward_model, "reward_step", stop):
        with pytest.raises(KeyboardInterrupt):
            rewarded(tmp_path / "made")
        _, digest = rewarded(tmp_path / "made")
    assert steps == [0, 1, 2, 3, 2, 3] and digest == reward[2]


def test_rewards_and_controls_run_and_are_watched(reward: tuple[Path, RewardModelResult, str], tmp_path: Path) -> None:
    for name in ("random", "reward_model"):
        told = {"reward": name, "reward_model": str(reward[0]) if name == "reward_model" else ""}
        result, _ = learned(tmp_path / name, method="rloo", **told)
        steps = [row for row in result.history if "reward" in row]
        assert len(steps) == 3 and steps[0]["kl"] == pytest.approx(0.0, abs=1e-3)
        assert {"reward", "kl", "entropy", "answer_tokens", "equal_groups"} <= set(steps[0])
        assert [row["step"] for row in result.history if "valid_f1" in row] == [0, 2, 3]
    assert {"model", "preferences", "data", "reward_model"} <= {
        row["role"] for row in lineage(tmp_path / "reward_model")
    }
    model, _ = load_model(tmp_path / "random")
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_step_raises_what_was_rewarded(method: str) -> None:
    cfg = PolicyGradientParams(**POLICY | {"method": method})  # type: ignore[arg-type]
    policy = open_policy(policy_gradient.training_params(cfg), model_path("tiny:llama"))
    policy.model.eval()
    torch.manual_seed(0)
    rows = read_preferences("tiny:preferences", "samples")[:2]
    groups, texts = answer_questions(cfg, policy, rows)
    assert [len(group.answers) for group in groups] == [len(answers) for answers in texts] == [3, 3]
    figures = learn_from(cfg, policy, groups, [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert figures["reward"] == pytest.approx(1 / 3) and figures["equal_groups"] == 0.0
    with torch.no_grad():
        batch = score_pairs(policy, groups)
        before = score_answers(policy.model, batch).sums
        for parameter in policy.model.parameters():
            if parameter.grad is not None:
                parameter -= 0.2 * parameter.grad / parameter.grad.norm().clamp(min=1e-9)
        gain = score_answers(policy.model, batch).sums - before
    assert min(gain[0], gain[5]) > 0 and float(gain[[0, 5]].mean()) > float(gain[[1, 2, 3, 4]].mean())


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    _, whole = learned(tmp_path / "whole")
    real, steps = policy_gradient.take_step, []

    def stop(cfg: Any, trainer: Any, rows: Any, reward: Any) -> Any:
        steps.append(trainer.state.step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real(cfg, trainer, rows, reward)

    with patch.object(policy_gradient, "take_step", stop):
        with pytest.raises(KeyboardInterrupt):
            learned(tmp_path / "again")
        _, digest = learned(tmp_path / "again")
    assert steps == [0, 1, 2, 2] and digest == whole


def test_no_signal_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        AlignmentError, match="in 2 steps in a row all 3 answers .* so there is no signal to learn from"
    ):
        learned(tmp_path / "flat", reward="metric", no_signal_steps=2)  # a random model is always wrong
    assert not (tmp_path / "flat").exists()
    with pytest.raises(DataError, match="no training question whose sampled answers differ"):
        learned(tmp_path / "flat", informative=True, reward="metric")


def test_a_judge_that_people_do_not_agree_with_gives_no_reward(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="offline judge may not train a model"):
        learned(tmp_path / "x", reward="judge", min_kappa=0.95)
    with pytest.raises(EvaluationError, match="the judge nobody .* gave no verdict"):
        learned(tmp_path / "x", reward="judge", judge_url="http://127.0.0.1:9/v1", judge_model="nobody")
    with pytest.raises(ParamError, match="nothing says which"):
        PolicyGradientParams(reward="reward_model")
    assert not (tmp_path / "x").exists()


def test_a_loss_that_is_not_a_number_stops(tmp_path: Path) -> None:
    real = policy_gradient.policy_loss

    def broken(*args: Any) -> Any:
        loss, kl = real(*args)
        return loss * math.nan, kl

    with patch.object(policy_gradient, "policy_loss", broken):
        with pytest.raises(AlignmentError, match="the loss is nan after step 0, and no checkpoint was good before"):
            learned(tmp_path / "nan")
    assert not (tmp_path / "nan").exists()
