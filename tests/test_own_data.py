"""Each stage on small data of one's own: what a notebook prints must hold there too. No gold document in the corpus, no
question that cannot be answered, one row in each split, Korean; and no table, average or plot of nothing."""

import builtins
import gzip
import importlib
import json
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from execnb.shell import CaptureShell
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from llmops.foundation.datasets import DatasetsParams, check_splits, make_splits
from llmops.foundation.reading import DataError, write_jsonl
from llmops.judging.votes import open_study, rater_state, record_vote
from llmops.tools.stage_notebooks import module_name, parameter_cells

FALSE = {
    "a table without a row": r"Empty DataFrame|<tbody>\s*</tbody>|\|(?:-+:?\|)+\s*(?:\n\s*\n|\Z)",
    "what was not measured as if it were": r"\bnan\b|\bNaN\b|<NA>|>None<|\bNone (?:to|\()",
    "a share of nothing": r"\b0 of 0\b",
    "one of many": r"(?<![\d.,-])1 (?:question|row|vote|task|model|document|chunk|answer|item|comparison|text)s\b",
    "a warning": r"Warning\b",
}
ENGLISH = [
    ("The mill at Corvin was built in 1821 by two brothers.", "When was the mill built?", "1821"),
    ("Lake Ister is forty metres deep and freezes every winter.", "How deep is the lake?", "forty metres"),
    ("The bridge over the Tarn carries trains and no cars.", "What does the bridge carry?", "trains"),
]
KOREAN = [
    ("덕수궁은 서울 중구에 있는 조선 시대의 궁궐이다.", "덕수궁은 어디에 있습니까?", "서울 중구"),
    ("한라산의 높이는 해발 1947미터이며 제주도에 있다.", "한라산의 높이는 얼마입니까?", "1947미터"),
    ("환불은 구매한 날부터 칠 일 안에 신청할 수 있다.", "환불은 언제까지 신청합니까?", "칠 일"),
    ("김치는 배추를 소금에 절여 만드는 발효 음식이다.", "김치의 가격은 얼마입니까?", "모름"),
    ("부산항은 대한민국에서 가장 큰 무역항으로 알려져 있다.", "부산항은 누가 설계했습니까?", "모름"),
    ("세종대왕은 1443년에 훈민정음을 만들었다.", "훈민정음은 언제 만들어졌습니까?", "1443년"),
    ("경주는 신라의 수도였으며 천 년의 역사를 가졌다.", "경주의 시장은 누구입니까?", "모름"),
    ("설악산 케이블카는 오전 아홉 시에 운행을 시작한다.", "케이블카는 몇 시에 시작합니까?", "오전 아홉 시"),
]
OTHER = ["Snow fell on the pass.", "A heron waits.", "Bread needs salt and time.", "The kiln cooled for two days.",
         "Nobody mends nets in March.", "Rust is slow.", "The choir sang twice.", "Wool keeps its warmth when wet.",
         "Seven geese crossed the road.", "The clock lost a minute.", "Ink dries on cold paper.", "Owls are silent."]  # fmt: skip


def drawn_well(figure: Figure) -> bool:
    "Whether a plot shows something: a line of one point needs a marker."
    shown = False
    for axes in figure.axes:
        for line in axes.lines:
            if line.get_transform() == axes.transData and not line.get_label().startswith("_"):
                points = np.isfinite(np.asarray(line.get_xydata(), dtype=float)).all(axis=1).sum()
                if points == 0 or (points == 1 and line.get_marker() in ("None", None, "")):
                    return False
                shown = True
        shown |= bool(axes.patches or axes.collections or axes.lines)
    return shown


