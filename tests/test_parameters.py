"""Every parameter of every stage is read by the stage's work, not only written into its manifest."""

import ast
import dataclasses
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT

from llmops.foundation.project import read_params
from llmops.tools.pipeline import StageNotebook, read_stages, stage_notebooks


def tiny_retrieval() -> str:
    from llmops.retrieval.retrieval import retrieval_path

    return str(retrieval_path("tiny:retrieval"))


def tiny_case() -> str:
    from llmops.decision.regressions import remember_case
    from llmops.foundation.evaluations import read_evaluation
    from llmops.evaluation.tiny_versions import tiny_evaluations

    made, file = tiny_evaluations() / "qlora", ROOT / "runs/.tiny/cases.jsonl"
    if not file.is_file():
        remember_case(made, read_evaluation(made).predictions[0]["id"], "a tiny model knows nothing", file)
    return str(file)


def tiny_strategies() -> str:
    from llmops.foundation.strategies import Strategy, write_strategies

    folder = ROOT / "runs/.tiny/strategies"
    folder.mkdir(parents=True, exist_ok=True)
    write_strategies(folder, {"plain": Strategy()}, "plain")
    return str(folder)


def tiny_pairs() -> str:
    "A file with a pair about a training question, which stands there twice."
    from llmops.foundation.datasets import read_split
    from llmops.foundation.reading import write_jsonl

    file, row = ROOT / "runs/.tiny/pairs.jsonl", read_split("tiny:data", "train")[0]
    write_jsonl(file, [{"prompt": row["prompt"], "chosen": row["answer"], "rejected": "no idea"}] * 2)
    return str(file)


def tiny_study() -> str:
    "A rating study of training questions that nobody has voted on."
    from llmops.foundation.artifacts import begin_artifact, seal
    from llmops.foundation.datasets import read_split
    from llmops.judging.rating import plan_study, write_study

    out = ROOT / "runs/.tiny/study"
    rows = [
        {**row, "gold": row["answer"], "answers": {"a": row["answer"], "b": "no idea"}}
        for row in read_split("tiny:data", "train")[:2]
    ]
    work = begin_artifact(str(out))
    write_study(plan_study(rows, ["a", "b"], ["ann"], 2, 0, 1.0, "", 42), work)
    seal(work, str(out), "study", "llmops.judging.human", {})
    return str(out)


def tiny_texts() -> str:
    file = ROOT / "runs/.tiny/texts.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('{"id": "a", "text": "A lost card is blocked."}\n{"id": "b", "text": "A new one is sent."}\n')
    return str(file)


STAGES = stage_notebooks(ROOT)
NOBODY = {"judge_url": "http://127.0.0.1:9/v1", "judge_model": "nobody"}  # a judge that does not answer
GIVEN: dict[
    str, dict[str, Any]
] = {  # module -> parameters that are not the notebook's own, so that every path is taken
    "foundation.datasets": {"limit": 60, "tokenizer": "tiny:llama"},
    "retrieval.retrieval": {
        "text_field": "passage",
        "limit": 60,
        "data": "tiny:data",
        "timed_queries": 2,
        "resamples": 100,
    },
    "retrieval.answering": {"questions": 2, "max_new_tokens": 4, "attacked_questions": 1, "resamples": 100},
    "adaptation.finetuning": {"retrieved": tiny_retrieval},
    "adaptation.retraining": {"texts": tiny_texts, "new_rows": 4, "max_steps": 2, "eval_every": 2, "save_every": 2},
    "adaptation.forgetting": {"resamples": 100},
    "adaptation.prompting": {"questions": 2, "samples": 2, "think_tokens": 4, "max_new_tokens": 4, "resamples": 100},
    "selection.selection": {
        "candidates": [{"name": "tiny", "model": "tiny:llama", "licence": "MIT"}],
        "questions": 2,
        "max_new_tokens": 4,
    },
    "adaptation.preferences": {
        "sources": ["samples", "contrastive", "votes", "judge", "file"],
        "study": tiny_study,
        "file": tiny_pairs,
        "rows": 4,
        "draws": 1,
        "max_new_tokens": 2,
        "contrast_rows": 2,
    },
    "adaptation.alignment": {"max_steps": 2, "pairs": 8, "eval_pairs": 4, "sample_prompts": 1, "max_new_tokens": 2},
    "compression.distillation": {"method": "on_policy", "student_share": 1.0, "max_steps": 2},
    "compression.pareto": {"time_prompts": 1, "time_new_tokens": 2, "resamples": 100},
    "adaptation.reward_model": {"max_steps": 2, "resamples": 100},
    "adaptation.policy_gradient": {
        "reward": "length",
        "informative": False,
        "steps": 2,
        "max_new_tokens": 2,
        "eval_questions": 2,
    },
    "evaluation.metrics": {"strategy": tiny_strategies},
    "evaluation.scorecard": {**NOBODY, "ragas": ["exact_match", "faithfulness"]},
    "judging.human": {"grades": 2},
    "decision.gate": {**NOBODY, "cases": tiny_case, "informs": ["size_mb"]},
}


