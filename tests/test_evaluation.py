"""Evaluating one version and joining many: what needs a model that is broken, adapted, or evaluated twice."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from llmops.foundation.artifacts import ArtifactError, read_manifest, seal, verify
from llmops.decision.leaderboard import VOLATILE_FILES, LeaderboardParams, run_leaderboard
from llmops.decision.leaderboard_rows import MERGES
from llmops.evaluation.tiny_versions import tiny_evaluations
from llmops.evaluation.metrics import KIND, MetricsParams, deployed_size_mb, run_metrics
from llmops.foundation.stats import EvaluationError
from llmops.foundation.checkpoints import size_mb
from llmops.foundation.models import load_model
from llmops.foundation.tiny import tiny_model
from llmops.foundation.project import ParamError
from llmops.studies import seeds
from llmops.foundation.tracking import track

KEYS = (
    "version f1 f1_low f1_high exact_match f1_answerable f1_unanswerable delta_f1 delta_f1_low delta_f1_high perplexity kl "
    "top1_agreement size_mb peak_memory_mb prefill_tokens_per_second decode_tokens_per_second digest seconds"
).split()


def quick(out: Path, **kw: object) -> MetricsParams:
    return MetricsParams(
        **{
            "max_new_tokens": 3,
            "questions": 4,
            "kl_questions": 3,
            "perplexity_texts": 2,
            "perplexity_max_length": 16,
            "speed_prompts": 1,
            "speed_new_tokens": 2,
            "resamples": 199,
            "wandb": "disabled",
            "out": str(out),
            **kw,
        }
    )  # type: ignore[arg-type]


def finish(cfg: MetricsParams) -> str:
    with track("evaluation", cfg) as log:
        result = run_metrics(cfg, log)
    metrics = log.metrics | result.metrics
    return str(seal(result.work, cfg.out, KIND, "llmops.evaluation.metrics", cfg, result.inputs, metrics)["digest"])


def copy_tiny(to: Path) -> Path:
    return Path(shutil.copytree(tiny_model("llama"), to))


def test_the_same_version_gives_the_same_digest(tmp_path: Path) -> None:
    assert finish(quick(tmp_path / "a")) == finish(quick(tmp_path / "b"))
    assert verify(tmp_path / "a") == verify(tmp_path / "b")
    assert "seconds" not in (tmp_path / "a" / "scores.json").read_text()
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert {"seconds", "peak_memory_mb", "prefill_tokens_per_second", "decode_tokens_per_second"} <= set(metrics)


def test_prompts_longer_than_the_context_are_counted_and_not_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = copy_tiny(tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    for context in (200, 40):
        (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
        cfg = quick(tmp_path / "out", model=str(short), questions=0)
        if context == 200:
            done = run_metrics(cfg)
            lost = [p for p in done.predictions if p["prediction"] == "" and p["f1"] == 0]
            assert 0 < done.scores["over_context"] < len(done.predictions)
            assert len(lost) >= done.scores["over_context"]
            assert (
                f"{done.scores['over_context']} of {len(done.predictions)} prompts do not fit"
                in capsys.readouterr().out
            )
        else:
            with pytest.raises(EvaluationError, match="not one of"):
                run_metrics(cfg)


def test_broken_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = copy_tiny(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(EvaluationError, match="NaN"):
        run_metrics(quick(tmp_path / "out", model=str(broken)))
    with pytest.raises(EvaluationError, match="perplexity"):
        run_metrics(quick(tmp_path / "out", model=str(broken), kl_questions=0))
    assert not (tmp_path / "out").exists()


def test_a_model_is_not_data_and_data_are_not_a_model(tmp_path: Path) -> None:
    tiny_evaluations()
    with pytest.raises(ArtifactError, match="not a model"):
        run_metrics(quick(tmp_path / "out", model="runs/.tiny/evaluations/base"))
    with pytest.raises(ArtifactError, match="is a model, expected dataset"):
        run_metrics(quick(tmp_path / "out", data="runs/.tiny/versions/base"))
    with pytest.raises(ParamError, match="questions"):
        quick(tmp_path / "out", questions=-1)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_size_of_an_adapter_counts_its_base(tmp_path: Path, method: str) -> None:
    from peft import LoraConfig, get_peft_model

    base, _ = load_model("tiny:llama", quantization="nf4" if method == "qlora" else None, train=True)
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    (tmp_path / "training.json").write_text(json.dumps({"base": "tiny:llama", "method": method, "dtype": "bfloat16"}))
    model, _ = load_model(tmp_path)
    kept, alone, under = deployed_size_mb(tmp_path, model), size_mb(tmp_path), size_mb("tiny:llama")
    assert alone > 0
    if method == "lora":
        assert kept == alone + under
    else:
        assert alone < kept < alone + 0.6 * under  # bf16 embeddings, 4-bit layers


def test_leaderboard(tmp_path: Path) -> None:
    def make(name: str) -> tuple[dict, Path]:
        cfg = LeaderboardParams(out=str(tmp_path / name), wandb="disabled")
        result = run_leaderboard(cfg)
        return seal(
            result.work,
            cfg.out,
            "leaderboard",
            "llmops.decision.leaderboard",
            cfg,
            result.inputs,
            result.metrics,
            VOLATILE_FILES,
        ), tmp_path / name

    (one, path), (two, _) = make("a"), make("b")
    assert one["digest"] == two["digest"] and verify(path)
    rows = json.loads((path / "leaderboard.json").read_text())
    assert all(set(KEYS) <= set(r) for r in rows)
    assert [r["version"] for r in rows] == ["refuse-always", "base", "qlora", MERGES[0], f"{MERGES[0]}-gptq"]
    winner = json.loads((path / "winner.json").read_text())
    assert winner["digest"] == read_manifest(winner["ref"])["digest"] == rows[-1]["digest"]
    assert (path / "leaderboard.md").read_text().count("| `base` |") == 2
    assert (path / "leaderboard.svg").stat().st_size < 60_000


def test_a_version_that_changed_after_its_evaluation_is_refused(tmp_path: Path) -> None:
    shutil.copytree(tiny_evaluations(), tmp_path / "e")
    file = tmp_path / "e" / "qlora" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["inputs"]["model"]["digest"] = "0" * 64
    file.write_text(json.dumps(manifest))
    with pytest.raises(EvaluationError, match="has changed since it was evaluated"):
        run_leaderboard(LeaderboardParams(evaluations=str(tmp_path / "e"), out=str(tmp_path / "out"), wandb="disabled"))


def test_seeds_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tiny_evaluations())
    seeds.main([folder, folder], tmp_path / "seeds")
    assert "| `qlora` |" in capsys.readouterr().out
    assert {r["seeds"] for r in json.loads((tmp_path / "seeds" / "spread.json").read_text())} == {2}
    run = [sys.executable, "-m", "llmops.studies.seeds"]
    wrong = subprocess.run([*run, str(tmp_path / "none")], cwd=ROOT, capture_output=True, text=True)
    assert (
        wrong.returncode != 0 and "run the evaluation stage first" in wrong.stderr and "Traceback" not in wrong.stderr
    )
