"""Models and adapters as other people's tools leave them: each passes with the same answers, or is refused before work starts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops.compression import merging, quantization
from llmops.foundation import architectures, checkpoints, memory, models, saving, tiny, weights
from llmops.foundation.artifacts import ArtifactError
from llmops.foundation.project import ParamError

TEXT = "Who wrote Hamlet? Name the capital of France."


def copy_model(arch: str, to: Path) -> Path:
    return Path(shutil.copytree(tiny.tiny_model(arch), to, ignore=shutil.ignore_patterns(".stamp")))


def logits(model: Any, tokenizer: Any) -> Any:
    import torch

    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        return model.eval()(ids).logits.float()


def write_adapter(base: str | Path, to: Path, config: Any, names: str | Path = "") -> Path:
    "A random adapter as PEFT writes it; its config names `names` as the base."
    import torch
    from peft import get_peft_model

    model, _ = models.load_model(base, dtype="float32")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        peft = get_peft_model(model, config)
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.05
    peft.save_pretrained(str(to), save_embedding_layers=False)
    file = to / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(names or base)}))
    return to


def text_tokens() -> list[int]:
    return list(models.load_tokenizer(tiny.tiny_model("llama"))(TEXT)["input_ids"])


def adapter_config(kind: str) -> Any:
    import peft

    causal: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    lora = causal | {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    configs = {
        "rslora": lambda: peft.LoraConfig(**lora, use_rslora=True),
        "dora": lambda: peft.LoraConfig(**lora, use_dora=True),
        "patterns": lambda: peft.LoraConfig(**lora, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 32}),
        "bias": lambda: peft.LoraConfig(**lora, bias="all"),
        "embedding and head saved": lambda: peft.LoraConfig(**lora, modules_to_save=["embed_tokens", "lm_head"]),
        "embedding saved": lambda: peft.LoraConfig(**lora, modules_to_save=["embed_tokens"]),
        "head saved": lambda: peft.LoraConfig(**lora, modules_to_save=["lm_head"]),
        "norms saved": lambda: peft.LoraConfig(**lora, modules_to_save=["norm", "input_layernorm"]),
        "lora on the head": lambda: peft.LoraConfig(**causal, r=4, target_modules=["q_proj", "lm_head"]),
        "lora on the embedding": lambda: peft.LoraConfig(**causal, r=4, target_modules=["q_proj", "embed_tokens"]),
        "tokens": lambda: peft.LoraConfig(**lora, trainable_token_indices=[5, 6, 7]),
        "only tokens": lambda: peft.TrainableTokensConfig(
            **causal, token_indices=text_tokens()[:2], target_modules=["embed_tokens"]
        ),
        "adalora": lambda: peft.AdaLoraConfig(**causal, init_r=4, total_step=10, target_modules=["q_proj", "v_proj"]),
        "ia3": lambda: peft.IA3Config(
            **causal, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        "loha": lambda: peft.LoHaConfig(**lora),
        "lokr": lambda: peft.LoKrConfig(**lora),
        "oft": lambda: peft.OFTConfig(**causal, oft_block_size=8, r=0, target_modules=["q_proj", "v_proj"]),
        "boft": lambda: peft.BOFTConfig(**causal, boft_block_size=8, target_modules=["q_proj", "v_proj"]),
        "vera": lambda: peft.VeraConfig(**causal, r=4, target_modules=["q_proj"]),
        "fourierft": lambda: peft.FourierFTConfig(**causal, n_frequency=50, target_modules=["q_proj"]),
        "randlora": lambda: peft.RandLoraConfig(**causal, r=4, target_modules=["q_proj"]),
        "hra": lambda: peft.HRAConfig(**lora),
        "miss": lambda: peft.MissConfig(**lora),
        "road": lambda: peft.RoadConfig(**causal, group_size=8, target_modules=["q_proj", "v_proj"]),
        "layer norms": lambda: peft.LNTuningConfig(**causal, target_modules=["input_layernorm", "norm"]),
    }
    return configs[kind]()


LORA_KINDS = (
    *("rslora", "dora", "patterns", "embedding and head saved", "embedding saved", "head saved", "norms saved"),
    *("lora on the head", "lora on the embedding", "tokens", "only tokens"),
)
OTHER_KINDS = (
    "adalora",
    "ia3",
    "loha",
    "lokr",
    "oft",
    "boft",
    "vera",
    "fourierft",
    "randlora",
    "hra",
    "miss",
    "road",
    "layer norms",
)


@pytest.mark.parametrize(
    "kind, arch",
    [(kind, arch) for kind in LORA_KINDS for arch in ("llama", "mistral")] + [(kind, "llama") for kind in OTHER_KINDS],
)
def test_an_adapter_merged_and_reopened_answers_as_it_does_beside_its_base(
    kind: str, arch: str, tmp_path: Path
) -> None:
    adapter = write_adapter(f"tiny:{arch}", tmp_path / "adapter", adapter_config(kind))
    trained = merging.resolve_adapter(adapter)
    model, tokenizer = merging.load_with_adapter(trained.adapter, trained.base, "float32")
    live, base = logits(model, tokenizer), logits(*models.load_model(f"tiny:{arch}", dtype="float32"))
    assert (live - base).abs().max() > 1e-3  # the adapter does something
    (tmp_path / "merged").mkdir()
    saving.save_model(merging.merge_adapter(model), tokenizer, tmp_path / "merged")
    again = logits(*models.load_model(tmp_path / "merged", dtype="float32"))
    assert (again - live).abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["embedding saved", "lora on the embedding", "tokens", "ia3", "dora"])
def test_the_stage_merges_into_the_dequantised_base_too(kind: str, tmp_path: Path) -> None:
    adapter = write_adapter("tiny:llama", tmp_path / "adapter", adapter_config(kind))
    (adapter / "training.json").write_text(json.dumps({"method": "qlora", "base": "tiny:llama", "dtype": "float32"}))
    cfg = merging.MergingParams(adapter=str(adapter), check_rows=1, out=str(tmp_path / "out"), wandb="disabled")
    result = merging.run_merging(cfg)
    assert result.metrics["kl_to_trained"] < 1e-4 and result.metrics["check_difference"] < 1e-3


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "XLORA", "NEW_IN_2027", None])
def test_what_cannot_be_merged_is_refused_by_name_before_work(kind: str | None, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    values = {"base_model_name_or_path": "nowhere/at-all", "peft_type": kind, "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(values))
    cfg = merging.MergingParams(adapter=str(tmp_path / "adapter"), out=str(tmp_path / "out"), wandb="disabled")
    with pytest.raises(ArtifactError, match=str(kind)):
        merging.run_merging(cfg)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_bias_that_has_no_place_in_the_base_is_refused_before_work(tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(ArtifactError, match=r"q_proj \(lora_bias\), which has no bias in the base"):
        merging.resolve_adapter(write_adapter("tiny:llama", tmp_path / "llama", config))
    merging.resolve_adapter(write_adapter("tiny:qwen2", tmp_path / "qwen2", config))  # its layers have biases


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_answer_and_are_not_merged(kind: str, tmp_path: Path) -> None:
    import peft

    of_kind = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
    adapter = write_adapter("tiny:llama", tmp_path / "a", of_kind(task_type="CAUSAL_LM", num_virtual_tokens=4))
    model, _ = models.load_model(adapter)
    assert type(model).__name__ == "PeftModelForCausalLM"
    with pytest.raises(ArtifactError, match="puts trained vectors before the prompt"):
        merging.resolve_adapter(adapter)


@pytest.mark.parametrize("name", ["/another/machine/base", "owner/on-the-hub", ""])
def test_a_base_that_lies_elsewhere_is_used_first(name: str, tmp_path: Path) -> None:
    config = adapter_config("rslora")
    adapter = write_adapter("tiny:mistral", tmp_path / "내 어댑터", config, names=name or "x")
    values = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(values | {"base_model_name_or_path": name or None}))
    base = copy_model("mistral", tmp_path / "옮긴 모델 (1) #2")
    with pytest.raises(ArtifactError, match="`base`"):
        models.load_model(adapter)
    model, tokenizer = models.load_model(adapter, base=base, dtype="float32")
    live = logits(model, tokenizer)
    cfg = merging.MergingParams(
        adapter=str(adapter), base=str(base), method="base", check_rows=1, out=str(tmp_path / "out"), wandb="disabled"
    )
    result = merging.run_merging(cfg)
    assert (logits(*models.load_model(result.work, dtype="float32")) - live).abs().max() < 1e-3
    with pytest.raises(ArtifactError, match="does not fit|another model"):
        models.load_model(adapter, base="tiny:falcon")
    with pytest.raises(ArtifactError, match="^base: .*no such file or folder"):
        models.load_model(adapter, base=tmp_path / "not here")


@given(
    files=st.sets(
        st.sampled_from(
            [
                *weights.MODEL_WEIGHTS,
                "consolidated.safetensors",
                "training_args.bin",
                "model.fp16.safetensors",
                "x.gguf",
            ]
        )
    )
)
@settings(derandomize=True, deadline=None, max_examples=40)
def test_the_files_that_count_are_those_that_transformers_opens(files: set[str], tmp_path_factory: Any) -> None:
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    folder = tmp_path_factory.mktemp("weights")
    (folder / "config.json").write_text("{}")
    for name in files:
        part = "model-00001-of-00001.safetensors" if "safetensors" in name else "pytorch_model-00001-of-00001.bin"
        (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": {"a": part}}) if "index" in name else "")
        if "index" in name:
            (folder / part).touch()
    try:
        opened, _ = _get_resolved_checkpoint_files(str(folder), None, None, None, None, False)
    except OSError:
        opened = []
    assert [str(path) for path in weights.find_weights(folder)] == list(opened or [])


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_pickled_checkpoint_is_refused_with_what_to_do_and_passes_once_imported(method: str, tmp_path: Path) -> None:
    import torch

    pickled = copy_model("mistral", tmp_path / "pickled")
    torch.save(weights.load_tensors(pickled), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    cfg = {"method": method, "out": str(tmp_path / "out"), "wandb": "disabled", "compensate_steps": 0, "check_rows": 1}
    with pytest.raises(ArtifactError, match="Import the model first"):
        quantization.run_quantization(quantization.QuantizationParams(model=str(pickled), **cfg))
    assert not (tmp_path / "out").exists()
    result = models.run_models(models.ModelsParams(model=str(pickled), out=str(tmp_path / "base"), wandb="disabled"))
    done = quantization.run_quantization(
        quantization.QuantizationParams(model=str(result.work), task_rows=2, general_rows=1, **cfg)
    )
    needed = quantization.gptq_shapes(memory.meta_model(pickled), 4, 32)
    assert weights.stored_shapes(done.work) == needed


def test_a_second_set_of_weights_is_neither_counted_nor_stored(tmp_path: Path) -> None:
    twice = copy_model("mistral", tmp_path / "twice")
    tensors = weights.load_tensors(twice)
    import torch
    from safetensors.torch import save_file

    torch.save(tensors, twice / "pytorch_model.bin")
    save_file({f"other.{name}": tensor for name, tensor in tensors.items()}, twice / "consolidated.safetensors")
    cfg = quantization.QuantizationParams(
        model=str(twice), method="rtn", out=str(tmp_path / "rtn"), wandb="disabled", check_rows=1
    )
    done = quantization.run_quantization(cfg)
    assert checkpoints.size_mb(twice) == checkpoints.size_mb("tiny:mistral")
    assert weights.stored_shapes(done.work) == quantization.gptq_shapes(memory.meta_model(twice), 4, 32)


def test_a_checkpoint_without_some_tensor_is_never_sealed_nor_opened(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    cfg = quantization.QuantizationParams(method="rtn", out=str(tmp_path / "rtn"), wandb="disabled", check_rows=1)
    work = quantization.run_quantization(cfg).work
    whole = weights.load_tensors(work)
    for lost in ("model.norm.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.qweight"):
        save_file({n: t for n, t in whole.items() if n != lost}, work / "model.safetensors", {"format": "pt"})
        needed = quantization.gptq_shapes(memory.meta_model("tiny:llama"), 4, 32)
        with pytest.raises(ArtifactError, match=f"{lost} is missing"):
            weights.check_stored(work, needed)
        with pytest.raises(ArtifactError, match=f"{lost} is missing.*random numbers"):
            models.load_model(work)


def expert_model(to: Path, model_type: str = "mixtral", **values: Any) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    to.mkdir()
    size = (
        tiny.TINY_SIZE
        | tiny.TINY_TOKENS
        | {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 64, "num_experts_per_tok": 2}
    )
    config = AutoConfig.for_model(model_type, **(size | values))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        saving.save_weights(AutoModelForCausalLM.from_config(config, dtype=torch.float32), to)
    shutil.copytree(tiny.tiny_tokenizer(), to, dirs_exist_ok=True)
    return to


def test_tensors_under_an_older_name_in_the_files_are_the_models(tmp_path: Path) -> None:
    folder = expert_model(tmp_path / "neox", "gpt_neox", num_key_value_heads=2)
    assert "embed_out.weight" in weights.stored_shapes(folder)  # GPT-NeoX's name for lm_head.weight
    base = models.run_models(models.ModelsParams(model=str(folder), out=str(tmp_path / "base"), wandb="disabled")).work
    live = logits(*models.load_model(folder, dtype="float32"))
    assert logits(*models.load_model(base, dtype="float32")).equal(live)
    cfg = quantization.QuantizationParams(
        model=str(base), method="rtn", out=str(tmp_path / "rtn"), wandb="disabled", check_rows=1
    )
    work = quantization.run_quantization(cfg).work
    assert weights.stored_shapes(work) == quantization.gptq_shapes(memory.meta_model(folder), 4, 32)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_are_named_and_counted(model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = expert_model(tmp_path / "moe", model_type)
    share = architectures.dense_share(memory.meta_model(folder))
    for method in ("gptq", "rtn"):
        cfg = quantization.QuantizationParams(
            model=str(folder), method=method, out=str(tmp_path / "no"), wandb="disabled"
        )
        with pytest.raises(ParamError, match="a mixture of experts.*has no place for them"):
            quantization.run_quantization(cfg)
    cfg = quantization.QuantizationParams(
        model=str(folder), method="nf4", out=str(tmp_path / "nf4"), wandb="disabled", check_rows=1
    )
    done = quantization.run_quantization(cfg)
    assert done.metrics["share_16bit"] == pytest.approx(share) and "a mixture of experts" in capsys.readouterr().out
    assert memory.model_shapes(str(folder)).expert_weights > 0


@pytest.mark.parametrize("method", ["nf4", "int8", "gptq", "rtn"])
@pytest.mark.parametrize("arch", ["falcon", "mistral"])
def test_a_quantised_checkpoint_reopens_with_the_weights_that_it_holds(arch: str, method: str, tmp_path: Path) -> None:
    cfg = quantization.QuantizationParams(
        model=f"tiny:{arch}",
        method=method,
        task_rows=2,
        general_rows=1,
        compensate_steps=0,
        check_rows=1,
        out=str(tmp_path / "q"),
        wandb="disabled",
    )
    work = quantization.run_quantization(cfg).work
    once, twice = (logits(*models.load_model(work)) for _ in range(2))
    assert once.equal(twice)
    if quantization.KIND[method] == "gptq":  # against the weights that the codes stand for
        tensors, offset = weights.load_tensors(work), 1
        plain, tokenizer = models.load_model(f"tiny:{arch}", dtype="float32")
        state = plain.state_dict()
        for name in quantization.layer_names(tensors):
            codes, scales = quantization_layer(tensors, name, offset)
            state[f"{name}.weight"].copy_(codes * scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1))
        expected = logits(plain, tokenizer)
        reopened = logits(*models.load_model(work, dtype="float32"))
        assert (reopened - expected).abs().max() < 0.05 * expected.abs().max()


def quantization_layer(tensors: dict[str, Any], name: str, offset: int) -> tuple[Any, Any]:
    from llmops.compression.compensation import read_layer

    return read_layer(tensors, name, 4, offset)


@pytest.mark.parametrize("special", [True, False])
def test_a_tokenizer_larger_than_the_embedding_is_refused_at_import(special: bool, tmp_path: Path) -> None:
    folder = copy_model("llama", tmp_path / "forgot")
    tokenizer = models.load_tokenizer(folder)
    tokenizer.add_tokens(["<cite>", "</cite>"], special_tokens=special)
    tokenizer.save_pretrained(str(folder))
    with pytest.raises(ArtifactError, match=r"<cite>, </cite> have no vector among its 49152 rows.*resize_token_emb"):
        models.run_models(models.ModelsParams(model=str(folder), out=str(tmp_path / "base"), wandb="disabled"))
    model, _ = models.load_model("tiny:llama", dtype="float32")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    (tmp_path / "resized").mkdir()
    saving.save_model(model, tokenizer, tmp_path / "resized")
    models.load_model(tmp_path / "resized")


def test_named_chat_templates_pass_and_without_a_default_are_refused(tmp_path: Path) -> None:
    folder = copy_model("llama", tmp_path / "named")
    plain = models.load_tokenizer(folder).chat_template
    values = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    templates = [{"name": "default", "template": plain}, {"name": "tool_use", "template": "TOOLS" + plain}]
    (folder / "tokenizer_config.json").write_text(json.dumps(values | {"chat_template": templates}))
    settings = {"wandb": "disabled", "task_rows": 2, "general_rows": 1, "compensate_steps": 0, "check_rows": 1}
    base = models.run_models(models.ModelsParams(model=str(folder), out=str(tmp_path / "base"), wandb="disabled")).work
    for source in (folder, base):
        cfg = quantization.QuantizationParams(model=str(source), out=str(tmp_path / f"{source.name}-gptq"), **settings)
        work = quantization.run_quantization(cfg).work
        assert checkpoints.chat_template_names(work) == {"default", "tool_use"}
    templates[0]["name"] = "rag"
    (folder / "tokenizer_config.json").write_text(json.dumps(values | {"chat_template": templates}))
    with pytest.raises(ArtifactError, match="rag, tool_use and none named default"):
        models.run_models(models.ModelsParams(model=str(folder), out=str(tmp_path / "no"), wandb="disabled"))
    assert not (tmp_path / "no").exists()


def test_a_config_that_ties_two_different_tensors_is_put_right_at_import(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = copy_model("llama", tmp_path / "two")
    tensors = weights.load_tensors(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    live = logits(*models.load_model(folder, dtype="float32"))
    cfg = quantization.QuantizationParams(
        model=str(folder), method="rtn", out=str(tmp_path / "q"), wandb="disabled", check_rows=1
    )
    with pytest.raises(ArtifactError, match="its files hold two; import it first"):
        quantization.run_quantization(cfg)
    base = models.run_models(models.ModelsParams(model=str(folder), out=str(tmp_path / "base"), wandb="disabled")).work
    assert logits(*models.load_model(base, dtype="float32")).equal(live)
    done = quantization.run_quantization(replace(cfg, model=str(base)))
    assert "lm_head.weight" in weights.stored_shapes(done.work)


BAD_INDEXES = {
    "a list": (["x"], "weight_map does not give a file name for each tensor"),
    "a number": ({"a": 3}, "weight_map does not give a file name for each tensor"),
    "outside": ({"a": "../model.safetensors"}, "lies outside the model folder"),
    "empty": ({}, "has no weights"),
    "not there": ({"a": "model-00001-of-00002.safetensors"}, "missing or cut short"),
}


@pytest.mark.parametrize("kind", BAD_INDEXES)
def test_an_index_that_names_no_files_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    parts, problem = BAD_INDEXES[kind]
    folder = copy_model("mistral", tmp_path / "indexed")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    with pytest.raises(ArtifactError, match=problem):
        models.run_models(models.ModelsParams(model=str(folder), out=str(tmp_path / "base"), wandb="disabled"))
    for method in ("rtn", "nf4"):
        cfg = quantization.QuantizationParams(
            model=str(folder), method=method, out=str(tmp_path / "q"), wandb="disabled"
        )
        with pytest.raises(ArtifactError, match=problem):
            quantization.run_quantization(cfg)
    assert not (tmp_path / "q").exists() and not (tmp_path / "base").exists()


def test_a_stale_index_beside_a_whole_file_is_left_alone(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    stale, clean = copy_model("mistral", tmp_path / "stale"), copy_model("mistral", tmp_path / "clean")
    tensors = weights.load_tensors(stale)
    save_file(tensors, stale / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (stale / "model.safetensors.index.json").write_text(json.dumps(index))
    for folder in (stale, clean):
        save_file({n: t * 1.3 for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    stored = []
    for folder in (stale, clean):
        cfg = quantization.QuantizationParams(
            model=str(folder), method="rtn", out=str(tmp_path / f"q-{folder.name}"), wandb="disabled", check_rows=1
        )
        stored.append(weights.load_tensors(quantization.run_quantization(cfg).work))
    assert stored[0].keys() == stored[1].keys()
    assert all(stored[0][name].equal(stored[1][name]) for name in stored[0])


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 123456\n"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("fault", ["pointer", "page", "cut", "header"])
def test_a_weight_file_that_is_none_is_refused_before_work(name: str, fault: str, tmp_path: Path) -> None:
    import torch

    folder = copy_model("mistral", tmp_path / "model")
    if name == "pytorch_model.bin":
        torch.save(weights.load_tensors(folder), folder / name)
        (folder / "model.safetensors").unlink()
    whole = (folder / name).read_bytes()
    content = {
        "pointer": LFS_POINTER,
        "page": b"<html>not found</html>",
        "cut": whole[: len(whole) // 2],
        "header": len(b"{}x").to_bytes(8, "little") + b"{}x",
    }[fault]
    (folder / name).write_bytes(content)
    for call in (
        lambda: models.run_models(models.ModelsParams(model=str(folder), out=str(tmp_path / "o"), wandb="disabled")),
        lambda: checkpoints.check_model_folder(folder),
    ):
        with pytest.raises(ArtifactError, match=f"{name}: .*(run git lfs pull|cut short|no safetensors file)"):
            call()
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["config.json", *checkpoints.JSON_FILES])
@pytest.mark.parametrize("content", [b"{broken", b"[]", LFS_POINTER, b"\xff\xfe{\x00}\x00"])
def test_a_settings_file_that_is_no_json_object_is_named_before_work(name: str, content: bytes, tmp_path: Path) -> None:
    folder = copy_model("llama", tmp_path / "model")
    (folder / name).write_bytes(content)
    out = str(tmp_path / "out")
    with pytest.raises(ArtifactError, match=f"{name}: (cannot be read as JSON|holds a list)"):
        models.run_models(models.ModelsParams(model=str(folder), out=out, wandb="disabled"))
    with pytest.raises(ArtifactError, match=f"{name}: (cannot be read as JSON|holds a list)"):
        quantization.run_quantization(quantization.QuantizationParams(model=str(folder), out=out, wandb="disabled"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "training.json", "adapter_model.bin"])
def test_an_adapters_file_that_cannot_be_read_is_named_before_work(name: str, tmp_path: Path) -> None:
    import torch

    adapter = write_adapter("tiny:llama", tmp_path / "adapter", adapter_config("rslora"))
    if name.endswith(".bin"):
        (adapter / "adapter_model.safetensors").unlink()
        torch.save(torch.nn.Linear(2, 2), adapter / name)
    else:
        (adapter / name).write_text("{broken")
    cfg = merging.MergingParams(adapter=str(adapter), out=str(tmp_path / "out"), wandb="disabled")
    with pytest.raises(ArtifactError, match=f"{name}: (cannot be read as JSON|is damaged, or a pickle)"):
        merging.run_merging(cfg)
    with pytest.raises(ArtifactError):
        models.load_model(adapter)


@pytest.mark.parametrize("targets", [["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], ["mlp.gate.weight"]])
def test_an_adapter_on_experts_merges_to_its_live_answers(targets: list[str], tmp_path: Path) -> None:
    import peft

    base = expert_model(tmp_path / "moe")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], target_parameters=targets)
    adapter = write_adapter(base, tmp_path / "adapter", config)
    live = logits(*models.load_model(adapter, dtype="float32"))
    assert (live - logits(*models.load_model(base, dtype="float32"))).abs().max() > 1e-3
    cfg = merging.MergingParams(
        adapter=str(adapter), method="base", check_rows=1, out=str(tmp_path / "out"), wandb="disabled"
    )
    work = merging.run_merging(cfg).work
    assert (logits(*models.load_model(work, dtype="float32")) - live).abs().max() < 1e-3