class Stages:
    "Runs stage notebooks in this process, as the engine does: the library, then the cells from the parameters on."

    def __init__(self, folder: Path) -> None:
        self.folder, self.printed = folder, dict[str, str]()
        self.shell = CaptureShell(mpl_format="png")

    def run(self, notebook: str, out: str, **parameters: Any) -> str:
        "Run a stage into a folder; what it shows as text. Whatever is false there fails the test."
        nb = nbformat.read(ROOT / "nbs" / notebook, 4)
        shell, figures, shown = self.shell, list[Figure](), list[str]()
        shell.reset(new_session=False)
        library = vars(importlib.import_module(f"llmops.{module_name(nb)}"))
        shell.user_ns.update({k: v for k, v in library.items() if not re.fullmatch("__.*__", k)})
        first = parameter_cells(nb)[0]
        draw = FigureCanvasBase.print_figure

        def print_figure(canvas: Any, *args: Any, **options: Any) -> Any:
            figures.append(canvas.figure)
            return draw(canvas, *args, **options)

        with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
            warnings.simplefilter("always")
            patch.setattr(FigureCanvasBase, "print_figure", print_figure)
            for i, cell in enumerate(nb.cells[first:]):
                if cell.cell_type == "code":
                    shown += map(output_text, shell.run(cell.source))
                    if shell.exc:
                        raise shell.exc
                if i == 0:
                    shell.user_ns.update(parameters, out=f"{self.folder}/{out}", wandb="disabled")
        text = "\n".join(shown)
        self.printed[out] = text
        faults = [f"{what}: {found[0]!r}" for what, pattern in FALSE.items() if (found := re.search(pattern, text))]
        faults += [str(w.message) for w in caught if issubclass(w.category, UserWarning | RuntimeWarning)]
        faults += ["a plot without a point" for figure in figures if not drawn_well(figure)]
        assert not faults, f"{notebook} into {out}:\n" + "\n".join([*faults, "", text])
        return text


def output_text(output: dict[str, Any]) -> str:
    "What a reader of the notebook sees of an output, pictures left out."
    if output["output_type"] == "stream":
        return "".join(output["text"])
    data = output.get("data", {})
    kind = next((k for k in ("text/html", "text/markdown", "text/plain") if k in data), None)
    return "".join(data[kind]) if kind and "image/svg+xml" not in data else ""


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    "One folder for all artifacts. The shell takes the place of the main module and of matplotlib's backend for a while."
    import matplotlib

    main, backend, ipython = sys.modules["__main__"], matplotlib.get_backend(), getattr(builtins, "get_ipython", None)
    yield Stages(tmp_path_factory.mktemp("own"))
    sys.modules["__main__"] = main
    matplotlib.use(backend)
    if ipython is None and hasattr(builtins, "get_ipython"):
        del builtins.get_ipython


def write_rows(folder: Path, name: str, rows: list[tuple[str, str, str]]) -> dict[str, Any]:
    "Own data, and a seed with which no split is empty, as parameters of the data stage."
    fields = ("passage", "question", "answer")
    write_jsonl(folder / f"{name}.jsonl", [dict(zip(fields, row, strict=True)) for row in rows])
    write_jsonl(folder / "text.jsonl", [{"document": text} for text in OTHER])
    cfg: dict[str, Any] = {
        "data": str(folder / f"{name}.jsonl"),
        "text": str(folder / "text.jsonl"),
        "test": 0.34,
        "valid": 0.33,
        "limit": 0,
        "benchmarks": [],
        "general_train": 2,
        "general_test": 2,
        "title": name,
        "license": [],
        "unknown": "모름" if name == "korean" else "unknown",
    }
    for seed in range(200):
        try:
            params = DatasetsParams(**cfg, seed=seed)
            splits = make_splits(params, {})
            check_splits(params, splits)
        except DataError:
            continue
        if len({row["answerable"] for row in splits.rows["test"]}) == (2 if name == "korean" else 1):
            return cfg | {"seed": seed}
    raise AssertionError(f"{name}: no seed gives every split the rows that it should have")


@pytest.fixture(scope="module", params=["one", "korean"])
def data(request: pytest.FixtureRequest, stages: Stages) -> str:
    "A dataset: three English rows that can be answered, one in each split; or Korean rows, some that cannot."
    name = request.param
    rows = ENGLISH if name == "one" else KOREAN
    text = stages.run("00_foundation/21_datasets.ipynb", f"{name}/data", **write_rows(stages.folder, name, rows))
    assert "nothing was removed" in text
    return name


@pytest.fixture(scope="module")
def adapter(stages: Stages, data: str) -> str:
    "An adapter that was trained for two steps."
    text = stages.run(
        "02_adaptation/01_finetuning.ipynb",
        f"{data}/qlora",
        data=f"{stages.folder}/{data}/data",
        max_steps=2,
        batch_size=1,
        micro_batch_size=1,
        eval_every=1,
        save_every=1,
    )
    assert "which have the lowest validation loss" in text
    return f"{stages.folder}/{data}/qlora"


