"""What several test files use: a copy of the project to run things in, and a quiet, offline environment."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false", DVC_NO_ANALYTICS="1")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
# commands of the environment that runs the tests, whether or not it is activated
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


LONGEST = ("test_pipeline.py", "test_model_faults.py", "test_serving.py", "test_quantization.py", "test_own_data.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "The files that take longest come first, so that two workers end at about the same time."
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def limit(seconds: float) -> float:
    "A limit of time that was set on a quiet machine, longer where fixed work takes longer now: CI may share its cores."
    took = []
    for _ in range(5):
        start = time.perf_counter()
        sum(i * i for i in range(1_000_000))
        took.append(time.perf_counter() - start)
    return seconds * max(1, max(took) / 0.05)


def copy_project(to: Path) -> Path:
    "Copy the project's files (tracked or new, nothing ignored) to `to` and make it a git checkout of its own."
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for args in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "copy"]):
        subprocess.run([*git, *args], cwd=to, check=True)
    return to


def run_apart(module: str, cfg: dict[str, Any], kill_at: int | None = None) -> subprocess.CompletedProcess[str]:
    "Run a stage and seal it in a process of its own, which kills itself when it logs a step; the digest comes last."
    name = module.rpartition(".")[2]
    code = (
        "import importlib, json, os, signal, sys\n"
        "from llmops.foundation.artifacts import seal\n"
        "from llmops.foundation.tracking import Run\n"
        f"stage, kill_at = importlib.import_module({module!r}), json.loads(sys.argv[2])\n"
        f"cfg = stage.{name.capitalize()}Params(**json.loads(sys.argv[1]))\n"
        "class Killer(Run):\n"
        "    def log(self, values, step=None):\n"
        "        if step == kill_at: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"result = stage.run_{name}(cfg, Killer())\n"
        "kind = stage.KIND if isinstance(stage.KIND, str) else stage.KIND[cfg.train]\n"
        f"print(seal(result.work, cfg.out, kind, {module!r}, cfg, result.inputs)['digest'])\n"
    )
    command = [sys.executable, "-c", code, json.dumps(cfg), json.dumps(kill_at)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=copy_env(ROOT))


def copy_env(project: Path) -> dict[str, str]:
    "The environment for commands in a copy: its own library comes before the installed one."
    return {**os.environ, "PYTHONPATH": str(project)}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A fresh copy of the project."
    return copy_project(tmp_path_factory.mktemp("project"))
