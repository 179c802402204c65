"The command `llmops`, as a user types it: help, errors, profiles, runs that are followed, interrupted and cleaned up."

import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, copy_env, limit

from llmops.tools.cli import COMMANDS, command_parser, main, module_commands

LISTED = [*COMMANDS, *module_commands()]
STAGE = """import pathlib, sys, time
name, seconds = sys.argv[1], float(sys.argv[2])
time.sleep(seconds)
if pathlib.Path(f"{name}.broken").exists():
    sys.exit(f"{name}: the file params/{name}.yaml names a model that is not there")
out = pathlib.Path("runs") / name
out.mkdir(parents=True, exist_ok=True)
(out / "digest.txt").write_text(f"{name} {time.time()}")
"""
PIPELINE = """vars:
  - params/profile.yaml
stages:
  data:
    cmd: python stage.py data 0.1
    deps: [stage.py]
    params:
      - params/data.yaml:
      - ${params}/data.yaml:
    outs: [runs/data]
  train:
    cmd: python stage.py train ${seconds}
    deps: [runs/data]
    outs: [runs/train]
  report:
    cmd: python stage.py report 0.1
    deps: [runs/train]
    outs: [runs/report]
"""


def llmops(*words: str, cwd: Path = ROOT, **kwargs: object) -> subprocess.CompletedProcess[str]:
    "Run the command; it is the library of the tests, wherever it is called."
    command = [sys.executable, "-m", "llmops.tools.cli", *words]
    return subprocess.run(command, cwd=cwd, env=copy_env(ROOT), capture_output=True, text=True, **kwargs)  # type: ignore


@pytest.fixture
def small(tmp_path: Path) -> Path:
    "A project of three stages that take no time, with the profiles `default` and `smoke`."
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_path = llmops\n")
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    (tmp_path / "params/smoke").mkdir(parents=True)
    (tmp_path / "params/profile.yaml").write_text("params: params  # the one dial\nseconds: 0.1\n")
    (tmp_path / "params/data.yaml").write_text("limit: 10\n")
    (tmp_path / "params/smoke/data.yaml").write_text("limit: 2\n")
    (tmp_path / ".gitignore").write_text("runs/\n")
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    dvc = [sys.executable, "-m", "dvc", "init", "-q"]
    for command in (["git", "init", "-q"], dvc, [*git, "add", "-A"], [*git, "commit", "-qm", "small"]):
        subprocess.run(command, cwd=tmp_path, check=True)
    shutil.copy(ROOT / ".dvc/config", tmp_path / ".dvc/config")
    return tmp_path


def follow(project: Path, *words: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    "Run stages of a project without the process that holds heavy libraries."
    command = [sys.executable, "-m", "llmops.tools.runs", *words]
    return subprocess.run(command, cwd=project, env=copy_env(ROOT), capture_output=True, text=True, **kwargs)  # type: ignore


@pytest.mark.parametrize("name", LISTED)
def test_every_listed_command_has_help(name: str) -> None:
    done = llmops(name, "--help")
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_help_comes_at_once() -> None:
    "Without torch, DVC or anything else that takes time; the best of three, for a machine that does other work."
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = llmops("--help")
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0 and all(f"\n    {name}" in done.stdout for name in LISTED)
    assert min(seconds) < limit(0.5), seconds
    code = (
        "import sys; from llmops.tools.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'dvc', 'transformers', 'pandas', 'nbformat', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=copy_env(ROOT), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rnu"], "rnu: there is no such command; did you mean run"),
        (["xyzzy"], "there is no such command; `llmops --help` lists them"),
        (["run", "finetun"], "finetun: there is no such stage; did you mean finetune"),
        (["run", "evaluate@bsae"], "did you mean evaluate@base"),
        (["profile", "smok"], "smok: there is no such profile; did you mean smoke?"),
        (["lineage", "runs/none"], "runs/none: not an artifact"),
        (["verify", "runs/none"], "runs/none: not an artifact"),
        (["diff", "a", "b", "c"], "at most two commits"),
        (["diff", "no-such-commit"], "no-such-commit"),
    ],
)
def test_an_error_is_one_line_that_says_what_to_do(words: list[str], said: str) -> None:
    done = llmops(*words)
    assert done.returncode == 1 and said in done.stdout + done.stderr, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and len((done.stdout + done.stderr).strip().splitlines()) == 1


def test_outside_of_a_project(tmp_path: Path) -> None:
    done = llmops("status", cwd=tmp_path)
    assert done.returncode == 1 and "there is no project here" in done.stderr
    assert llmops("completion", "bash", cwd=tmp_path).returncode == 0


