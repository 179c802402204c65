"""Llama, Mistral, Falcon, Qwen and Gemma, tiny and random, from loading through QLoRA, both merges and GPTQ to answers."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llmops.adaptation.finetuning import KIND, FinetuningParams, run_finetuning
from llmops.foundation.artifacts import lineage, seal, verify
from llmops.foundation.datasets import read_split
from llmops.compression.merging import MergingParams, run_merging, split_module_name
from llmops.compression.quantization import QuantizationParams, run_quantization
from llmops.foundation.checkpoints import model_kind, size_mb
from llmops.foundation.generation import generate
from llmops.foundation.models import load_model

MODULES = {"falcon": 4}  # linear modules of a layer; the others have seven


@pytest.mark.parametrize("arch", ["llama", "mistral", "falcon", "qwen", "gemma"])
def test_whole_recipe(arch: str, tmp_path: Path) -> None:
    rows = read_split("tiny:data", "valid")[:2]
    prompts = [r["prompt"] for r in rows]
    model, tokenizer = load_model(f"tiny:{arch}")
    assert type(model).__name__.lower().startswith(arch)
    answers = {"base": generate(model, tokenizer, prompts, max_new_tokens=4, progress=False)}

    cfg = FinetuningParams(
        method="qlora",
        model=f"tiny:{arch}",
        rank=4,
        alpha=8,
        max_steps=1,
        batch_size=2,
        micro_batch_size=2,
        eval_every=1,
        save_every=1,
        learning_rate=0.01,
        out=str(tmp_path / "qlora"),
        wandb="disabled",
    )
    tuned = run_finetuning(cfg)
    seal(tuned.work, cfg.out, KIND[cfg.method], "llmops.adaptation.finetuning", cfg, tuned.inputs)
    assert model_kind(cfg.out) == "adapter" and tuned.history

    merged = {}
    for method in ("base", "dequantized"):
        into = MergingParams(adapter=cfg.out, method=method, check_rows=2, out=str(tmp_path / method), wandb="disabled")
        merged[method] = run_merging(into)
        seal(merged[method].work, into.out, "model", "llmops.compression.merging", into, merged[method].inputs)
        assert model_kind(into.out) == "model"
        answers[method] = generate(*load_model(into.out), prompts, max_new_tokens=4, progress=False)
    ratio = json.loads((tmp_path / "base" / "ratio.json").read_text())["rows"]
    assert len(ratio) == 2 * MODULES.get(arch, 7) and all(r["ratio"] > 0 and r["layer"] in (0, 1) for r in ratio)
    # the merges differ by the rounding and by nothing else (a KL would not show it: Falcon's random logits hardly move, 2e-5)
    weights = {m: load_file(tmp_path / m / "model.safetensors") for m in ("base", "dequantized")}
    for name, w in weights["base"].items():
        layer, module = split_module_name(name.removesuffix(".weight"))
        error = next((r["error"] for r in ratio if (r["layer"], r["module"]) == (layer, module)), None)
        if error is not None:
            assert (w - weights["dequantized"][name]).norm().item() == pytest.approx(error, rel=1e-3), name
    assert merged["dequantized"].metrics["kl_to_trained"] < 0.01  # bfloat16 against float32

    q = QuantizationParams(
        model=str(tmp_path / "dequantized"),
        method="gptq",
        group_size=32,
        task_rows=4,
        general_rows=2,
        max_tokens=256,
        compensate_steps=0,
        check_rows=2,
        out=str(tmp_path / "gptq"),
        wandb="disabled",
    )
    done = run_quantization(q)
    seal(done.work, q.out, "gptq", "llmops.compression.quantization", q, done.inputs)
    assert model_kind(q.out) == "gptq" and size_mb(q.out) < size_mb(q.model)
    answers["gptq"] = generate(*load_model(q.out), prompts, max_new_tokens=4, progress=False)

    assert all(len(a) == len(rows) and all(isinstance(text, str) for text in a) for a in answers.values())
    for name in ("qlora", "base", "dequantized", "gptq"):
        assert len(verify(tmp_path / name)) == 64
    walked = {(r["depth"], r["role"], r["kind"]) for r in lineage(tmp_path / "gptq")}
    assert {(1, "model", "model"), (2, "adapter", "adapter")} <= walked, (
        "from the GPTQ weights one walks back to the adapter"
    )
