"""Pruned models of every family: ordinary checkpoints that compute what their source computes without the pieces."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmops.compression import pruning
from llmops.compression.pruning import KIND, PruningError, PruningParams, PruningResult, check_pruned, run_pruning
from llmops.foundation.artifacts import ArtifactError, lineage, seal, verify
from llmops.foundation.checkpoints import model_path
from llmops.foundation.generation import generate
from llmops.foundation.models import load_model, load_tokenizer
from llmops.foundation.project import ParamError
from llmops.foundation.saving import save_model
from llmops.foundation.tiny import tiny_config

FAMILIES = ("llama", "mistral", "qwen", "qwen2", "gemma", "gemma2", "falcon")


def random_source(arch: str, out: Path, **shape: Any) -> Path:
    "A model of four layers with random weights, in which heads can be pruned, too."
    from transformers import AutoModelForCausalLM

    config = tiny_config(arch)
    for name, value in {"num_hidden_layers": 4, **shape}.items():
        setattr(config, name, value)
    if arch != "falcon":
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 16
    if getattr(config, "layer_types", None):
        config.layer_types = (
            ["sliding_attention", "full_attention"] if arch.startswith("gemma") else ["full_attention"] * 2
        ) * 2
    torch.manual_seed(0)
    out.mkdir(parents=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    save_model(model, load_tokenizer(model_path("tiny:llama")), out)
    return out


def pruned(model: Path | str, out: Path, **params: Any) -> tuple[PruningResult, dict[str, Any]]:
    "Run and seal, as the stage's notebook does."
    cfg = PruningParams(**{"model": str(model), "wandb": "disabled", "out": str(out), **params})
    result = run_pruning(cfg)
    return result, seal(result.work, cfg.out, KIND, "llmops.compression.pruning", cfg, result.inputs, result.metrics)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_source("llama", tmp_path_factory.mktemp("source") / "llama")


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_family_is_pruned_and_reopened(arch: str, tmp_path: Path) -> None:
    source = random_source(arch, tmp_path / "source")
    heads = 0.0 if arch == "falcon" else 0.5
    result, made = pruned(source, tmp_path / "out", layers=0.5, mlp=0.25, heads=heads)
    assert result.metrics["difference"] < 1e-3  # nothing else than what was removed
    assert result.metrics["kl"] > 0 and result.metrics["parameters_share"] < 1
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_hidden_layers"] == 2 and 96 in (config.get("intermediate_size"), config.get("ffn_hidden_size"))
    if heads:
        assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 16)
    from transformers import AutoModelForCausalLM

    opened: Any = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), output_loading_info=True)
    told = opened[1]
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    model, tokenizer = load_model(tmp_path / "out")
    assert len(generate(model, tokenizer, [[{"role": "user", "content": "Hi"}]], max_new_tokens=3, progress=False)) == 1
    assert verify(tmp_path / "out") and made["kind"] == "model"


def test_the_layer_types_that_stay_are_those_of_the_layers_that_stay(tmp_path: Path) -> None:
    source = random_source("gemma2", tmp_path / "source")
    result, _ = pruned(source, tmp_path / "out", layers=0.25, mlp=0)
    stays = [piece["layer"] for piece in result.pieces if piece["kept"]]
    types = ["sliding_attention", "full_attention"] * 2
    assert json.loads((tmp_path / "out/config.json").read_text())["layer_types"] == [types[n] for n in stays]


def test_the_same_parameters_give_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    one, two = (pruned(llama, tmp_path / name, layers=0.5)[1]["digest"] for name in ("a", "b"))
    other = pruned(llama, tmp_path / "c", layers=0.5, importance="random")[1]["digest"]
    assert one == two != other
    assert any("llama" in str(step) for step in lineage(tmp_path / "a"))


def test_useless_neurons_are_the_ones_that_go(llama: Path, tmp_path: Path) -> None:
    "Neurons that are never active, however large the weights that read them."
    model, tokenizer = load_model(llama, dtype="float32")
    dead = list(range(0, 128, 4))
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[dead] = 0
        layer.mlp.down_proj.weight.data[:, dead] *= 100
    source = tmp_path / "source"
    source.mkdir()
    save_model(model, tokenizer, source)
    result, _ = pruned(source, tmp_path / "out", mlp=0.25)
    assert result.metrics["kl"] < 1e-4  # nothing is lost
    control, _ = pruned(source, tmp_path / "control", mlp=0.25, importance="magnitude")
    assert control.metrics["kl"] > 0.01  # weights alone keep them


def test_a_layer_that_does_nothing_is_the_one_that_goes(llama: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(llama, dtype="float32")
    idle = model.model.layers[1]
    idle.self_attn.o_proj.weight.data *= 0
    idle.mlp.down_proj.weight.data *= 0
    source = tmp_path / "source"
    source.mkdir()
    save_model(model, tokenizer, source)
    result, _ = pruned(source, tmp_path / "out", layers=0.25, mlp=0)
    assert [piece["layer"] for piece in result.pieces if not piece["kept"]] == [1]
    assert result.metrics["kl"] < 1e-4 and result.metrics["top1_agreement"] == 1


@pytest.mark.parametrize(
    "params, says",
    [
        ({"heads": 0.25, "mlp": 0}, "heads: 0.25 of 2 key-value heads is 0.5"),
        ({"heads": 0.25, "mlp": 0}, "0.5 would do"),
        ({"layers": 0.9, "mlp": 0}, "0.75 would do"),
        ({"mlp": 0.1}, "mlp: 0.1 of 4 groups of 32 neurons is 0.4"),
        ({"mlp": 0.25, "multiple_of": 48}, "multiple_of: 48 does not divide the 128 neurons"),
        ({"model": "nowhere"}, "nowhere"),
    ],
)
def test_what_does_not_come_out_even_is_refused_before_any_work(
    params: dict[str, Any], says: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises((ParamError, ArtifactError), match=says):
        pruned(str(params.pop("model", llama)), tmp_path / "out", **params)
    assert not list(tmp_path.iterdir())


def test_fused_projections_are_refused_by_name(tmp_path: Path) -> None:
    source = random_source("falcon", tmp_path / "source")
    with pytest.raises(ParamError, match="heads: the attention of .* set heads: 0"):
        pruned(source, tmp_path / "out", heads=0.5, mlp=0)


def test_a_model_written_wrongly_is_not_kept(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = pruning.cut_linear
    monkeypatch.setattr(pruning, "cut_linear", lambda linear, places, dim: cut(linear, sorted(places, key=str), dim)
                        if dim else cut(linear, places, dim))  # fmt: skip
    with pytest.raises(PruningError, match="nothing was kept"):
        pruned(llama, tmp_path / "out", mlp=0.25)
    assert not (tmp_path / "out").exists()


def test_a_difference_that_is_no_number_is_refused() -> None:
    with pytest.raises(PruningError):
        check_pruned([torch.zeros(1, 2)], [torch.full((1, 2), torch.nan)], "float32")