def library(stage: StageNotebook) -> ModuleType:
    return importlib.import_module(f"llmops.{stage.module}")


@contextmanager
def watched(params: type) -> Iterator[set[str]]:
    "The fields that somebody other than `asdict` reads while the block runs."
    names, seen = {f.name for f in dataclasses.fields(params)}, set[str]()

    def read(self: Any, name: str) -> Any:
        if name in names and sys._getframe(1).f_code.co_filename != dataclasses.__file__:
            seen.add(name)
        return object.__getattribute__(self, name)

    params.__getattribute__ = read  # type: ignore[method-assign,assignment]
    try:
        yield seen
    finally:
        del params.__getattribute__


def code_below(stage: StageNotebook) -> list[str]:
    "The code cells from the parameters on, without what is exported."
    cells = json.loads((ROOT / stage.path).read_text())["cells"]
    first = next(i for i, c in enumerate(cells) if "parameters" in c["metadata"].get("tags", []))
    code = ["".join(c["source"]) for c in cells[first:] if c["cell_type"] == "code"]
    return [source for source in code if not source.startswith("#| export")]


def fields_read(source: str) -> set[str]:
    "What a cell reads of `cfg`."
    return {
        n.attr
        for n in ast.walk(ast.parse(source))
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "cfg"
    }


def of_each_stage(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("stage", STAGES, ids=[s.module for s in STAGES])(test)


@of_each_stage
def test_the_cell_has_the_fields_of_the_dataclass(stage: StageNotebook) -> None:
    fields = dataclasses.fields(getattr(library(stage), stage.params))
    assert list(stage.parameters) == [f.name for f in fields]


@of_each_stage
def test_a_stage_is_run_and_sealed_like_every_other(stage: StageNotebook) -> None:
    _, run, *_, seal = code_below(stage)
    lines = [ast.unparse(node) for node in ast.parse(run).body][:2]
    assert lines[0] == f"cfg = from_cell({stage.params}, globals())"
    assert re.fullmatch(rf"with track\('[\w-]+', cfg\) as log:\n    result = {stage.entry}\(cfg, log\)", lines[1]), (
        lines[1]
    )
    sealed = ast.unparse(ast.parse(seal).body[0])
    assert re.match(
        r"manifest = seal\(result\.work, cfg\.out, KIND(\[cfg\.\w+\])?, "
        rf"'llmops\.{re.escape(stage.module)}', cfg, result\.inputs\b",
        sealed,
    ), sealed
    assert hasattr(library(stage), "KIND")


@of_each_stage
def test_every_parameter_is_read(stage: StageNotebook, tmp_path: Path) -> None:
    module = library(stage)
    params = getattr(module, stage.params)
    known = {f.name for f in dataclasses.fields(params)}
    given = {k: v() if callable(v) else v for k, v in GIVEN.get(stage.module, {}).items()}
    with watched(params) as seen:
        getattr(module, stage.entry)(params(**given, out=str(tmp_path / "made")))
    seen |= {"wandb"}  # `track` reads it; tests of tracking hold what it does
    for source in code_below(stage):
        seen |= fields_read(source)
    assert not known - seen, f"{sorted(known - seen)}: nobody reads them"


@pytest.mark.parametrize("profile", ["params", "params/smoke", "params/gpu", "params/classification"])
def test_the_parameter_files_fit(profile: str) -> None:
    notebooks = {s.path: s for s in STAGES}
    for stage in read_stages(ROOT / "dvc.yaml"):
        values: dict[str, Any] = {}
        for file in stage.parameter_files:
            values |= read_params(file.replace("${params}", profile))
        notebook = notebooks[stage.notebook]
        getattr(library(notebook), notebook.params)(**values)


def test_special_parameters_are_of_stages_that_exist() -> None:
    assert set(GIVEN) <= {s.module for s in STAGES}
