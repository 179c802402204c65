"""What crosses forms of a model: every architecture, adapters on the wrong base, saved 4 and 8 bit."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmops.foundation import checkpoints, generation, memory, models, saving, tiny
from llmops.foundation.artifacts import EMBEDDED_MODEL, ArtifactError, begin_artifact, seal
from llmops.foundation.project import ParamError

ASK = [[{"role": "user", "content": q}] for q in ("Who wrote Hamlet?", "Name the capital of France, in one word.")]


def adapter(folder: Path, base: str, **training: str) -> Path:
    from peft import LoraConfig, get_peft_model

    model, _ = models.load_model(base, dtype="float32")
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    peft.save_pretrained(str(folder))
    (folder / "training.json").write_text(json.dumps({"method": "lora", "dtype": "float32", "base": base} | training))
    return folder


@pytest.mark.parametrize("arch", sorted(tiny.TINY))
def test_architecture_scores_a_padded_batch_as_it_scores_one_row(arch: str) -> None:
    import torch

    model, tokenizer = models.load_model(f"tiny:{arch}", dtype="float32")
    answers = generation.generate(model, tokenizer, ASK, max_new_tokens=4, progress=False)
    alone = [generation.generate(model, tokenizer, [a], max_new_tokens=4, progress=False)[0] for a in ASK]
    assert answers == alone
    both = generation.completion_logprobs(model, tokenizer, ASK, ["Shakespeare", "Paris"], progress=False)
    for ask, word, got in zip(ASK, ("Shakespeare", "Paris"), both, strict=True):
        ids = torch.tensor([generation.encode_prompt(tokenizer, ask) + generation.encode_completion(tokenizer, word)])
        with torch.inference_mode():
            want = model(ids).logits[0].float().log_softmax(-1)[-len(got) - 1 : -1]
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
    assert generation.context_length(model) == 1024


def test_widths_allow_groups_of_32_and_64() -> None:
    import torch

    for arch in tiny.TINY:
        model = memory.meta_model(f"tiny:{arch}")
        assert not [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m.in_features % 64], arch


def test_adapter_loads_on_its_base_and_refuses_another(tmp_path: Path) -> None:
    path = adapter(tmp_path / "adapter", "tiny:llama")
    assert checkpoints.model_kind(path) == "adapter"
    model, tokenizer = models.load_model(path)
    base, _ = models.load_model("tiny:llama", dtype="float32")
    words = ["Shakespeare", "Paris"]
    plain = generation.completion_logprobs(base, tokenizer, ASK, words, progress=False)
    tuned = generation.completion_logprobs(model, tokenizer, ASK, words, progress=False)
    assert not plain[0].equal(tuned[0])
    with pytest.raises(ParamError, match="loads as it was trained"):
        models.load_model(path, quantization="nf4")
    (path / "training.json").write_text(json.dumps({"method": "lora", "base": "tiny:falcon"}))
    with pytest.raises(ArtifactError, match=r"adapter.*does not fit the base.*falcon"):
        models.load_model(path)


def test_adapter_for_a_base_of_another_size(tmp_path: Path) -> None:
    path = adapter(tmp_path / "adapter", "tiny:llama")
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "adapter_model.safetensors")
    weights = {k: v.repeat(1, 2) if "lora_A" in k else v for k, v in weights.items()}
    save_file(weights, path / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match=r"adapter.*does not fit the base runs/.tiny/llama: size mismatch"):
        models.load_model(path)


def test_adapter_whose_weights_lack_the_base_layers(tmp_path: Path) -> None:
    path = adapter(tmp_path / "adapter", "tiny:llama")
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "adapter_model.safetensors")
    save_file({k.replace("layers.1.", "layers.7."): v for k, v in weights.items()}, path / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match=r"adapter.*does not fit the base"):
        models.load_model(path)


def test_adapter_whose_base_has_changed(tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny.tiny_model("llama"), tmp_path / "base"))
    work = adapter(begin_artifact(tmp_path / "tuned"), str(base))
    seal(work, tmp_path / "tuned", "adapter", "llmops.foundation.models", {"seed": 1}, {"model": base})
    models.load_model(tmp_path / "tuned")
    (base / "config.json").write_text((base / "config.json").read_text() + "\n")
    with pytest.raises(ArtifactError, match=r"tuned: the adapter was trained on .*base with digest \w+, but .* now"):
        models.load_model(tmp_path / "tuned")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_saved_quantised_folder(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = models.load_model("tiny:llama", quantization=kind, train=True)
    model.save_pretrained(str(tmp_path))
    saving.save_tokenizer(tokenizer, tmp_path)
    assert checkpoints.model_kind(tmp_path) == kind
    again, tokenizer = models.load_model(tmp_path, train=kind == "nf4")
    first, second = (
        generation.completion_logprobs(m.eval(), tokenizer, ASK, ["a", "b"], progress=False) for m in (model, again)
    )
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
    with pytest.raises(ParamError, match=f"already {kind}"):
        models.load_model(tmp_path, quantization="nf4" if kind == "int8" else "int8")
    assert len(capfd.readouterr().err.splitlines()) < 20  # bitsandbytes' ten thousand warnings


def test_folder_faults(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.tiny_model("llama"), tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match="no tokenizer"):
        models.load_model(folder)
    shutil.copy(tiny.tiny_model("llama") / "tokenizer.json", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])
    with pytest.raises(ArtifactError, match=r"model\.safetensors: missing or cut short"):
        models.load_model(folder)


def test_import_leaves_nothing_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 0))
    with pytest.raises(ArtifactError, match="no disk space"):
        models.run_models(models.ModelsParams(out=str(tmp_path / "base")))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_processes_side_by_side_build_one_tiny_model(tmp_path: Path) -> None:
    code = f"from llmops.foundation.tiny import tiny_model; tiny_model('llama', {str(tmp_path / 'llama')!r})"
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [p.wait() for p in running] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]
    assert (tmp_path / "llama" / "config.json").read_bytes() == (tiny.tiny_model("llama") / "config.json").read_bytes()


def test_the_embedded_model_comes_out_of_its_gguf_whole(tmp_path: Path) -> None:
    import numpy as np
    from gguf import GGUFReader, dequantize
    from safetensors import safe_open

    from llmops.foundation.artifacts import resolve_source

    result = models.run_models(models.ModelsParams(model=EMBEDDED_MODEL, out=str(tmp_path / "base")))
    tensors = {t.name: t for t in GGUFReader(str(resolve_source(EMBEDDED_MODEL))).tensors}
    with safe_open(result.work / "model.safetensors", "np") as saved:
        assert "lm_head.weight" not in saved.keys()  # noqa: SIM118 - tied to the embedding
        for ours, theirs in (("model.embed_tokens", "token_embd"), ("model.layers.3.mlp.down_proj", "blk.3.ffn_down")):
            t = tensors[f"{theirs}.weight"]
            want = dequantize(t.data, t.tensor_type).astype("float32")
            assert np.array_equal(saved.get_tensor(f"{ours}.weight"), want)
    config = json.loads((result.work / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "quantization_config" not in config
    assert "do_sample" not in json.loads((result.work / "generation_config.json").read_text())
    model, tokenizer = models.load_model(result.work)
    ask = [{"role": "user", "content": "What is the capital of France?"}]
    assert "Paris" in generation.generate(model, tokenizer, [ask], progress=False)[0]
