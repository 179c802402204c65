"Set-up on a machine that has never seen the project: what it refuses, and what its last line says when it fails."

import importlib.util
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT
from packaging.specifiers import SpecifierSet

PARTS = ("Makefile", "requirements", "setup.py", "settings.ini", "pyproject.toml", "README.md", "llmops")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    "requirements/install.py as a module; what it exports into the environment is taken back."
    spec = importlib.util.spec_from_file_location("install", ROOT / "requirements/install.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("MAKELEVEL", raising=False)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    "What set-up needs, in a folder whose name pip and make split at its spaces."
    folder = tmp_path / "내 프로젝트 (1)"
    folder.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part)
        else:
            shutil.copy(ROOT / part, folder / part)
    return folder


def make_setup(folder: Path, *words: str, **env: str) -> list[str]:
    "The lines of a set-up that must fail."
    done = subprocess.run(
        ["make", "setup", *words], cwd=folder, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode != 0
    return (done.stdout + done.stderr).strip().splitlines()


def test_another_python_is_refused_at_once(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    with pytest.raises(SystemExit, match=r"llmops needs Python 3.11, 3.12 or 3.13, and .* is 3.10.13: name another"):
        install.main("main")
    assert not (tmp_path / ".venv/bin").exists()


def test_a_python_that_is_not_there_is_named(checkout: Path) -> None:
    last = make_setup(checkout, "PYTHON=no-such-python")[-1]
    assert "no-such-python is not a command here: name a Python 3.11, 3.12 or 3.13" in last


def test_without_a_package_index_the_last_line_says_what_to_do(checkout: Path) -> None:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}
    lines = make_setup(checkout, f"PYTHON={sys.executable}", **nowhere, PIP_RETRIES="0", PIP_CONFIG_FILE=os.devnull)
    assert "check the network" in lines[-1] and "Then run `make setup` again" in lines[-1]
    assert len(lines) < 12  # and not a wall of pip
    assert (checkout / ".venv/setup.log").stat().st_size > 0
    assert not (checkout / ".venv/.ready").exists()


@pytest.mark.parametrize(
    ("log", "remedy"),
    [
        ("OSError: [Errno 28] No space left on device", "The disk is full"),
        ("fatal error: Python.h: No such file or directory", "install a C++ compiler and the headers"),
        ("Temporary failure in name resolution", "check the network"),
        ("    The user requested a==1\n    The user requested (constraint) a==1\n", "could not be had"),
        ("ERROR: something else", "`pip` failed: ERROR: something else"),
    ],
)
def test_remedies(install: ModuleType, log: str, remedy: str) -> None:
    assert remedy in install.explain(log, "pip")


def test_an_index_that_answers_late_is_asked_again(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "PAUSE", 0)
    monkeypatch.delenv("PIP_RETRIES", raising=False)
    script = "import sys; f = open('asked', 'a+'); f.write('x'); f.seek(0); sys.exit(len(f.read()) < 3 and MESSAGE)"
    monkeypatch.setattr(install, "ROOT", tmp_path)
    place = install.Environment(str(tmp_path / "venv"), "make setup")
    place.run("packages", [sys.executable, "-c", script.replace("MESSAGE", "'Connection refused'")])
    assert (tmp_path / "asked").read_text() == "xxx"
    assert capsys.readouterr().out.count("the package index did not answer; again") == 2
    (tmp_path / "asked").unlink()
    with pytest.raises(SystemExit, match="The disk is full"):
        place.run("packages", [sys.executable, "-c", script.replace("MESSAGE", "'No space left on device'")])
    assert (tmp_path / "asked").read_text() == "x"


@pytest.mark.parametrize("oldest", ["3.11.0", "3.12.0", "3.13.0"])
def test_the_lock_file_suits_the_oldest_python_of_each_kind(oldest: str) -> None:
    "Debian 12 has Python 3.11.2; pip says of a package that asks for 3.11.5 only that no version can be had."
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "requirements/lock.txt").read_text().split()}
    asked = {d.name: d.metadata.get("Requires-Python") for d in metadata.distributions() if d.name.lower() in pinned}
    assert len(asked) > 300
    assert {n: r for n, r in asked.items() if r and not SpecifierSet(r).contains(oldest)} == {}


def test_the_lock_file_suits_what_is_built_from_source() -> None:
    "It is also the constraint of build environments: gptqmodel, a source package, builds with setuptools below 83."
    pins = dict(line.split("==") for line in (ROOT / "requirements/lock.txt").read_text().split() if "==" in line)
    assert int(pins["setuptools"].partition(".")[0]) < 83
