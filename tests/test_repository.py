"Rules that hold for every file of the project."

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from conftest import ROOT, copy_env, copy_project, limit
from dvc.repo import Repo

from llmops.foundation.project import read_params
from llmops.tools.pipeline import (
    StageNotebook,
    check_deps,
    numbered_notebooks,
    options_given,
    pipeline_files,
    read_stages,
    stage_notebooks,
)

NOTEBOOKS = numbered_notebooks(ROOT)
STAGES = stage_notebooks(ROOT)
PROFILES = sorted(p.parent for p in (ROOT / "params").glob("*/base.yaml"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def files() -> list[Path]:
    "Files that are committed or would be."
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [ROOT / n for n in sorted(set(listed.split("\0"))) if n and (ROOT / n).is_file()]


def code_cells(notebook: Path) -> list[tuple[str, list[str]]]:
    "Source and tags of every code cell."
    cells = json.loads(notebook.read_text())["cells"]
    return [("".join(c["source"]), c["metadata"].get("tags", [])) for c in cells if c["cell_type"] == "code"]


@pytest.fixture(scope="module")
def pipeline() -> dict[str, tuple[list[str], list[str]]]:
    "Every stage of `dvc.yaml`: the words of its papermill call, and its dependencies."
    with Repo(str(ROOT)) as repo:
        stages = {
            s.addressing: (s.cmd if isinstance(s.cmd, str) else " ".join(s.cmd), [str(d.def_path) for d in s.deps])
            for s in repo.index.stages
        }
    return {stage: (shlex.split(cmd), deps) for stage, (cmd, deps) in stages.items()}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_a_notebook_has_at_most_one_parameters_cell(notebook: Path) -> None:
    tagged = [source for source, tags in code_cells(notebook) if "parameters" in tags]
    assert len(tagged) <= 1
    for source in tagged:
        for node in ast.parse(source).body:
            assert isinstance(node, ast.AnnAssign), (
                f"papermill reads `name: type = value  # help` only: {ast.unparse(node)}"
            )
            assert "#" in source.splitlines()[node.lineno - 1], f"{ast.unparse(node)}: say what it means in a comment"


@pytest.mark.parametrize("stage", STAGES, ids=[s.module for s in STAGES])
def test_a_stage_says_where_it_writes_and_what_it_draws(stage: StageNotebook) -> None:
    assert {"seed", "out", "wandb"} <= set(stage.parameters)


def test_stages_run_known_notebooks_with_known_parameters(pipeline: dict[str, tuple[list[str], list[str]]]) -> None:
    notebooks = {s.path: s for s in STAGES}
    used = set()
    for stage, (words, deps) in pipeline.items():
        notebook = next(w for w in words if w.endswith(".ipynb"))
        used.add(notebook)
        given = options_given(words, "-p", "-r", "--parameters", "--parameters_raw")
        for file in options_given(words, "-f", "--parameters_file"):
            assert file in deps, f"{stage}: {file} is not among its deps"
            given += read_params(file)
        unknown = set(given) - set(notebooks[notebook].parameters)
        assert not unknown, f"{stage}: {sorted(unknown)} not in the parameters of {notebook}"
    assert len(used) >= 6


def test_a_profile_holds_only_what_differs() -> None:
    stages = [s for file in pipeline_files(ROOT) for s in read_stages(file)]
    notebooks = {s.path: s for s in STAGES}
    for profile in PROFILES:
        for stage in stages:
            values: dict[str, object] = {}
            for file in stage.parameter_files:
                laid_over = read_params(file.replace("${params}", f"params/{profile.name}"))
                assert not laid_over.keys() - set(notebooks[stage.notebook].parameters), (
                    f"{stage.name}, {file}: unknown parameters"
                )
                if file.startswith("${params}"):
                    same = [k for k, v in laid_over.items() if k in values and values[k] == v]
                    assert not same, f"{name(profile)}/{Path(file).name}: {same} are as in params/"
                    assert laid_over.keys() <= values.keys(), (
                        f"{name(profile)}/{Path(file).name}: declare it in params/ first"
                    )
                values |= laid_over


def test_stages_depend_on_what_they_import(pipeline: dict[str, tuple[list[str], list[str]]]) -> None:
    assert [line for file in pipeline_files(ROOT) for line in check_deps(ROOT, file)] == []
    for stage, (_, deps) in pipeline.items():
        assert not [d for d in deps if d.startswith("nbs/")], (
            f"dvc.yaml, {stage}: depend on the module, so that prose reruns nothing"
        )
        made = [d for d in deps if d.startswith("runs/")]
        assert all(d.endswith("/digest.txt") for d in made), (
            f"dvc.yaml, {stage}: depend on what an artifact holds, its digest.txt"
        )


def test_notebooks_are_clean_and_exported(tmp_path: Path) -> None:
    project = copy_project(tmp_path)
    for command in ("nbdev_clean", "nbdev_export"):
        done = subprocess.run([command], cwd=project, env=copy_env(project), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=project, capture_output=True, text=True, check=True
        ).stdout
        assert not changed, f"{command} changes\n{changed}"


def test_the_home_page_links_every_notebook() -> None:
    home = (ROOT / "nbs/index.ipynb").read_text()
    assert [name(p) for p in NOTEBOOKS if f"]({p.relative_to(ROOT / 'nbs').as_posix()})" not in home] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", (ROOT / page).read_text())
    assert links and not [link for link in links if "://" not in link and not (ROOT / link).is_file()]


def test_import_is_quick_and_without_torch() -> None:
    code = (
        "import importlib, pkgutil, sys, time; start = time.perf_counter(); import llmops\n"
        "assert time.perf_counter() - start < 1, time.perf_counter() - start\n"
        "for m in pkgutil.walk_packages(llmops.__path__, 'llmops.'): importlib.import_module(m.name)\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'gptqmodel', 'wandb', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_wheel_installs_in_a_clean_environment(tmp_path: Path) -> None:
    start, project = time.monotonic(), copy_project(tmp_path / "project")

    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # it would come before the wheel

    def run(*words: str | Path, cwd: Path = project) -> str:
        done = subprocess.run([str(w) for w in words], cwd=cwd, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        next((tmp_path / "dist").glob("*.whl")),
    )
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text(
        sysconfig.get_path("purelib") + "\n"
    )  # only the dependencies: the wheel comes first
    code = (
        "import importlib, pkgutil, llmops; from importlib.metadata import entry_points\n"
        "names = [m.name for m in pkgutil.walk_packages(llmops.__path__, 'llmops.')]\n"
        "print(*[importlib.import_module(name).__file__ for name in names], sep='\\n')\n"
        "entry_points(group='papermill.engine')['llmops'].load()"
    )
    found = run(python, "-c", code, cwd=tmp_path).split()
    assert len(found) == len(list((ROOT / "llmops").rglob("*.py"))) - 1
    assert all(Path(f).is_relative_to(site) for f in found)
    assert time.monotonic() - start < limit(40)


MACHINE_PATH = re.compile(
    r"(?<![\w.$}])/(?:home|Users|root|work|farm|mnt/data|private/var)/[\w.-]+|/tmp/(?!pytest)\w+/|[A-Z]:\\\\Users"
)
SECRET = re.compile(
    r"\bhf_[A-Za-z]{34}\b|\bsk-[A-Za-z0-9]{32,}|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36}\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|\b[0-9a-f]{40}\b(?=.*wandb)"
)


def test_no_machine_path_and_no_secret() -> None:
    found = []
    pictures = {
        ROOT / f"nbs/results/tour/{shown}.png" for shown in ("install", "run", "ask", "gate-report", "docs-home")
    }
    for path in files():
        if path in pictures:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            found.append(f"{name(path)}: not a text file")
            continue
        for rule in (MACHINE_PATH, SECRET):
            found += [
                f"{name(path)}, line {text.count(chr(10), 0, m.start()) + 1}: {m[0][:40]}" for m in rule.finditer(text)
            ]
    assert not found, "\n".join(found)
