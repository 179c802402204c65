"""Re-training: only data that are new and whole, only weights that can be trained on, the same bytes again, an honest verdict."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import run_apart

from llmops.adaptation.finetuning import FinetuningParams, run_finetuning
from llmops.adaptation.forgetting import (
    ForgettingParams,
    compare_ability,
    decide_outcome,
    evaluations_path,
    measure_gain,
    read_pairs,
    run_forgetting,
)
from llmops.adaptation.retraining import (
    KIND,
    RetrainingParams,
    encode_mixture,
    learned_data,
    new_data_path,
    resolve_inputs,
    run_retraining,
    text_blocks,
)
from llmops.foundation.artifacts import lineage, read_manifest, seal
from llmops.foundation.datasets import DatasetsParams, dataset_path, read_split, run_datasets
from llmops.foundation.decoding import DataError
from llmops.foundation.models import load_model, load_tokenizer
from llmops.foundation.project import ParamError
from llmops.foundation.reading import write_jsonl
from llmops.foundation.stats import EvaluationError
from llmops.foundation.tiny import tiny_model

STAGE = "llmops.adaptation.retraining"
SMALL: dict[str, Any] = dict(
    max_steps=4, batch_size=4, micro_batch_size=2, eval_every=2, save_every=2, rank=4, wandb="disabled"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with `data`, and `lora`, an adapter that learned it."
    folder = tmp_path_factory.mktemp("retraining")
    shutil.copytree(dataset_path("tiny:data"), folder / "data")
    cfg = FinetuningParams(**SMALL, method="lora", data=f"{folder}/data", out=f"{folder}/lora")
    result = run_finetuning(cfg)
    seal(result.work, cfg.out, "adapter", "llmops.adaptation.finetuning", cfg, result.inputs)
    return folder


@pytest.fixture
def own(place: Path) -> Any:
    "The old data, which a test may spoil."
    shutil.copytree(place / "data", place / "kept")
    yield place / "data"
    shutil.rmtree(place / "data", ignore_errors=True)
    (place / "kept").rename(place / "data")


def params(place: Path, **changes: Any) -> RetrainingParams:
    told = SMALL | {"model": f"{place}/lora", "old_data": [], "out": f"{place}/again"}
    return RetrainingParams(**told | changes)


def make_dataset(out: Path, rows: list[dict[str, Any]], **told: Any) -> str:
    "A dataset of these rows."
    rows_file, text = out.with_suffix(".jsonl"), out.with_suffix(".texts.jsonl")
    write_jsonl(rows_file, rows)
    write_jsonl(text, [{"document": f"{word} " * 40} for word in ("one", "two", "three", "four", "five", "six")])
    told |= {"data": str(rows_file), "text": str(text), "test": 0.2, "valid": 0.2}
    cfg = DatasetsParams(**told, general_train=1, general_test=1, out=str(out))
    result = run_datasets(cfg)
    seal(result.work, cfg.out, "dataset", "llmops.foundation.datasets", cfg, result.inputs)
    return str(out)


def refuse(cfg: RetrainingParams, error: type[Exception], *words: str) -> None:
    "The stage refuses, says so, and leaves nothing behind."
    with pytest.raises(error) as e:
        run_retraining(cfg)
    for word in words:
        assert word in str(e.value), f"{word!r} is not in {e.value}"
    assert not Path(cfg.out).exists()


def test_the_lineage_names_what_is_replayed(place: Path) -> None:
    cfg = params(place, out=f"{place}/replayed")
    result = run_retraining(cfg)
    manifest = seal(result.work, cfg.out, KIND, STAGE, cfg, result.inputs)
    old, new = (read_manifest(path)["digest"] for path in (place / "data", new_data_path("tiny:policy")))
    parent = read_manifest(place / "lora")["digest"]
    assert manifest["inputs"]["old_data 1"]["digest"] == old and manifest["inputs"]["new_data"]["digest"] == new
    assert manifest["inputs"]["parent"]["digest"] == parent and manifest["kind"] == "adapter"
    assert list(learned_data(Path(cfg.out)).values()) == [old, new]
    assert {old, new, parent} <= {row["digest"] for row in lineage(cfg.out) if row["unchanged"]}
    ids = json.loads((Path(cfg.out) / "rows.json").read_text())
    assert set(ids["old"]) < {row["id"] for row in read_split(place / "data", "train")}
    assert len(ids["old"]) == round(0.25 * len(read_split(place / "data", "train")))
    load_model(cfg.out)  # opens like every adapter


def test_replay_of_nothing_is_to_continue(place: Path) -> None:
    weights = []
    for method in ("continue", "replay"):
        result = run_retraining(params(place, method=method, replay_share=0.0, out=f"{place}/{method}"))
        weights.append((result.work / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != (place / "lora" / "adapter_model.safetensors").read_bytes()


def test_old_data_that_are_gone(place: Path, own: Path) -> None:
    shutil.rmtree(own)
    digest = read_manifest(place / "lora")["inputs"]["data"]["digest"]
    refuse(params(place), DataError, "old_data", digest[:12], "is gone", "bring it back")
    refuse(params(place, method="from_base"), DataError, "old_data", "is gone")
    assert run_retraining(params(place, method="continue")).counts["old_rows"] == 0  # replays nothing, needs nothing


def test_old_data_that_were_altered(place: Path, own: Path) -> None:
    text = (own / "train.jsonl").read_text()
    (own / "train.jsonl").write_text(text.replace("a", "o", 1))  # as long as before
    refuse(params(place), DataError, "old_data", "train.jsonl: altered since it was sealed")


def test_old_data_that_are_others(place: Path) -> None:
    rows = [{"passage": f"Case {n} is open.", "question": f"Is case {n} open?", "answer": "open"} for n in range(40)]
    other = make_dataset(place / "other", rows)
    expected = read_manifest(place / "data")["digest"][:12]
    found = read_manifest(other)["digest"][:12]
    refuse(params(place, old_data=[other]), DataError, f"has digest {found}", f"learned {expected}")


def test_moved_old_data_are_found_where_they_are_named(place: Path, own: Path) -> None:
    shutil.move(own, place / "elsewhere")
    inputs = resolve_inputs(params(place, old_data=[f"{place}/elsewhere"]))
    assert inputs.old == [place / "elsewhere"]
    shutil.move(place / "elsewhere", own)


def test_new_data_that_are_the_old_ones(place: Path) -> None:
    refuse(params(place, new_data=f"{place}/data"), DataError, "new_data", "nothing new to learn")
    rows = [
        {name: row[name] for name in ("passage", "question", "answer")} for row in read_split(place / "data", "train")
    ]
    some = make_dataset(place / "some", rows[:20])
    refuse(params(place, new_data=some), DataError, "nothing new to learn")


def test_new_data_that_hold_old_test_rows(place: Path) -> None:
    rows = [
        {name: row[name] for name in ("passage", "question", "answer")} for row in read_split(place / "data", "test")
    ]
    leak = make_dataset(place / "leak", rows)
    refuse(params(place, new_data=leak), DataError, "are test rows of", "test.jsonl among its benchmarks")


def test_new_data_of_another_task(place: Path) -> None:
    rows = []
    for n in range(40):
        rows.append(
            {"passage": f"Case {n} is {n % 2}.", "question": f"Is case {n} open?", "answer": "yes no".split()[n % 2]}
        )
    told = {"task": "classification", "labels": ["yes", "no"], "instruction": "Answer with one of: {labels}."}
    labels = make_dataset(place / "labels", rows, template="passage-question", **told)
    words = ("new_data", "classification", "extractive", "task: extractive")
    refuse(params(place, new_data=labels), DataError, *words)


@pytest.mark.parametrize("share", [-0.01, 1.01, float("nan")])
def test_a_share_out_of_range(place: Path, share: float) -> None:
    with pytest.raises(ParamError, match="replay_share"):
        params(place, replay_share=share)


def test_a_quantised_version_is_not_trained_on(place: Path) -> None:
    gptq = place / "gptq"
    shutil.copytree(tiny_model("llama"), gptq, dirs_exist_ok=True)
    config = json.loads((gptq / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    (gptq / "config.json").write_text(json.dumps(config))
    words = (
        "model: ",
        "is quantised (gptq)",
        "re-train the version that it was made from",
        "quantise what comes of it again",
    )
    refuse(params(place, model=str(gptq), old_data=[f"{place}/data"]), ParamError, *words)


def test_a_version_that_says_nothing_about_itself(place: Path) -> None:
    bare = {"model": "tiny:llama", "old_data": []}
    refuse(params(place, **bare), ParamError, "old_data", "does not say what it learned")
    refuse(params(place, **bare, method="from_base"), ParamError, "base", "name the base")


def test_from_base_begins_where_the_version_began(place: Path) -> None:
    inputs = resolve_inputs(params(place, method="from_base"))
    assert inputs.start.adapter is None and inputs.start.base == tiny_model("llama") and inputs.start.method == "lora"
    mixture = encode_mixture(
        params(place, method="from_base"), load_tokenizer(tiny_model("llama")), inputs.new, inputs.old, 1024
    )
    assert mixture.counts["old_rows"] == len(read_split(place / "data", "train"))


def test_killed_and_resumed_gives_the_same_digests(place: Path) -> None:
    told = SMALL | {"model": f"{place}/lora", "old_data": [], "out": f"{place}/killed", "learning_rate": 0.01}
    assert run_apart(STAGE, told, kill_at=3).returncode == -signal.SIGKILL
    resumed = run_apart(STAGE, told)
    assert "continuing from step 2" in resumed.stdout, resumed.stdout + resumed.stderr
    cfg = RetrainingParams(**told | {"out": f"{place}/whole"})  # in this process, without a stop
    result = run_retraining(cfg)
    whole = seal(result.work, cfg.out, KIND, STAGE, cfg, result.inputs)
    assert resumed.stdout.split()[-1] == whole["digest"]


def test_raw_text_is_learned_token_by_token(place: Path) -> None:
    rules = ["A lost card is blocked at once and a new one is sent.", "A transfer abroad takes two days and has a fee."]
    rows = [{"id": str(n), "text": f"Rule {n}. {rules[n % 2]}"} for n in range(40)]
    write_jsonl(place / "texts.jsonl", rows)
    cfg = params(place, texts=f"{place}/texts.jsonl", new_data="", block_tokens=32, learning_rate=0.02, max_steps=12)
    result = run_retraining(replace(cfg, method="continue"))
    metrics = result.metrics
    assert metrics["text_perplexity"] < 0.5 * metrics["text_perplexity_before"]
    assert result.counts["text_blocks"] > 5 and result.counts["new_rows"] == 0 and "texts" in result.inputs
    tokenizer = load_tokenizer(tiny_model("llama"))
    for block in text_blocks(tokenizer, [row["text"] for row in rows], 32):
        assert block["labels"] == block["input_ids"]
    with_old = resolve_inputs(cfg)
    assert encode_mixture(cfg, tokenizer, None, with_old.old, 1024).counts["old_rows"] > 0
    write_jsonl(place / "one.jsonl", rows[:1])
    refuse(replace(cfg, texts=f"{place}/one.jsonl"), DataError, "texts", "two are the least")


@pytest.mark.parametrize(
    "low, high, outcome",
    [(-0.05, 0.3, "kept"), (-0.051, 0.3, "undecided"), (-0.3, -0.05, "undecided"), (-0.3, -0.051, "lost")],
)
def test_kept_means_within_the_margin(low: float, high: float, outcome: str) -> None:
    assert decide_outcome(low, high, 0.05) == outcome


def test_what_is_compared_is_paired() -> None:
    "Where both are wrong about the same questions, the interval is that of the differences and not of two means."
    cfg = ForgettingParams(resamples=999)
    before = [float(n % 2) for n in range(200)]
    after = [score if n > 3 else 0.0 for n, score in enumerate(before)]
    ability = compare_ability("F1", before, after, [str(n) for n in range(200)], 0.05, cfg)
    assert ability.low is not None and ability.low > -0.05 and ability.outcome == "kept"


def test_the_share_of_a_gain() -> None:
    pairs = read_pairs(ForgettingParams())
    parent, version = pairs["base"].new, pairs["replay"].new

    def said(right: int) -> Any:
        rows = [p | {"f1": float(n < right), "exact_match": n < right} for n, p in enumerate(parent.predictions)]
        return replace(parent, predictions=rows)

    count = len(parent.predictions)
    clusters, cfg = [str(n) for n in range(count)], ForgettingParams(resamples=999)
    gain = measure_gain(said(0), said(count // 2), said(count), clusters, cfg)
    assert gain.share == pytest.approx((count // 2) / count)
    assert measure_gain(said(0), version, said(0), clusters, cfg).share is None  # nothing was to be gained


def test_the_forgetting_stage_is_the_same_twice(tmp_path: Path) -> None:
    cfg = ForgettingParams(resamples=199, perplexity_texts=2, perplexity_max_length=16, out=str(tmp_path / "made"))
    told = []
    for _ in range(2):
        told.append((run_forgetting(cfg).work / "forgetting.json").read_bytes())
    assert told[0] == told[1]
    figures = json.loads(told[0])
    assert [v["version"] for v in figures["versions"]] == ["continue", "replay"]
    assert [v["replay_share"] for v in figures["versions"]] == [0.0, 0.25]


def test_evaluations_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="continue has no evaluation"):
        shutil.copytree(evaluations_path("tiny:new"), tmp_path / "new")
        shutil.rmtree(tmp_path / "new" / "continue")
        read_pairs(ForgettingParams(new=str(tmp_path / "new")))
    with pytest.raises(EvaluationError, match="asked the old questions"):
        read_pairs(ForgettingParams(new="tiny:old"))