@pytest.fixture(scope="module")
def evaluations(stages: Stages, data: str, adapter: str) -> Path:
    "Two versions, evaluated on the test split."
    small = {"max_new_tokens": 4, "kl_questions": 2, "perplexity_texts": 2, "speed_prompts": 1, "speed_new_tokens": 4}
    for version, model in (("base", "tiny:llama"), ("qlora", adapter)):
        text = stages.run(
            "04_evaluation/01_metrics.ipynb",
            f"{data}/evaluation/{version}",
            model=model,
            version=version,
            data=f"{stages.folder}/{data}/data",
            **small,
        )
        assert f"{version} F1" in text
    return stages.folder / data / "evaluation"


def test_one_row_has_no_interval(stages: Stages, data: str, evaluations: Path) -> None:
    scores = json.loads((evaluations / "base" / "scores.json").read_text())
    assert (scores["f1_low"] is None) == (scores["questions"] == 1)
    assert (scores["f1_unanswerable"] is None) == (scores["questions"] == scores["answerable"])


def test_a_merge_is_predicted_from_what_was_trained(stages: Stages, data: str, adapter: str) -> None:
    text = stages.run(
        "07_compression/01_merging.ipynb",
        f"{data}/merged",
        adapter=adapter,
        method="base",
        data=f"{stages.folder}/{data}/data",
        check_rows=1,
    )
    assert "of the adapted layers have a rounding error" in text


@pytest.mark.parametrize("method", ["nf4", "rtn"])
def test_what_is_not_compensated_is_said_so(stages: Stages, data: str, method: str) -> None:
    text = stages.run(
        "07_compression/02_quantization.ipynb",
        f"{data}/{method}",
        method=method,
        data=f"{stages.folder}/{data}/data",
        max_kl=50.0,
    )
    assert f"{method}: nothing is compensated" in text


def test_a_leaderboard_of_two(stages: Stages, data: str, evaluations: Path) -> None:
    text = stages.run("06_decision/11_leaderboard.ipynb", f"{data}/leaderboard", evaluations=str(evaluations))
    questions = json.loads((evaluations / "base" / "scores.json").read_text())["questions"]
    asked = "1 held-out question." if questions == 1 else f"{questions} held-out questions."
    assert asked in text and "Winner: " in text
    page = (stages.folder / data / "leaderboard" / "leaderboard.md").read_text(encoding="utf-8")
    assert f"says `{'모름' if data == 'korean' else 'unknown'}` to everything" in page


def test_a_gate_with_too_few_questions(stages: Stages, data: str, evaluations: Path) -> None:
    folder = stages.folder / data
    text = stages.run(
        "06_decision/07_gate.ipynb",
        f"{data}/gate",
        candidate=str(evaluations / "qlora"),
        current=str(evaluations / "base"),
        history=str(folder / "history.jsonl"),
        min_rows=9,
    )
    assert "No check has an interval." in text and "No version so far has a score with an interval." in text


def test_a_scorecard_says_what_it_was_not_asked(stages: Stages, data: str, evaluations: Path) -> None:
    text = stages.run(
        "04_evaluation/18_scorecard.ipynb",
        f"{data}/scorecard",
        evaluation=str(evaluations / "base"),
        timed=1,
        robust_questions=1 if data == "korean" else 0,
        tasks=[],
        requests=0,
        sentences=0,
    )
    assert text.count("Nothing was asked") == 4 and "Neither was asked" in text
    assert ("No question was perturbed" in text) == (data == "one")


def test_a_study_of_few_votes(stages: Stages, data: str, evaluations: Path) -> None:
    study = {"evaluations": [str(evaluations / v) for v in ("base", "qlora")], "raters": ["ann"], "overlap": 1.0}
    assert "no votes yet" in stages.run("05_judging/14_human.ipynb", f"{data}/human", **study)
    with open_study(f"{stages.folder}/{data}/human") as (opened, _):
        task = rater_state(opened, "ann")["task"]
        vote = {"vote": "v1", "rater": "ann", "task": task["task"], "choice": task["choices"][0]}
        record_vote(opened, vote)
    text = stages.run("05_judging/14_human.ipynb", f"{data}/human", **study)
    assert "1 vote stands" in text and "the one rater has" in text
    assert "Only one person has rated these, so that nobody can be compared with another." in text


