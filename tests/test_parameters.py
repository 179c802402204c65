"""Every parameter of every stage is read by the stage's work, not only written into its manifest."""
import ast
import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT


def tiny_retrieval() -> str:
    from llmops.retrieval.retrieval import retrieval_path
    return str(retrieval_path("tiny:retrieval"))


def tiny_case() -> str:
    from llmops.decision.gate import remember
    from llmops.decision.leaderboard import read_evaluation, tiny_evaluations
    made, file = tiny_evaluations() / "qlora", ROOT / "runs/.tiny/cases.jsonl"
    if not file.is_file():
        remember(made, read_evaluation(made).predictions[0]["id"], "a tiny model knows nothing", file)
    return str(file)


STAGES: dict[str, tuple[str, str, str, dict[str, Any]]] = {  # notebook -> module, dataclass, entry point, parameters
    "00_foundation/08_models": ("models", "ModelParams", "import_model", {}),
    "00_foundation/12_datasets": ("datasets", "DataParams", "make_dataset", {"limit": 60, "tokenizer": "tiny:llama"}),
    "03_retrieval/08_retrieval": ("adaptation.retrieval", "RetrievalParams", "retrieve",
                                  {"text_field": "passage", "limit": 60, "data": "tiny:data", "timed_queries": 2, "resamples": 100}),
    "02_adaptation/01_finetuning": ("adaptation.finetuning", "FinetuningParams", "finetune", {"retrieved": tiny_retrieval}),
    "03_retrieval/09_answering": ("adaptation.answering", "AnsweringParams", "answer_all",
                                  {"questions": 2, "max_new_tokens": 4, "attacked_questions": 1, "resamples": 100}),
    "04_evaluation/01_metrics": ("evaluation.metrics", "EvaluationParams", "evaluate", {}),
    "05_judging/07_human": ("evaluation.human", "HumanParams", "make_study", {"grades": 2}),
    "06_decision/03_gate": ("evaluation.gate", "GateParams", "gate", {"cases": tiny_case, "informs": lambda: ["size_mb"], "judge_url": "http://127.0.0.1:9/v1", "judge_model": "nobody"}),
    "06_decision/04_leaderboard": ("evaluation.leaderboard", "LeaderboardParams", "make_leaderboard", {}),
    "03_retrieval/10_bank": ("evaluation.benchmarks", "BenchmarkParams", "make_benchmark", {}),
    "04_evaluation/07_scorecard": ("evaluation.scorecard", "ScorecardParams", "make_scorecard",
                                  {"judge_url": "http://127.0.0.1:9/v1", "judge_model": "nobody", "ragas": ["exact_match", "faithfulness"]}),
    "07_compression/01_merging": ("deployment.merging", "MergingParams", "merge", {}),
    "07_compression/02_quantization": ("deployment.quantization", "QuantizationParams", "quantize", {}),
    "08_deployment/02_serving": ("deployment.serving", "ServingParams", "serve_winner", {}),
}


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


def shown(notebook: Path) -> set[str]:
    "What the cells after the parameters read of `cfg`."
    cells = json.loads(notebook.read_text())["cells"]
    first = next(i for i, c in enumerate(cells) if "parameters" in c["metadata"].get("tags", []))
    code = ["".join(c["source"]) for c in cells[first:] if c["cell_type"] == "code"]
    return {n.attr for source in code for n in ast.walk(ast.parse(source))
            if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "cfg"}


@pytest.mark.parametrize("stage", STAGES)
def test_every_parameter_is_read(stage: str, tmp_path: Path) -> None:
    module, name, entry, given = STAGES[stage]
    library = importlib.import_module(f"llmops.{module}")
    params = getattr(library, name)
    known = {f.name for f in dataclasses.fields(params)}
    given = {k: v() if callable(v) else v for k, v in given.items()}
    with watched(params) as seen:
        getattr(library, entry)(params(**given, out=str(tmp_path / "made")))
    seen |= shown(ROOT / "nbs" / f"{stage}.ipynb") | {"wandb"}  # `track` reads it; tests of tracking hold what it does
    assert not known - seen, f"{sorted(known - seen)}: nobody reads them"
