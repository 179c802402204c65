"Rules that hold for every file of the project."
import ast
import json
import re
import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, copy_env, copy_project
from dvc.repo import Repo

NOTEBOOKS = sorted((ROOT / "nbs").rglob("[0-9]*.ipynb"))
STAGES = [p for p in NOTEBOOKS if p.parent.name != "00_foundation"]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def files() -> list[Path]:
    "Files that are committed or would be."
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / n for n in sorted(set(listed.split("\0"))) if n and (ROOT / n).is_file()]


def code_cells(notebook: Path) -> list[tuple[str, list[str]]]:
    "Source and tags of every code cell."
    cells = json.loads(notebook.read_text())["cells"]
    return [("".join(c["source"]), c["metadata"].get("tags", [])) for c in cells if c["cell_type"] == "code"]


def parameters(notebook: Path) -> set[str]:
    "Names that the notebook's `parameters` cell sets."
    cell = next(source for source, tags in code_cells(notebook) if "parameters" in tags)
    return {n.target.id for n in ast.parse(cell).body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}


def module_file(notebook: Path) -> Path:
    "The library file that a notebook exports to."
    exported = next(m[1] for source, _ in code_cells(notebook) if (m := re.search(r"^#\| *default_exp +(\S+)", source, re.M)))
    return ROOT / "llmops" / f"{exported.replace('.', '/')}.py"