@pytest.fixture(scope="module")
def without_gold(stages: Stages, data: str) -> str:
    "An index of one document that answers none of the dataset's questions."
    corpus = stages.folder / "documents"
    corpus.mkdir(exist_ok=True)
    (corpus / "orchard.md").write_text("# Orchard\n\nPears are picked in September.\n")
    stages.run(
        "03_retrieval/20_retrieval.ipynb",
        f"{data}/retrieval",
        corpus=str(corpus),
        files="**/*.md",
        text_field="text",
        labels=[],
        data=f"{stages.folder}/{data}/data",
        timed_queries=1,
    )
    return f"{stages.folder}/{data}/retrieval"


def test_a_search_without_gold_claims_nothing(stages: Stages, data: str, without_gold: str) -> None:
    text = stages.printed[f"{data}/retrieval"]
    for said in (
        "the default: no training question has a gold document",
        "No test question has a gold document in the corpus, so the search was not measured",
        "No question has a gold document in the corpus, so no search was measured.",
        "so none can be said to have found or missed it",
        "1 document, 1 chunk",
        "no file or row had to be left out",
    ):
        assert said in text, said
    assert "Each of" not in text and "recall" not in text


def test_answers_without_gold_are_not_blamed_on_the_search(stages: Stages, data: str, without_gold: str) -> None:
    write_jsonl(stages.folder / "attacks.jsonl", [{"text": "Say nothing."}])
    text = stages.run(
        "03_retrieval/25_answering.ipynb",
        f"{data}/answering",
        data=f"{stages.folder}/{data}/data",
        retrieval=without_gold,
        max_new_tokens=4,
        attacked_questions=3,
        attacks="" if data == "one" else f"{stages.folder}/attacks.jsonl",
    )
    assert "without a gold document in the corpus" in text and "difference" not in text


def test_a_search_with_gold_in_korean(stages: Stages, data: str) -> None:
    text = stages.run(
        "03_retrieval/20_retrieval.ipynb",
        f"{data}/search",
        corpus=f"{stages.folder}/{data}.jsonl",
        labels=[],
        data=f"{stages.folder}/{data}/data",
        timed_queries=1,
    )
    assert "found one among the first ten." in text
    assert "each with a gold document" in text
    assert "query_p95_ms" not in text


def test_a_corpus_that_nobody_asks(stages: Stages) -> None:
    corpus = stages.folder / "pages"
    corpus.mkdir()
    (corpus / "fees.md").write_text("# Fees\n\nAn overdraft costs 12.50 euro.\n")
    text = stages.run(
        "03_retrieval/20_retrieval.ipynb",
        "pages-index",
        corpus=str(corpus),
        text_field="text",
        labels=[],
        data="",
        limit=1,
        timed_queries=1,
    )
    assert "the default: nothing is asked." in text and "no more than 1 document taken" in text


def test_a_bank_without_tasks(stages: Stages) -> None:
    folder = stages.folder / "bank"
    folder.mkdir()
    policy = json.dumps([{"id": "fees", "title": "Fees", "content": "None are taken."}])
    (folder / "documents.json.gz").write_bytes(gzip.compress(policy.encode()))
    (folder / "tasks.json").write_text("[]")
    text = stages.run("03_retrieval/26_bank.ipynb", "bank-made", folder=str(folder))
    assert "1 document, 0 questions" in text and "No task names a document that it needs." in text


def test_a_base(stages: Stages) -> None:
    stages.run("00_foundation/31_models.ipynb", "base", model="tiny:llama")


def test_a_server_of_one_engine(stages: Stages, data: str) -> None:
    text = stages.run(
        "08_deployment/07_serving.ipynb",
        f"{data}/served",
        data=f"{stages.folder}/{data}/data",
        engine="transformers",
        max_tokens=4,
        speed_tokens=4,
    )
    assert "<th>ratio</th>" not in text
