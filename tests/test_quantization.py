"""Quantisation across architectures and readers: what is too slow or too wide for the notebook's own cells."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from llmops.foundation.artifacts import ArtifactError, read_manifest, seal
from llmops.compression.quantization import (
    KIND,
    QuantizationParams,
    check_groups,
    linear_layers,
    run_quantization,
    verify_quantized,
)
from llmops.compression.compensation import layer_names, read_layer, rebuild_weight
from llmops.foundation.checkpoints import model_path
from llmops.foundation.generation import generate
from llmops.foundation.models import load_model
from llmops.foundation.project import ParamError, read_params
from llmops.foundation.weights import load_tensors

SMALL = {"task_rows": 3, "general_rows": 1, "compensate_steps": 1, "compensate_batch": 2, "check_rows": 2}


def made(tmp_path, name="model", **params):
    cfg = QuantizationParams(out=str(tmp_path / name), **(SMALL | params))
    done = run_quantization(cfg)
    return done, seal(done.work, cfg.out, KIND[cfg.method], "llmops.compression.quantization", cfg, done.inputs)


@pytest.mark.parametrize("arch", ["llama", "mistral", "falcon", "qwen", "gemma"])
def test_gptq_on_every_architecture_reloads_and_answers(arch, tmp_path):
    done, manifest = made(tmp_path, model=f"tiny:{arch}")
    assert done.metrics["bits_per_weight"] < 5.5 and len(done.history) == 1
    model, tokenizer = load_model(tmp_path / "model")
    assert (
        len(generate(model, tokenizer, [[{"role": "user", "content": "Who?"}]], max_new_tokens=4, progress=False)) == 1
    )
    assert manifest["kind"] == "gptq" and "calibration.jsonl" in manifest["files"]


def test_same_params_same_bytes_in_another_process(tmp_path):
    code = (
        "import sys; from llmops.compression.quantization import *; from llmops.foundation.artifacts import seal\n"
        f"cfg = QuantizationParams(out=sys.argv[1], **{SMALL!r}); done = run_quantization(cfg)\n"
        "print('digest', seal(done.work, cfg.out, 'gptq', 'llmops.compression.quantization', cfg, done.inputs)['digest'])"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / str(i))], capture_output=True, text=True, check=True
        ).stdout.rpartition("digest ")[2]
        for i in range(2)
    }
    assert len(digests) == 1


def test_compensation_changes_scales_and_norms_and_no_code(tmp_path):
    made(tmp_path, "off", compensate_steps=0)
    made(tmp_path, "on", compensate_steps=2)
    off, on = (load_file(tmp_path / n / "model.safetensors") for n in ("off", "on"))
    assert off.keys() == on.keys()
    changed = {k.rpartition(".")[2] if "norm" not in k else "norm" for k in off if not off[k].equal(on[k])}
    assert changed == {"scales", "norm"}


def test_other_seed_other_calibration(tmp_path):
    rows = []
    for seed in (1, 2):
        made(tmp_path, str(seed), seed=seed, compensate_steps=0)
        rows.append([json.loads(line)["id"] for line in (tmp_path / str(seed) / "calibration.jsonl").open()])
    assert rows[0] != rows[1] and len(rows[0]) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"sym": False},
        {"bits": 8},
        {"bits": 2, "max_kl": 9.0},
        {"bits": 3, "max_kl": 9.0},
        {"group_size": -1, "group_aware": False},
        {"group_aware": False},
        {"desc_act": True, "compensate_steps": 0},
        {"mse": 2.0},
        {"gptaq": 0.25, "group_aware": False, "batch_size": 1},
    ],
)
def test_settings_reach_the_weights(change, tmp_path):
    _, plain = made(tmp_path, "plain", compensate_steps=0)
    done, other = made(tmp_path, "other", **({"compensate_steps": 0} | change))
    assert plain["files"]["model.safetensors"] != other["files"]["model.safetensors"]
    assert done.metrics["kl"] < 9


@pytest.mark.parametrize(("method", "bits"), [("gptq", 3), ("rtn", 2), ("rtn", 3), ("rtn", 8)])
def test_codes_are_packed_as_gptqmodel_reads_them(method, bits, tmp_path):
    "A code of 3 bits may lie in two words; the library's own kernel says what a layer's weights are."
    made(tmp_path, method=method, bits=bits, max_kl=20.0, compensate_steps=0)
    tensors, (model, _) = load_tensors(tmp_path / "model"), load_model(tmp_path / "model", dtype="float32")
    for name in layer_names(tensors):
        ours = rebuild_weight(*read_layer(tensors, name, bits))
        assert torch.allclose(model.get_submodule(name).dequantize_weight().float().t(), ours, atol=1e-3)


def test_int8_is_quiet(tmp_path, capfd):
    made(tmp_path, method="int8")
    said = capfd.readouterr()
    assert len((said.out + said.err).splitlines()) < 20


def test_a_model_that_was_not_quantised_is_found(tmp_path):
    done, _ = made(tmp_path)
    cfg = QuantizationParams(out=str(tmp_path / "fake"), **SMALL)
    with pytest.raises(ArtifactError, match="reopened as model, expected gptq"):
        verify_quantized(done.inputs["model"], done.inputs["model"], [], cfg)


def test_group_size_is_refused_before_any_work(tmp_path):
    with pytest.raises(ParamError, match="does not divide the 64 inputs"):
        run_quantization(QuantizationParams(group_size=128, out=str(tmp_path / "x")))
    assert not list(tmp_path.iterdir())
    check_groups(linear_layers(model_path("tiny:llama")), -1)


@pytest.mark.parametrize("profile", ["params", "params/smoke", "params/gpu"])
def test_the_parameter_files_fit(profile):
    QuantizationParams(**read_params("params/quantization.yaml") | read_params(f"{profile}/quantization.yaml"))


def test_calibration_is_recorded_with_its_tokens(tmp_path):
    _, manifest = made(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "model" / "calibration.jsonl").open()]
    assert [r["kind"] for r in rows] == ["task"] * 3 + ["general"] and all(r["ids"] for r in rows)
    assert read_manifest(tmp_path / "model", "gptq")["digest"] == manifest["digest"]
