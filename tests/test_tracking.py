"Whatever is wrong with W&B, a run goes on: each case is a process of its own, since wandb is imported once."

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

RUN = """
import sys
from llmops.foundation.tracking import track
with track("demo", {"out": "runs/demo", "wandb": sys.argv[1], "api_key": "hush-hush-hush"}) as run:
    run.log({"loss": 0.5}); run.log({"loss": 0.25, "hf_token": "hush-hush-hush"})
    run.table("answers", [{"a": 1}, {"a": "text"}]); run.artifact("runs/base", "abc")
print("done", sorted(run.metrics), run.worker.run.settings.sync_file if run.worker.run else None)
"""


def tracked(folder: Path, mode: str = "offline", **env: str) -> subprocess.CompletedProcess:
    (folder / "settings.ini").write_text("[DEFAULT]\nlib_path = demo\n")
    env = {**{k: v for k, v in os.environ.items() if not k.startswith("WANDB")}, "HOME": str(folder / "home"), **env}
    ran = subprocess.run(
        [sys.executable, "-c", RUN, mode], cwd=folder, env=env, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0 and ran.stdout.startswith("done ['cpu_seconds', 'peak_memory_mb', 'seconds']"), (
        ran.stderr
    )
    return ran


def test_an_offline_run_is_grouped_and_stays_in_its_folder(tmp_path):
    ran = tracked(tmp_path, LLMOPS_GROUP="run-7")
    file = Path(ran.stdout.split()[-1])
    assert file.is_relative_to(tmp_path / "runs" / ".wandb")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    records = [json.loads(line) for line in subprocess.check_output(inspect, text=True).splitlines()]
    assert next(r["run"]["run_group"] for r in records if r["type"] == "run") == "run-7"
    points = [r["history"]["item"] for r in records if r["type"] == "history"]
    assert [p["loss"] for p in points if "loss" in p] == [0.5, 0.25]
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert not any(b"hush-hush" in p.read_bytes() for p in files)
    assert {p.relative_to(tmp_path).parts[0] for p in files} <= {"settings.ini", "runs"}
    table = next(p for p in files if p.name.endswith(".table.json") and "media" in p.parts)
    assert json.loads(table.read_text())["data"] == [[1], ["text"]]  # a column of two types
    assert not ran.stderr


@pytest.mark.parametrize(
    "case", ["wandb does not import", "no folder to write to", "no key and no network", "disabled"]
)
def test_a_run_goes_on_without_tracking(tmp_path, case):
    env, mode, says = {}, "offline", "tracking is off for this run"
    if case == "wandb does not import":
        (tmp_path / "wandb.py").write_text("raise RuntimeError('broken')")
        env = {"PYTHONPATH": str(tmp_path)}
    elif case == "no folder to write to":
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / ".wandb").write_text("a file")
    elif case == "no key and no network":
        mode = "online"
    else:
        mode, says = "disabled", ""
    start = time.monotonic()
    ran = tracked(tmp_path, mode, **env)
    assert ran.stdout.split()[-1] == "None" and time.monotonic() - start < 60
    assert [line.partition(":")[0] for line in ran.stderr.splitlines()] == [says] * bool(says)
