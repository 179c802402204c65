"""The gate as its users meet it: from a script, from a page, and when somebody compares what cannot be compared."""
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from llmops.evaluation.gate import VOLATILE_FILES, GateParams, gate
from llmops.evaluation.leaderboard import tiny_evaluations
from llmops.evaluation.metrics import EvaluationError


def changed(name: str, to: Path, rewrite: Any) -> Path:
    "A copy of a tiny evaluation with other contents, sealed anew as far as its sizes go."
    folder = Path(shutil.copytree(tiny_evaluations() / name, to))
    manifest = json.loads((folder / "manifest.json").read_text())
    rewrite(folder)
    for file in manifest["files"]:
        manifest["files"][file]["bytes"] = (folder / file).stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def settings(folder: Path, **values: Any) -> None:
    scores = json.loads((folder / "scores.json").read_text())
    scores["protocol"] |= values
    (folder / "scores.json").write_text(json.dumps(scores))


def predictions(folder: Path, change: Any) -> None:
    rows = [change(json.loads(line)) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def params(tmp: Path, **values: Any) -> GateParams:
    return GateParams(**{"out": str(tmp / "gate"), "history": "", "wandb": "disabled", "resamples": 199, **values})


@pytest.mark.parametrize("values, word", [({"max_new_tokens": 99}, "max_new_tokens"), ({"rows_digest": "other"}, "rows_digest"),
                                          ({"decoding": "sampled"}, "decoding")])
def test_what_cannot_be_compared_is_refused(tmp_path: Path, values: dict[str, Any], word: str) -> None:
    other = changed("qlora", tmp_path / "other", lambda f: settings(f, **values))
    with pytest.raises(EvaluationError, match=word):
        gate(params(tmp_path, current=str(other)))
    assert not (tmp_path / "gate").exists()


def test_a_missing_score_is_no_zero(tmp_path: Path) -> None:
    other = changed("qlora", tmp_path / "other", lambda f: predictions(f, lambda r: r | {"f1": float("nan")}))
    with pytest.raises(EvaluationError, match="f1: .* missing or not finite"):
        gate(params(tmp_path, current=str(other)))


def test_a_figure_that_was_not_measured_holds(tmp_path: Path) -> None:
    other = changed("qlora", tmp_path / "other", lambda f: (f / "metrics.json").write_text("{}"))
    found = gate(params(tmp_path, candidate=str(other), margins={"decode_tokens_per_second": 0.1}))
    assert (found.verdict, found.checks[0].outcome) == ("hold", "missing")


def test_every_verdict_has_its_exit_code(tmp_path: Path) -> None:
    def right(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"f1": 1.0, "exact_match": True, "prediction": row["gold"]}

    better = changed("qlora", tmp_path / "better", lambda f: predictions(f, right))
    notebook = ROOT / "nbs/3_evaluation/32_gate.ipynb"
    said = {}
    for name, (candidate, current, least) in {"ship": (better, better, 5), "reject": ("tiny:qlora", better, 5), "hold": (better, better, 500)}.items():
        out = tmp_path / name
        subprocess.run([sys.executable, "-m", "papermill", "--engine", "llmops", str(notebook), str(tmp_path / f"{name}.ipynb"), "-p", "candidate", str(candidate),
                        "-p", "current", str(current), "-p", "out", str(out), "-p", "history", str(tmp_path / "history.jsonl"), "-p", "wandb", "disabled",
                        "-p", "least", str(least), "-y", "margins: {f1: 0.05, exact_match: 0.05}"], check=True, cwd=ROOT, capture_output=True)
        done = subprocess.run([sys.executable, "-m", "llmops.evaluation.gate", str(out)], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.stdout.startswith(name.upper()), done.stdout + done.stderr
        said[name] = done.returncode
        assert f"<h1 class={name}>" in (out / "report.html").read_text()
    assert said == {"ship": 0, "hold": 3, "reject": 4}
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 3
    nowhere = subprocess.run([sys.executable, "-m", "llmops.evaluation.gate", str(tmp_path / "nowhere")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert nowhere.returncode == 1 and "not an artifact" in nowhere.stderr and "Traceback" not in nowhere.stderr


def test_the_same_gate_has_the_same_digest(tmp_path: Path) -> None:
    from llmops.artifacts import seal
    digests = []
    for n in range(2):
        made = gate(params(tmp_path, out=str(tmp_path / str(n))))
        digests.append(seal(made.work, tmp_path / str(n), "gate", "llmops.evaluation.gate", {}, made.inputs, volatile=VOLATILE_FILES)["digest"])
    assert digests[0] == digests[1]
