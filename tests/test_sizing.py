"""Sizes from configs alone, what a stage says it needs, and what a licence allows."""

import json
from pathlib import Path

import pytest
from conftest import ROOT

from llmops.evaluation.metrics import MetricsParams, run_metrics
from llmops.foundation.artifacts import EMBEDDED_MODEL
from llmops.foundation.checkpoints import size_mb
from llmops.foundation.footprint import LINEAR_BYTES, cache_memory, inference_memory, weight_memory
from llmops.foundation.memory import cache_layers, meta_model, model_shapes
from llmops.foundation.needs import MemoryRoom, Workload, announce_stage, check_needs, describe_needs, estimate_stage
from llmops.foundation.project import ParamError
from llmops.foundation.tiny import TINY
from llmops.selection.licences import LicenceError, check_licence, find_licence
from llmops.selection.sizing import CONFIGS, fits, longest_context, size_model


@pytest.mark.parametrize("arch", TINY)
def test_weights_and_cache_are_those_of_the_model(arch: str) -> None:
    import torch
    from transformers import DynamicCache

    from llmops.foundation.models import load_model

    shapes = model_shapes(f"tiny:{arch}")
    assert weight_memory(shapes, "float32") / 1e6 == pytest.approx(size_mb(f"tiny:{arch}"), abs=0.02)
    model, _ = load_model(f"tiny:{arch}", dtype="float32")
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        ids = torch.ones((2, 600), dtype=torch.long)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == cache_memory(shapes, 600, 2, "float32")


def test_experts_stay_in_16_bits_but_in_gguf() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "mixtral", hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=1000
    )
    shapes = model_shapes(config)
    assert weight_memory(shapes, "nf4") > 0.9 * weight_memory(shapes, "bfloat16")
    assert weight_memory(shapes, "q4_0") < 0.4 * weight_memory(shapes, "bfloat16")


def test_an_untied_output_layer_is_counted() -> None:
    from transformers import AutoConfig

    tied, untied = (
        AutoConfig.for_model(**CONFIGS["Llama-3.1-8B"] | {"num_hidden_layers": 1, "tie_word_embeddings": tie})
        for tie in (True, False)
    )
    assert weight_memory(model_shapes(untied)) - weight_memory(model_shapes(tied)) == 2 * 128256 * 4096


def test_a_model_that_cannot_run_without_numbers_is_sized_from_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    model = meta_model("tiny:llama")
    expected = cache_layers(model)

    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("it looks at the numbers")

    monkeypatch.setattr(model, "forward", refuse)
    assert cache_layers(model) == expected


def test_every_precision_grows_with_context_and_batch() -> None:
    shapes = model_shapes("tiny:qwen")
    for precision in LINEAR_BYTES:
        small = inference_memory(shapes, precision, context=100)
        assert inference_memory(shapes, precision, context=1000)["total"] > small["total"]
        assert inference_memory(shapes, precision, context=100, batch_size=3)["cache"] == pytest.approx(
            3 * small["cache"]
        )
        assert small["total"] == pytest.approx(small["weights"] + small["cache"] + small["working"])


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Falcon-7B", "Qwen3-4B"])
def test_what_is_said_to_fit_fits(name: str) -> None:
    model = size_model(name)
    for card in (8, 16, 24):
        answer = fits(model, card, context=2048)
        assert bool(answer) == (answer.spare >= 0)
        if not answer and answer.longest_context:
            assert fits(model, card, context=answer.longest_context)
    assert longest_context(model, 72) >= longest_context(model, 14.4)


def test_proposals_fit() -> None:
    answer = fits("Qwen3-8B", 16, context=8192, batch_size=4)
    assert not answer
    for proposal in answer.advice.split(", or "):
        if proposal in LINEAR_BYTES:
            assert fits("Qwen3-8B", 16, proposal, context=8192, batch_size=4)


def test_the_saved_measurements_are_within_ten_percent() -> None:
    saved = json.loads((ROOT / "nbs/results/memory.json").read_text(encoding="utf-8"))
    assert len(saved["rows"]) >= 6
    for row in saved["rows"]:
        parts = row["predicted"]
        error = (parts["weights"] + parts["cache"]) / row["measured"]["peak_mb"] - 1
        assert error == pytest.approx(row["error"])
        assert abs(error) < 0.10, row["name"]
        assert parts["cache"] > 0.04 * row["measured"]["peak_mb"], "a cache that matters"
    assert saved["memory_error_max"] == max(abs(row["error"]) for row in saved["rows"])


def test_a_stage_says_what_it_needs_and_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = MetricsParams(
        questions=2, kl_questions=0, resamples=100, perplexity_texts=1, speed_prompts=1, out=str(tmp_path / "out")
    )
    run_metrics(cfg)
    assert "evaluation needs about" in capsys.readouterr().out


def test_a_stage_that_cannot_fit_is_refused_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmops.foundation.needs.memory_room", lambda: MemoryRoom("this machine", 0.01, 0.01))
    with pytest.raises(ParamError, match=r"evaluation does not fit: it needs \d+ MB of memory at least, and this"):
        run_metrics(MetricsParams(questions=2, out=str(tmp_path / "out")))
    assert not list(tmp_path.iterdir())


def test_estimates_that_are_uncertain_refuse_nothing() -> None:
    load = Workload("full", tokens=1_000_000)
    needs = estimate_stage("fine-tuning", "tiny:llama", load, "runs", MemoryRoom("this machine", 1, 0.5))
    assert needs.memory > needs.room.total > needs.certain
    check_needs(needs)
    assert "it may not fit" in describe_needs(needs)


def test_a_model_that_cannot_be_weighed_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{not JSON")
    assert announce_stage("evaluation", tmp_path, Workload("answer"), tmp_path) is None


def test_unknown_is_never_allowed() -> None:
    for name in ("", "other", "unknown", "our terms", "EUPL-1.2", "(MIT)"):
        assert check_licence(name, "research").answer == "unknown"
        with pytest.raises(LicenceError, match="is unknown"):
            check_licence(name, "research", gate=True)


def test_the_embedded_model_may_be_used() -> None:
    licence = find_licence(EMBEDDED_MODEL)
    assert check_licence(licence, "commercial", derivative=True, train_on_outputs=True, gate=True).answer == "allowed"