def test_profiles(small: Path) -> None:
    assert "* default" in llmops("profile", cwd=small).stdout
    assert llmops("profile", "smoke", cwd=small / "params").returncode == 0
    assert (small / "params/profile.yaml").read_text() == "params: params/smoke  # the one dial\nseconds: 0.1\n"
    assert "* smoke" in llmops("profile", cwd=small).stdout


def test_a_run_says_how_far_it_is(small: Path) -> None:
    "In a log a line for each stage; from the second run on with the time that is left."
    first = follow(small)
    assert first.returncode == 0, first.stderr
    lines = first.stderr.splitlines()
    assert lines == ["stage 1 of 3: data", "stage 2 of 3: train", "stage 3 of 3: report"]
    times = json.loads((small / "runs/times.json").read_text())["default"]
    assert set(times) == {"data", "train", "report"}
    assert "nothing has changed" in follow(small).stderr
    (small / "params/data.yaml").write_text("limit: 11\n")
    again = follow(small).stderr.splitlines()
    assert len(again) == 3
    assert re.fullmatch(r"stage 1 of 3: data, about \d+ seconds left", again[0]), again
    assert follow(small, "report", "--force").stderr.count("stage 3 of 3: report") == 1


def test_what_the_cache_still_has_is_not_run_again(small: Path) -> None:
    assert follow(small).returncode == 0
    (small / "runs/report/digest.txt").unlink()
    again = follow(small)
    assert again.stderr.strip() == "taken from the cache, as it was: report"
    assert (small / "runs/report/digest.txt").exists()


def test_a_failing_stage_has_the_last_word(small: Path) -> None:
    (small / "train.broken").touch()
    done = follow(small)
    assert done.returncode == 1
    said = "train: the file params/train.yaml names a model that is not there"
    assert done.stderr.strip().splitlines()[-1] == said and "Traceback" not in done.stderr
    (small / "train.broken").unlink()
    resumed = follow(small)
    assert resumed.returncode == 0 and "1 stage unchanged" in resumed.stderr


def test_a_broken_pipeline_file_is_named(small: Path) -> None:
    (small / "dvc.yaml").write_text(PIPELINE.replace("outs: [runs/data]", "outz: [runs/data]"))
    done = follow(small)
    assert done.returncode == 1 and "dvc.yaml" in done.stderr and "outz" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_cleanly_and_the_run_resumes(small: Path) -> None:
    (small / "params/profile.yaml").write_text("params: params\nseconds: 60\n")
    code = (
        "import subprocess, sys; from llmops.tools import runs, warm\n"
        "warm.run_warm = lambda command: subprocess.run(command).returncode  # the stages need no heavy library\n"
        "sys.exit(runs.run_stages(['report']))"
    )
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=small, env=copy_env(ROOT), start_new_session=True, **pipes)  # type: ignore
    until = time.time() + 120
    while not (small / "runs/data/digest.txt").exists() and time.time() < until:
        time.sleep(0.2)
    time.sleep(2)  # the stage after it has begun
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped. What is finished stays" in said, said
    (small / "params/profile.yaml").write_text("params: params\nseconds: 0.1\n")
    resumed = follow(small)
    assert resumed.returncode == 0 and "1 stage unchanged" in resumed.stderr, resumed.stderr


def test_in_a_terminal_a_line_stays(small: Path) -> None:
    "The last line is kept out of what scrolls, and given back."
    master, terminal = pty.openpty()
    env = {**copy_env(ROOT), "TERM": "xterm", "LINES": "24", "COLUMNS": "80"}
    command = [sys.executable, "-m", "llmops.tools.runs"]
    process = subprocess.Popen(command, cwd=small, env=env, stdout=subprocess.DEVNULL, stderr=terminal)
    os.close(terminal)
    shown = b""
    try:
        while piece := os.read(master, 4096):
            shown += piece
    except OSError:  # the other side is closed
        pass
    assert process.wait() == 0
    assert b"\x1b[1;23r" in shown and b"stage 2 of 3: train" in shown
    assert shown.rindex(b"\x1b[r") > shown.rindex(b"stage 3 of 3"), "the terminal gets its last line back"


def test_status_counts_and_the_cache_takes_no_room(small: Path) -> None:
    before = llmops("status", cwd=small).stdout
    assert "profile default" in before and "0 of 3 stages are done, to run: data, train, report" in before
    assert follow(small).returncode == 0
    made = small / "runs/train/digest.txt"
    assert made.stat().st_nlink == 2, "the file in DVC's cache is the same file"
    after = llmops("status", cwd=small).stdout
    assert "3 of 3 stages are done" in after and "older versions in DVC's cache" in after
    (small / "stage.py").write_text(STAGE + "# changed\n")
    assert follow(small).returncode == 0, "a stage writes over what is linked"
    assert "3 of 3 stages are done" in llmops("status", cwd=small).stdout


