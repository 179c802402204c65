"""The whole pipeline on the smoke profile: quick, skipped where nothing changed, and safe to kill."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import copy_env, limit

VERSIONS = [
    "refuse-always",
    "base",
    "base-nf4",
    "lora",
    "qlora",
    "qlora-merged-base",
    "qlora-merged-dequantized",
    "qlora-merged-base-gptq",
    "qlora-merged-dequantized-gptq",
]


def repro(project: Path, *args: str, warm: bool = False) -> subprocess.CompletedProcess[str]:
    before = ["python", "-m", "llmops.tools.warm"] if warm else []
    return subprocess.run(
        [*before, "dvc", "repro", *args], cwd=project, env=copy_env(project), capture_output=True, text=True
    )


def digests(project: Path) -> dict[str, str]:
    return {
        p.parent.relative_to(project / "runs").as_posix(): json.loads(p.read_text())["digest"]
        for p in sorted((project / "runs").rglob("manifest.json"))
        if ".tiny" not in p.parts
    }


def ran(done: subprocess.CompletedProcess[str]) -> list[str]:
    "The stages that were run, not skipped."
    lines = done.stdout.splitlines()
    return [line.split("'")[1] for line in lines if line.startswith("Running stage")]


@pytest.fixture(scope="module")
def smoke(project: Path) -> Path:
    "A copy of the project in which a run was killed half-way, and then finished."
    (project / "params" / "profile.yaml").write_text("params: params/smoke\n")
    started = time.time()
    killed = subprocess.Popen(
        ["dvc", "repro"],
        cwd=project,
        env=copy_env(project),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (project / "runs" / ".partial" / "qlora").exists():  # fine-tuning has begun
        assert killed.poll() is None and time.time() - started < limit(240)
        time.sleep(0.2)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    before = digests(project)
    assert {"data", "base"} <= set(before)
    (project / ".dvc" / "tmp" / "rwlock").unlink(missing_ok=True)
    done = repro(project, warm=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    again = set(ran(done))
    assert not again & {"data", "base"}, "a killed run loses at most the stage it was in"
    print(f"killed run and repeat: {time.time() - started:.0f} s")
    return project


def test_leaderboard_has_every_row(smoke: Path) -> None:
    rows = json.loads((smoke / "runs" / "leaderboard" / "leaderboard.json").read_text())
    assert {r["version"] for r in rows} == set(VERSIONS)
    keys = (
        "version f1 f1_low f1_high exact_match f1_answerable f1_unanswerable delta_f1 delta_f1_low delta_f1_high perplexity "
        "kl top1_agreement size_mb peak_memory_mb prefill_tokens_per_second decode_tokens_per_second digest"
    ).split()
    assert all(set(keys) <= set(r) for r in rows)


def test_nothing_changed_runs_nothing(smoke: Path) -> None:
    started = time.time()
    done = repro(smoke)
    assert done.returncode == 0 and not ran(done)
    assert time.time() - started < limit(5)


def test_prose_reruns_nothing(smoke: Path) -> None:
    path = smoke / "nbs" / "02_adaptation" / "01_finetuning.ipynb"
    notebook = json.loads(path.read_text())
    prose = next(c for c in notebook["cells"] if c["cell_type"] == "markdown")
    prose["source"] = [*prose["source"], "\n\nOne more sentence."]
    path.write_text(json.dumps(notebook, indent=1) + "\n")
    assert not ran(repro(smoke))


def test_the_same_bytes_at_another_commit_rerun_nothing(smoke: Path) -> None:
    "A manifest names the commit; the digest, which other stages depend on, does not."
    manifest = smoke / "runs" / "data" / "manifest.json"
    before = json.loads(manifest.read_text())
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "another"], cwd=smoke, check=True)
    again = repro(smoke, "--force", "--single-item", "--no-run-cache", "data")
    assert again.returncode == 0 and ran(again) == ["data"], again.stderr[-2000:]
    after = json.loads(manifest.read_text())
    assert after["digest"] == before["digest"] and after["git"] != before["git"]
    assert not ran(repro(smoke))


def test_one_parameter_reruns_what_depends_on_it(smoke: Path) -> None:
    author = {}
    for who in ("AUTHOR", "COMMITTER"):
        author |= {f"GIT_{who}_NAME": "test", f"GIT_{who}_EMAIL": "test@example.org"}
    done = subprocess.run(
        ["dvc", "exp", "run", "-S", "params/smoke/serving.yaml:questions=1"],
        cwd=smoke,
        env=copy_env(smoke) | author,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert set(ran(done)) == {"serving"}
    assert "questions: 1\n" in (smoke / "params" / "smoke" / "serving.yaml").read_text()


def test_dvc_shows_the_headline(smoke: Path) -> None:
    "A dozen figures at most, in files that git keeps."
    done = subprocess.run(
        ["dvc", "metrics", "show", "--json"], cwd=smoke, env=copy_env(smoke), capture_output=True, text=True
    )
    shown = {Path(file).stem: about["data"] for file, about in json.loads(done.stdout)[""]["data"].items()}
    assert set(shown) == {"leaderboard", "gate", "serving", "retrieval", "answering"}
    assert shown["leaderboard"]["winner"] in VERSIONS and shown["gate"]["verdict"] in ("ship", "hold", "reject")
    figures = [value for of_stage in shown.values() for value in of_stage.values() if not isinstance(value, str)]
    assert 8 <= len(figures) <= 12 and all(value is not None for value in figures)


def test_two_runs_give_the_same_digests(smoke: Path) -> None:
    "The first with a process of its own for each stage, the second with warm kernels."
    first, started = digests(smoke), time.time()
    done = repro(smoke, "--force", "--no-run-cache", warm=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert digests(smoke) == first
    print(f"the whole pipeline: {time.time() - started:.0f} s")


def test_every_artifact_verifies_back_to_the_sources(smoke: Path) -> None:
    code = (
        "from llmops.foundation.artifacts import lineage, verify; from pathlib import Path\n"
        "[verify(p.parent) for p in Path('runs').rglob('manifest.json') if '.tiny' not in p.parts]\n"
        "rows = lineage('runs/serving'); assert all(r['unchanged'] for r in rows), rows\n"
        "print(sorted({r['ref'] for r in rows}))"
    )
    done = subprocess.run(["python", "-c", code], cwd=smoke, env=copy_env(smoke), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "runs/data" in done.stdout and "runs/base" in done.stdout and "package:" in done.stdout