def imports(module: Path, seen: set[Path]) -> set[Path]:
    "A module and every module of the library that it imports, at its top or inside functions."
    if module in seen:
        return seen
    seen.add(module)
    package = module.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(module.read_text())):
        dotted: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            dotted = [tuple(a.name.split(".")) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (*package[:len(package) - node.level], *(node.module or "").split(".")) if node.level else tuple((node.module or "").split("."))
            base = tuple(part for part in base if part)
            dotted = [base, *[(*base, a.name) for a in node.names]]
        for parts in dotted:
            file = ROOT.joinpath(*parts).with_suffix(".py")
            if parts[0] == "llmops" and file.is_file():
                imports(file, seen)
    return seen


@pytest.fixture(scope="module")
def pipeline() -> dict[str, tuple[list[str], list[str]]]:
    "Every stage of `dvc.yaml`: the words of its papermill call, and its dependencies."
    with Repo(str(ROOT)) as repo:
        stages = {s.addressing: (s.cmd if isinstance(s.cmd, str) else " ".join(s.cmd), [str(d.def_path) for d in s.deps]) for s in repo.index.stages}
    return {stage: (shlex.split(cmd), deps) for stage, (cmd, deps) in stages.items()}


@pytest.mark.parametrize("notebook", STAGES, ids=name)
def test_a_stage_has_one_parameters_cell(notebook: Path) -> None:
    tagged = [source for source, tags in code_cells(notebook) if "parameters" in tags]
    library_only = notebook.stem[2:3].isalpha()  # 44a_name: a part of stage 44, not a stage
    assert len(tagged) == (0 if library_only else 1)
    for source in tagged:
        for node in ast.parse(source).body:
            assert isinstance(node, ast.AnnAssign), f"papermill reads `name: type = value  # help` only: {ast.unparse(node)}"
            assert "#" in source.splitlines()[node.lineno - 1], f"{ast.unparse(node)}: say what it means in a comment"
        assert {"seed", "out", "wandb"} <= parameters(notebook) or not (ROOT / "params" / f"{module_file(notebook).stem}.yaml").is_file()


def test_stages_run_known_notebooks_with_known_parameters(pipeline: dict[str, tuple[list[str], list[str]]]) -> None:
    used = set()
    for stage, (words, deps) in pipeline.items():
        notebook = ROOT / next(w for w in words if w.endswith(".ipynb"))
        used.add(notebook)
        known = parameters(notebook)
        given = [words[i + 1] for i, w in enumerate(words) if w in ("-p", "-r", "--parameters", "--parameters_raw")]
        given += [w.split("=")[0] for i, w in enumerate(words) if words[i - 1] == "-y"]
        for i, word in enumerate(words):
            if word in ("-f", "--parameters_file"):
                assert words[i + 1] in deps, f"{stage}: {words[i + 1]} is not among its deps"
                given += yaml.safe_load((ROOT / words[i + 1]).read_text()) or {}
        assert set(given) <= known, f"{stage}: {sorted(set(given) - known)} not in the parameters of {name(notebook)}"
    assert len(used) >= 6


def test_parameter_files_name_known_parameters(pipeline: dict[str, tuple[list[str], list[str]]]) -> None:
    notebooks = {}
    for words, _ in pipeline.values():
        file = next(Path(words[i + 1]).name for i, w in enumerate(words) if w in ("-f", "--parameters_file"))
        notebooks[file] = ROOT / next(w for w in words if w.endswith(".ipynb"))
    for folder in ("params", "params/smoke", "params/gpu"):
        for file, notebook in notebooks.items():
            path = ROOT / folder / file
            assert path.is_file(), f"{folder}/{file}: missing"
            unknown = set(yaml.safe_load(path.read_text()) or {}) - parameters(notebook)
            assert not unknown, f"{name(path)}: {sorted(unknown)} not in the parameters of {name(notebook)}"


def test_stages_depend_on_what_they_import(pipeline: dict[str, tuple[list[str], list[str]]]) -> None:
    for stage, (words, deps) in pipeline.items():
        module = module_file(ROOT / next(w for w in words if w.endswith(".ipynb")))
        wanted = {name(p) for p in imports(module, set())}
        assert {d for d in deps if d.startswith("llmops/")} == wanted, f"dvc.yaml, {stage}: deps under llmops/ should be {sorted(wanted)}"
        assert not [d for d in deps if d.startswith("nbs/")], f"dvc.yaml, {stage}: depend on the module, so that prose reruns nothing"


def test_notebooks_are_clean_and_exported(tmp_path: Path) -> None:
    project = copy_project(tmp_path)
    for command in ("nbdev_clean", "nbdev_export"):
        done = subprocess.run([command], cwd=project, env=copy_env(project), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=project, capture_output=True, text=True, check=True).stdout
        assert not changed, f"{command} changes\n{changed}"


def test_the_home_page_links_every_notebook() -> None:
    home = (ROOT / "nbs/index.ipynb").read_text()
    assert [name(p) for p in NOTEBOOKS if f"]({p.relative_to(ROOT / 'nbs').as_posix()})" not in home] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", (ROOT / page).read_text())
    assert links and not [link for link in links if "://" not in link and not (ROOT / link).is_file()]


def test_import_is_quick_and_without_torch() -> None:
    code = ("import importlib, pkgutil, sys, time; start = time.perf_counter(); import llmops\n"
            "assert time.perf_counter() - start < 1, time.perf_counter() - start\n"
            "for m in pkgutil.walk_packages(llmops.__path__, 'llmops.'): importlib.import_module(m.name)\n"
            "heavy = {'torch', 'transformers', 'peft', 'trl', 'gptqmodel', 'wandb', 'matplotlib'} & set(sys.modules); assert not heavy, heavy")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_wheel_installs_in_a_clean_environment(tmp_path: Path) -> None:
    start, project = time.monotonic(), copy_project(tmp_path / "project")
    def run(*words: str | Path, cwd: Path = project) -> str:
        done = subprocess.run([str(w) for w in words], cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", next((tmp_path / "dist").glob("*.whl")))
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # only the dependencies: the wheel comes first
    code = ("import importlib, pkgutil, llmops; from importlib.metadata import entry_points\n"
            "print(*[importlib.import_module(m.name).__file__ for m in pkgutil.walk_packages(llmops.__path__, 'llmops.')], sep='\\n')\n"
            "entry_points(group='papermill.engine')['llmops'].load()")
    found = run(python, "-c", code, cwd=tmp_path).split()
    assert len(found) == len(list((ROOT / "llmops").rglob("*.py"))) - 1
    assert all(Path(f).is_relative_to(site) for f in found)
    assert time.monotonic() - start < 40


MACHINE_PATH = re.compile(r"(?<![\w.$}])/(?:home|Users|root|work|farm|mnt/data|private/var)/[\w.-]+|/tmp/(?!pytest)\w+/|[A-Z]:\\\\Users")
SECRET = re.compile(r"\bhf_[A-Za-z]{34}\b|\bsk-[A-Za-z0-9]{32,}|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36}\b|-----BEGIN [A-Z ]*PRIVATE KEY|\b[0-9a-f]{40}\b(?=.*wandb)")


def test_no_machine_path_and_no_secret() -> None:
    found = []
    for path in files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            found.append(f"{name(path)}: not a text file")
            continue
        for rule in (MACHINE_PATH, SECRET):
            found += [f"{name(path)}, line {text.count(chr(10), 0, m.start()) + 1}: {m[0][:40]}" for m in rule.finditer(text)]
    assert not found, "\n".join(found)