def test_clean_keeps_what_people_did(small: Path) -> None:
    for name in ("data/manifest.json", "human-votes/votes.jsonl", "human-votes/links.json", "history.jsonl"):
        (small / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        (small / "runs" / name).write_text("{}")
    (small / "_docs").mkdir()
    done = llmops("clean", cwd=small)
    assert done.returncode == 0 and "runs/human-votes" in done.stdout and "runs/history.jsonl" in done.stdout
    assert not (small / "runs/data").exists() and not (small / "_docs").exists()
    assert (small / "runs/human-votes/votes.jsonl").exists() and (small / "runs/human-votes/links.json").exists()
    refused = llmops("clean", "--all", cwd=small, stdin=subprocess.DEVNULL)
    assert refused.returncode == 1 and "--yes" in refused.stderr and (small / "runs/history.jsonl").exists()
    assert llmops("clean", "--all", "--yes", cwd=small).returncode == 0 and not (small / "runs").exists()


def test_a_fresh_clone_shows_headlines_and_differences(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    kept = sorted((clone / "metrics").glob("*.json"))
    assert kept, "metrics/ is in git"
    shown = subprocess.run(
        [sys.executable, "-m", "dvc", "metrics", "show", "--json"],
        cwd=clone, env=copy_env(ROOT), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert set(json.loads(shown.stdout)[""]["data"]) == {f"metrics/{file.name}" for file in kept}
    assert "metrics: no difference" in llmops("diff", cwd=clone).stdout
    figures = json.loads(kept[0].read_text())
    name, value = next((n, v) for n, v in figures.items() if not isinstance(v, str))
    kept[0].write_text(json.dumps(figures | {name: value + 1}))
    assert name in llmops("diff", cwd=clone).stdout


def test_show_prints_experiments_and_draws_the_pipeline(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    done = llmops("show", cwd=clone)
    assert done.returncode == 0 and "workspace" in done.stdout, done.stderr
    assert (clone / "nbs/results/pipeline.svg").read_text() == (ROOT / "nbs/results/pipeline.svg").read_text()
    assert "data --> finetune" in (clone / "nbs/results/pipeline.md").read_text()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_stages(shell: str) -> None:
    done = llmops("completion", shell)
    assert done.returncode == 0 and "evaluate@base" in done.stdout and "smoke" in done.stdout
    if shell == "bash":
        checked = subprocess.run(["bash", "-n"], input=done.stdout, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


def test_make_targets_are_thin() -> None:
    "What `make` offers by the same name, the command does."
    text = (ROOT / "Makefile").read_text()
    for target in ("run", "rag", "gate", "people", "serve", "lab", "docs"):
        recipe = text.partition(f"\n{target}: ")[2].partition("\n\n")[0].splitlines()[1:]
        assert len(recipe) == 1 and recipe[0].strip().startswith(f"@llmops {target}"), target


def page_texts() -> dict[str, str]:
    "Name and Markdown of what people read: the pages, and the prose of the notebooks."
    pages = [*ROOT.glob("*.md"), *ROOT.glob("nbs/start/*.md"), *ROOT.glob("nbs/guides/*.md")]
    texts = {file.name: file.read_text(encoding="utf-8") for file in pages}
    for file in ROOT.glob("nbs/**/*.ipynb"):
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        texts[file.name] = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return texts


def written_commands() -> list[tuple[str, str]]:
    "File and line of every `llmops` command in shell blocks and in the text."
    found = []
    for name, text in page_texts().items():
        for block in re.findall(r"```sh\n(.*?)```", text, re.S):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(name, line.strip()) for line in lines if line.strip().startswith("llmops ")]
        found += [
            (name, command) for command in re.findall(r"`(llmops [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
        ]
    return found


def test_every_command_that_the_pages_show_is_understood(capsys: pytest.CaptureFixture[str]) -> None:
    commands = written_commands()
    assert len(commands) > 40
    parser, helps = command_parser(), dict[str, str]()
    for name in module_commands():
        with pytest.raises(SystemExit):
            main([name, "--help"])
        helps[name] = capsys.readouterr().out
    for file, line in commands:
        words = shlex.split(line.partition("&&")[0], comments=True)[1:]
        if words in (["--help"], ["COMMAND", "--help"]):
            continue
        assert words[0] in LISTED, f"{file}: {line}"
        if words[0] in COMMANDS:
            parser.parse_args(words)
            continue
        unknown = [word for word in words if word.startswith("--") and word not in helps[words[0]]]
        assert not unknown, f"{file}: {line}: {unknown}"
