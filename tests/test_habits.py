"""The habits of the repository: what GitHub, pip, editors and readers expect beside the code is there, true, and runs."""

import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, copy_env, copy_project

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def version() -> str:
    "The version that settings.ini names."
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]["version"]


def workflow(name: str) -> dict[str, Any]:
    "A workflow as a dict; YAML reads its key `on` as True."
    return yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text())


def steps(name: str, job: str) -> list[dict[str, Any]]:
    "The steps of a job that run a script."
    return [step for step in workflow(name)["jobs"][job]["steps"] if "run" in step]


def scripts() -> list[str]:
    "Every script of every workflow."
    return [s["run"] for f in WORKFLOWS for j in workflow(f.stem)["jobs"].values() for s in j["steps"] if "run" in s]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda f: f.stem)
def test_a_workflow_is_well_formed(file: Path) -> None:
    made = workflow(file.stem)
    assert {"name", True, "permissions", "jobs"} <= made.keys()
    for job in made["jobs"].values():
        assert job["runs-on"] == "ubuntu-latest"
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step["uses"]), step["uses"]


@pytest.mark.parametrize("script", scripts(), ids=range(len(scripts())))
def test_a_script_can_be_read_by_bash_and_takes_no_text_of_others(script: str) -> None:
    "What GitHub puts in for an expression would be run as code; scripts read variables of the environment."
    assert "${{" not in script
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_scripts_call_is_there() -> None:
    text = "\n".join([*scripts(), (ROOT / "Dockerfile").read_text(), (ROOT / ".pre-commit-config.yaml").read_text()])
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?<=[ \"])make ([a-z]+)", text)) <= targets
    for module in re.findall(r"python3? -m (llmops[\w.]*)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for file in re.findall(r"(?:bash|python) ([\w./]+/[\w.]+)", text):
        assert (ROOT / file).is_file(), file


def run_step(step: dict[str, Any], project: Path, **env: str) -> subprocess.CompletedProcess[str]:
    "Run a step as GitHub does."
    bash = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    return subprocess.run(bash, cwd=project, env={**copy_env(project), **env}, capture_output=True, text=True)


def test_a_release_takes_its_notes_from_the_changelog(tmp_path: Path) -> None:
    for file in ("settings.ini", "CHANGELOG.md"):
        shutil.copy(ROOT / file, tmp_path)
    notes = steps("release", "build")[0]
    done = run_step(notes, tmp_path, GITHUB_REF_NAME=f"v{version()}")
    assert done.returncode == 0, done.stderr + done.stdout
    said = (tmp_path / "notes.md").read_text()
    assert "### Added" in said and "## [" not in said and "[Unreleased]:" not in said
    wrong = run_step(notes, tmp_path, GITHUB_REF_NAME="v9.9.9")
    assert wrong.returncode == 1 and "settings.ini has another version than the tag v9.9.9" in wrong.stdout


def git(folder: Path, *words: str) -> str:
    "What git printed."
    name = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return subprocess.run(["git", *name, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


PIPELINE = """
vars: [params/profile.yaml]
stages:
  base:
    cmd: >-
      papermill --engine llmops nbs/00_foundation/31_models.ipynb runs/base/notebook.ipynb
      -f params/base.yaml -f ${params}/base.yaml -p out runs/base
    deps: [params/base.yaml, "${params}/base.yaml"]
    outs: [runs/base]
  gate:
    cmd:
      - papermill --engine llmops nbs/06_decision/07_gate.ipynb runs/gate/notebook.ipynb -f params/own.yaml -p out runs/gate
      - mkdir -p metrics
      - cp runs/gate/headline.json metrics/gate.json
    deps: [params/own.yaml, runs/base/digest.txt]
    outs: [runs/gate]
    metrics: [{metrics/gate.json: {cache: false}}]
"""
OWN = {"margins": {"f1": 1.0, "size_mb": 0.1}, "resamples": 199, "wandb": "disabled", "history": ""}


@pytest.fixture(scope="module")
def pull_request(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A checkout of a tiny project's branch, as a runner has it: the base was run before, and the branch changes the gate."
    project = copy_project(tmp_path_factory.mktemp("request"))
    (project / "dvc.yaml").write_text(PIPELINE)
    (project / "dvc.lock").unlink(missing_ok=True)
    shutil.rmtree(project / "metrics", ignore_errors=True)
    (project / "params/own.yaml").write_text(json.dumps(OWN))
    profile = project / "params/profile.yaml"
    profile.write_text(profile.read_text().replace("params: params", "params: params/smoke", 1))
    done = subprocess.run(["dvc", "repro", "gate"], cwd=project, env=copy_env(project), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    git(project, "branch", "-M", "main")
    git(project, "add", "-A")
    git(project, "commit", "-q", "-m", "the base, run")
    git(project, "update-ref", "refs/remotes/origin/main", "HEAD")
    git(project, "checkout", "-q", "-b", "change")
    (project / "params/own.yaml").write_text(
        json.dumps(OWN | {"candidate": "tiny:base", "margins": {"f1": 1.0}, "min_rows": 500})
    )
    git(project, "commit", "-q", "-am", "another candidate")
    (project / ".venv").mkdir()
    (project / ".venv/bin").symlink_to(Path(sys.executable).parent)
    for mark in (".installed", ".ready"):  # as `make setup` leaves them
        (project / ".venv" / mark).touch()
    return project


def test_the_gate_of_a_pull_request_runs_and_comments(pull_request: Path, tmp_path: Path) -> None:
    "Every script of the workflow, in its order, with a `gh` that keeps what it is given."
    (tmp_path / "bin").mkdir()
    gh = tmp_path / "bin/gh"
    gh.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/arguments\ncp comment.md {tmp_path}/comment\n')
    gh.chmod(0o755)
    env = {str(k): str(v) for k, v in workflow("gate")["env"].items()} | {
        "BASE": "main",
        "NUMBER": "7",
        "GITHUB_REPOSITORY": "owner/name",
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    setup, stages, write, comment, stop = steps("gate", "gate")
    for step in (setup, stages, write, comment):
        done = run_step(step, pull_request, **env)
        assert done.returncode == 0, f"{step['name']}: {done.stdout}{done.stderr}"
        if step is stages:
            assert "'base' didn't change, skipping" in done.stdout and "Running stage 'gate'" in done.stdout
    said = (tmp_path / "comment").read_text()
    assert said.startswith("## Gate: HOLD\n\nDo not ship yet: F1 is not known: "), said
    assert "**Next:** Keep qlora in service for now" in said and "\n- Decided: " in said
    assert re.search(r"\| *metrics/gate.json *\| *size_mb", said), "what changed in the metrics is a table"
    assert (tmp_path / "summary.md").read_text() == said
    assert (tmp_path / "arguments").read_text().split()[:3] == ["pr", "comment", "7"]
    stopped = run_step(stop, pull_request, **env)
    assert stopped.returncode == 3 and stopped.stdout.startswith("HOLD")


def test_the_changelog_has_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    releases = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.M)
    assert releases[0] == ("Unreleased", "") and all(date for _, date in releases[1:])
    assert version() in dict(releases)
    kinds = set(re.findall(r"^### (.+)$", text, re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for name, _ in releases:
        assert re.search(rf"^\[{re.escape(name)}\]: https://", text, re.M), f"{name} leads nowhere"


def test_the_citation_file_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert (cited["version"], cited["license"]) == (version(), "Apache-2.0")


def test_the_containers_copy_what_is_there_and_set_up_as_everybody_does() -> None:
    text = (ROOT / "Dockerfile").read_text()
    for line in re.findall(r"^COPY --chown=llmops (.+)$", text, re.M):
        assert all((ROOT / source).exists() for source in line.split()[:-1]), line
    read = re.search(r"^\$\(VENV\)/\.installed: (.+)$", (ROOT / "Makefile").read_text(), re.M)
    before = text.partition("RUN make setup")[0]
    assert read and all(f.partition("/")[0] in before for f in read[1].split()), "set-up reads a file that comes later"
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    assert container["postCreateCommand"] == "make setup"
    assert "python:3.11" in container["image"] and "python:3.11" in text


def test_the_hooks_are_commands_of_the_environment() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    for hook in hooks:
        command = hook["entry"].split()[0]
        assert command.startswith(".venv/bin/") and (Path(sys.executable).parent / Path(command).name).exists(), command
        re.compile(hook["files"])


@pytest.mark.parametrize("page", ["SECURITY.md", "CHANGELOG.md", "README.ko.md"])
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", (ROOT / page).read_text())
    assert not [link for link in links if "://" not in link and not (ROOT / link).exists()]


def commands(page: str) -> list[str]:
    "The commands and code of a page, in their order."
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    lines = [re.sub(r" *#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S))
    return [line for line in lines if line] + sorted(set(inline))


def test_the_korean_readme_has_the_same_commands_and_links() -> None:
    assert commands("README.ko.md") == commands("README.md")
    english, korean = (
        re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()) for page in ("README.md", "README.ko.md")
    )
    assert set(english) <= set(korean)
    numbers = [set(re.findall(r"\d+\.\d+", (ROOT / page).read_text())) for page in ("README.md", "README.ko.md")]
    assert numbers[0] == numbers[1], "figures differ"
