"The recipe of CONTRIBUTING.md, followed word for word and to its end in a copy of the project."

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import copy_env

NOTEBOOK = "nbs/04_evaluation/20_lengths.ipynb"


def run(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=project, env=copy_env(project), capture_output=True, text=True)


def must(result: subprocess.CompletedProcess[str]) -> str:
    "What a command printed; it has to succeed."
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def blocks(project: Path) -> list[tuple[str, str]]:
    "Language and text of the recipe's code, in order."
    recipe = (project / "CONTRIBUTING.md").read_text().partition("## Add a stage")[2]
    return re.findall(r"```(\w+)\n(.*?)```", recipe, re.S)


@pytest.fixture(scope="module")
def followed(project: Path, blocks: list[tuple[str, str]]) -> Path:
    "A copy of the project in which the recipe was followed."
    assert [language for language, _ in blocks] == ["python", "sh", "yaml", "yaml", "sh"]
    script, first, parameters, entry, last = (text for _, text in blocks)
    must(run(project, sys.executable, "-c", script))
    must(run(project, "bash", "-euc", first))
    manifest = json.loads((project / "runs/lengths/manifest.json").read_text())
    assert manifest["params"] == {"data": "tiny:data", "seed": 42, "out": "runs/lengths", "wandb": "disabled"}
    file, _, text = parameters.partition("\n")
    (project / file.removeprefix("# ")).write_text(text)
    file, _, text = entry.partition("\n")
    pipeline = project / file.removeprefix("# ")
    pipeline.write_text(pipeline.read_text() + text)
    must(run(project, "bash", "-euc", last))
    return project


def test_the_stage_ran_in_the_pipeline(followed: Path) -> None:
    manifest = json.loads((followed / "runs/lengths/manifest.json").read_text())
    assert manifest["kind"] == "lengths" and set(manifest["files"]) == {"lengths.json"}
    assert manifest["params"] == {"data": "runs/data", "seed": 42, "out": "runs/lengths", "wandb": "offline"}
    assert set(manifest["inputs"]) == {"data"}
    counts = json.loads((followed / "runs/lengths/lengths.json").read_text())
    assert counts and all(n > 0 for n in counts)
    assert (followed / "runs/lengths/notebook.ipynb").is_file() and (
        followed / "llmops/evaluation/lengths.py"
    ).is_file()
    made = {p.parent.name for p in (followed / "runs").glob("*/manifest.json")}
    assert made == {"data", "lengths"}, "only the stage and what it needs"
    assert "'lengths' didn't change, skipping" in must(run(followed, "dvc", "repro", "lengths"))


def test_commands_wrote_what_follows_from_the_stage(followed: Path) -> None:
    entry = (followed / "dvc.yaml").read_text().partition("\n  lengths:\n")[2]
    assert re.findall(r"- (\S+)", entry) == [
        "llmops/foundation",
        "llmops/evaluation/lengths.py",
        "runs/data/digest.txt",
        "params/lengths.yaml:",
        "runs/lengths",
    ]
    assert must(run(followed, sys.executable, "-m", "llmops.tools.pipeline", "deps", "--check"))
    link = f"[Answer lengths]({NOTEBOOK.removeprefix('nbs/')})"
    assert link in (followed / "nbs/index.ipynb").read_text()
    assert "Answer lengths" in (followed / "_docs/index.html").read_text()


def test_only_three_files_are_written_by_hand(followed: Path) -> None:
    "Everything else that changed was written by the commands of the recipe."
    changed = {line[3:] for line in must(run(followed, "git", "status", "--porcelain", "-uall")).splitlines()}
    by_hand = {NOTEBOOK, "params/lengths.yaml", "dvc.yaml"}
    by_command = {
        "llmops/evaluation/lengths.py",
        "llmops/_modidx.py",
        "dvc.lock",
        "nbs/index.ipynb",
        "params/profile.yaml",
    }
    assert by_hand <= changed <= by_hand | by_command


def test_the_new_stage_is_held_to_the_rules(followed: Path) -> None:
    rules = ("tests/test_parameters.py", "-k", "evaluation.lengths")
    assert "3 passed" in must(run(followed, sys.executable, "-m", "pytest", "-q", *rules))


def test_a_mistyped_parameter_is_refused(followed: Path) -> None:
    result = run(followed, "papermill", "--engine", "llmops", NOTEBOOK, "runs/wrong/notebook.ipynb", "-p", "dta", "x")
    assert result.returncode != 0 and "dta" in result.stderr
