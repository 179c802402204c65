"""One writer for an artifact: who may write, what may be sealed, and what a killed run leaves."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops.foundation import artifacts, folders
from llmops.foundation.artifacts import (
    ArtifactError,
    begin_artifact,
    check_free,
    discard,
    read_manifest,
    resolve_source,
    seal,
    verify,
    working_folder,
)
from llmops.foundation.cache import build_folder
from llmops.foundation.folders import FolderInUse, unfinished_folder
from llmops.studies import faults
from llmops.studies.robustness import COUNTS, main

ROOT = Path(__file__).resolve().parent.parent
MODULE = "llmops.foundation.artifacts"
HEAD = """
import os, signal, subprocess, sys, time
from pathlib import Path
from llmops.foundation import artifacts, folders
from llmops.foundation.artifacts import *
from llmops.foundation.cache import build_folder
out = Path(sys.argv[1])
def wait():
    print("ready", flush=True)
    sys.stdin.readline()
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
def write(work, text):
    for n in range(3):
        (work / f"{n}.txt").write_text(text)
def make(text, **kwargs):
    work = begin_artifact(out, params={"text": text})
    write(work, text)
    seal(work, out, "rows", "llmops.foundation.artifacts", {"text": text}, **kwargs)
"""


def start(code: str, out: Path, ready: bool = False) -> subprocess.Popen[str]:
    "Run code as a process of its own, and wait until it says that it is ready."
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + code, str(out)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    if ready and process.stdout.readline() != "ready\n":
        raise AssertionError(process.communicate()[1])
    return process


@contextmanager
def running(code: str, out: Path) -> Iterator[subprocess.Popen[str]]:
    "A process that has said that it is ready, and is killed at the end if it has not ended."
    process = start(code, out, ready=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    "Let a process go on, and wait for its end: its code, and the last line of what it says of errors."
    errors = process.communicate("\n", timeout=60)[1].splitlines()
    return process.returncode, errors[-1] if errors else ""


def make(out: Path, text: str, **params: object) -> dict:
    with working_folder(out, {"text": text, **params}) as work:
        for n in range(3):
            (work / f"{n}.txt").write_text(text)
    return seal(work, out, "rows", MODULE, {"text": text, **params})


def is_true(out: Path) -> str:
    "The text of an artifact, after its manifest was found to be true."
    verify(out)
    text = read_manifest(out)["params"]["text"]
    assert [(out / f"{n}.txt").read_text() for n in range(3)] == [text] * 3
    return text


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# --- one writer -------------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_by_name_and_the_first_seals_its_own(tmp_path: Path) -> None:
    out = tmp_path / "rows"
    slow = """
work = begin_artifact(out, params={"text": "first"})
(work / "0.txt").write_text("first")
wait()
write(work, "first")
seal(work, out, "rows", "llmops.foundation.artifacts", {"text": "first"})
"""
    with running(slow, out) as first:
        code, error = finish(start("make('second')", out))
        assert code == 1 and f"rows: is being written by process {first.pid} (" in error
        assert f"kill {first.pid}" in error and "name another folder" in error and "python -c" in error
        assert finish(first) == (0, "")
    assert is_true(out) == "first" and names(tmp_path) == ["rows"]
    assert make(out, "second") and is_true(out) == "second"


def test_every_name_of_a_folder_is_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "settings.ini").write_text("")
    monkeypatch.chdir(tmp_path / "real")  # paths are told from the root, wherever one is
    with running("begin_artifact(out); wait()", tmp_path / "real" / "rows"):
        for other in ("real/rows/", "link/rows", tmp_path / "link/../real/./rows", "nowhere/../real/rows"):
            with pytest.raises(ArtifactError, match="is being written by process"):
                begin_artifact(other)
            with pytest.raises(ArtifactError, match="is being written by process"):
                check_free(other)
    (tmp_path / "alias").symlink_to(tmp_path / "real" / "rows")  # to what is not there yet
    make(tmp_path / "alias", "one")
    assert is_true(tmp_path / "real" / "rows") == "one" and (tmp_path / "alias").is_symlink()


def test_a_process_may_begin_again_and_only_the_last_work_is_sealed(tmp_path: Path) -> None:
    out = tmp_path / "rows"
    first = begin_artifact(out)
    (first / "0.txt").write_text("first")
    second = begin_artifact(f"{out}/")
    assert not first.exists() and not list(second.iterdir())
    first.mkdir()
    (first / "0.txt").write_text("first")
    with pytest.raises(ArtifactError, match="it was begun once more"):
        seal(first, out, "rows", MODULE, {})
    with pytest.raises(ArtifactError, match="was not begun by this process"):
        seal(second, tmp_path / "elsewhere", "rows", MODULE, {})
    (second / "0.txt").write_text("second")
    seal(second, out, "rows", MODULE, {})
    assert (out / "0.txt").read_text() == "second" and names(tmp_path) == ["rows"]


def test_what_another_process_began_is_not_sealed(tmp_path: Path) -> None:
    out = tmp_path / "rows"
    with running("write(begin_artifact(out), 'theirs'); wait()", out) as other:
        [work] = unfinished_folder(out).glob("work-*")
        with pytest.raises(ArtifactError, match=f"not begun by this process but by process {other.pid}"):
            seal(work, out, "rows", MODULE, {"text": "mine"})
        assert (work / "0.txt").read_text() == "theirs"
    with pytest.raises(ArtifactError, match="was not begun by this process"):
        seal(work, out, "rows", MODULE, {"text": "mine"})  # nor when that one is dead


def test_children_neither_hold_nor_seal_nor_free_it(tmp_path: Path) -> None:
    "A fork that ends does not free the folder, a fork that outlives its parent does not hold it or write into it."
    code = """
work = begin_artifact(out)
child = os.fork()
if not child:
    try:
        write(work, "child")
        seal(work, out, "rows", "llmops.foundation.artifacts", {})
    except ArtifactError as e:
        os._exit(7 if "was not begun by this process" in str(e) else 8)
    os._exit(9)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
subprocess.run(["true"], close_fds=False)
if not os.fork():
    while True:  # a worker that nobody has told to end
        try:
            (work / "late.txt").write_text("late")
        except OSError:
            pass
        time.sleep(0.01)
wait()
"""
    out = tmp_path / "rows"
    parent = start(code, out, ready=True)
    with pytest.raises(ArtifactError, match=f"process {parent.pid}"):
        begin_artifact(out)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    try:
        work = begin_artifact(out)
        (work / "0.txt").write_text("mine")
        time.sleep(0.1)  # the orphan is still writing
        assert seal(work, out, "rows", MODULE, {})["files"].keys() == {"0.txt"}
    finally:
        kill_children_of(out)
    assert verify(out)


def kill_children_of(out: Path) -> None:
    "End the processes that were started for a folder and are still there."
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        if str(out) in (process.info["cmdline"] or []) and process.pid != os.getpid():
            process.kill()


def test_a_folder_that_was_removed_meanwhile_is_nobodys(tmp_path: Path) -> None:
    out = tmp_path / "rows"
    work = begin_artifact(out)
    shutil.rmtree(tmp_path / ".partial")
    with running("begin_artifact(out); wait()", out) as other:
        with pytest.raises(ArtifactError, match="was removed while it was being written"):
            seal(work, out, "rows", MODULE, {})
        with pytest.raises(ArtifactError, match=f"process {other.pid}"):
            begin_artifact(out)
    make(out, "mine")
    assert is_true(out) == "mine"


# --- what is sealed is true -------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.dictionaries(st.sampled_from("abc"), st.none() | st.integers() | st.text(max_size=3)), st.data())
def test_other_parameters_than_the_works_are_refused(params: dict, data: st.DataObject) -> None:
    changed = data.draw(st.dictionaries(st.sampled_from("abcd"), st.integers(0, 3)))
    claim = folders.Claim(ROOT / "runs" / "x", ROOT, folders.Owner(0, 0, "", "", "", ""), None)
    begun = artifacts.Begun(claim, ROOT, params, {})
    if any(name in params and params[name] != value for name, value in changed.items()):
        with pytest.raises(ArtifactError, match="runs/x: was made with [abc] "):
            artifacts.check_params(begun, changed)
    else:
        artifacts.check_params(begun, changed)


def test_parameters_and_inputs_that_have_changed_are_refused(tmp_path: Path) -> None:
    out, data, rows = tmp_path / "rows", tmp_path / "data", tmp_path / "rows.jsonl"
    make(data, "old")
    rows.write_text("{}\n")
    read_manifest(data), resolve_source(rows)  # as a stage does
    work = begin_artifact(out, params={"seed": 1, "api_key": "hush"})
    (work / "0.txt").write_text("from old")
    with pytest.raises(ArtifactError, match="made with seed 1, and 2 is to be recorded"):
        seal(work, out, "rows", MODULE, {"seed": 2})
    with pytest.raises(ArtifactError, match="api_key '.redacted.'"):
        seal(work, out, "rows", MODULE, {"seed": 1, "api_key": "hash"})
    make(data, "new")  # another run makes the input again
    read_manifest(data)  # and this one looks at it once more
    for _ in range(2):  # also when one only seals again
        with pytest.raises(ArtifactError, match="its input data .* was changed after the stage had read it"):
            seal(work, out, "rows", MODULE, {"seed": 1}, {"data": data})
    make(data, "old")  # the same bytes are the same input
    seal(work, out, "rows", MODULE, {"seed": 1}, {"data": data, "rows": rows})
    work = begin_artifact(out)
    resolve_source(rows)
    rows.write_text("{ }\n")
    (work / "0.txt").write_text("x")
    with pytest.raises(ArtifactError, match="its input rows .* was changed"):
        seal(work, out, "rows", MODULE, {}, {"rows": rows})
    discard(out)


# --- what a killed run leaves -----------------------------------------------------------------------------------------

PLACES = {
    "while it writes": "write(begin_artifact(out), 'new'); die()",
    "before the manifest": "artifacts.write_manifest = die; make('new')",
    "before the swap": "folders.exchange_folders = die; make('new')",
    "after the swap": "folders.empty_home = lambda claim: None if not (claim.home / 'made').exists() else die(); make('new')",
    "between two renames": """
folders.exchange_folders = lambda *_: False
rename = Path.rename
def one(self, target):
    done = rename(self, target)
    if Path(target).name == "before": die()
    return done
Path.rename = one
make('new')""",
    "before it is free": "artifacts.release_claim = die; make('new')",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_kill_leaves_one_whole_artifact_and_nothing_in_the_way(place: str, tmp_path: Path) -> None:
    out = tmp_path / "rows"
    make(out, "old")
    assert finish(start(PLACES[place], out))[0] == -signal.SIGKILL
    if place == "between two renames":
        assert not out.exists() and is_true(unfinished_folder(out) / "before") == "old"
    else:
        assert is_true(out) == ("new" if place in ("after the swap", "before it is free") else "old")
    with working_folder(out) as work:
        assert is_true(out) in ("old", "new") and not list(work.iterdir())
        discard(out)
    assert names(tmp_path) == ["rows"]
    make(out, "next")
    assert is_true(out) == "next" and names(tmp_path) == ["rows"]


def test_a_killed_run_is_taken_over_by_one_that_can_resume(tmp_path: Path) -> None:
    out = tmp_path / "rows"
    code = "write(begin_artifact(out, resume=True, params={'text': 'kept'}), 'kept'); die()"
    assert finish(start(code, out))[0] == -signal.SIGKILL
    [left] = unfinished_folder(out).glob("work-*")
    work = begin_artifact(out, resume=True, params={"text": "kept"})
    assert work == left and names(work) == ["0.txt", "1.txt", "2.txt"]  # under the same path, as checkpoints name it
    seal(work, out, "rows", MODULE, {"text": "kept"})
    assert is_true(out) == "kept" and names(tmp_path) == ["rows"]


def test_a_reader_finds_a_whole_artifact_at_every_moment(tmp_path: Path) -> None:
    out, missing, done = tmp_path / "rows", list[str](), threading.Event()
    make(out, "0")

    def read() -> None:
        while not done.is_set():
            try:
                folder = os.open(out, os.O_RDONLY)  # what is open stays the same folder
            except OSError as e:
                missing.append(str(e))
                continue
            try:
                with open(os.open("manifest.json", os.O_RDONLY, dir_fd=folder)) as file:
                    json.load(file)
            except FileNotFoundError as e:
                if out.stat().st_ino == os.fstat(folder).st_ino:  # not one that is being removed
                    missing.append(str(e))
            os.close(folder)

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(1, 15):
        make(out, str(n))
    done.set()
    reader.join()
    assert missing == [] or not folders.exchange_folders(*two_folders(tmp_path))


def two_folders(folder: Path) -> tuple[Path, Path]:
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    return folder / "a", folder / "b"


# --- where nothing can be written, and where something else lies ------------------------------------------------------


def test_a_full_disk_while_sealing_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows"
    make(out, "old")
    work = begin_artifact(out, params={"text": "new"})
    for n in range(3):
        (work / f"{n}.txt").write_text("new")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for module, name in ((artifacts, "write_json"), (artifacts, "put_in_place"), (folders, "exchange_folders")):
        with monkeypatch.context() as patched, pytest.raises(ArtifactError, match="rows: cannot be written: No space"):
            patched.setattr(module, name, full)
            seal(work, out, "rows", MODULE, {"text": "new"})
        assert is_true(out) == "old"
    seal(work, out, "rows", MODULE, {"text": "new"})  # there is space again
    assert is_true(out) == "new" and names(tmp_path) == ["rows"]
    with monkeypatch.context() as patched, pytest.raises(ArtifactError, match="rows: cannot be written: No space"):
        patched.setattr(folders, "write_json", full)
        begin_artifact(out)
    make(out, "newer")
    assert is_true(out) == "newer"


@pytest.mark.parametrize("out", ["file/rows", "/proc/rows", "blocked/rows", "loop/rows", "x" * 300])
def test_where_nothing_can_be_written_it_is_said(out: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / ".partial").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written: .*; free some space, or let `out` name a folder"):
        begin_artifact(tmp_path / out)


@pytest.mark.parametrize("code", sorted(folders.NO_LOCKS))
def test_a_file_system_without_locks_is_refused_by_name(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    out = tmp_path / "내 프로젝트 (1) #2" / "rows"
    make(out, "old")
    with monkeypatch.context() as patched:
        patched.setattr("fcntl.flock", refuse)
        with pytest.raises(ArtifactError, match="rows: cannot be locked: its file system refuses locks .*a local disk"):
            begin_artifact(out)
    assert is_true(out) == "old" and names(out.parent) == ["rows"]


def test_an_artifact_among_unfinished_ones_is_refused(tmp_path: Path) -> None:
    work = begin_artifact(tmp_path / "rows", params={"text": "live"})
    for out in (work, work / "deep", work.parent, tmp_path / ".partial", tmp_path / ".partial" / "other"):
        with pytest.raises(ArtifactError, match="lies in .partial, where artifacts are written until they are sealed"):
            begin_artifact(out)
    for n in range(3):
        (work / f"{n}.txt").write_text("live")
    seal(work, tmp_path / "rows", "rows", MODULE, {"text": "live"})
    assert is_true(tmp_path / "rows") == "live" and names(tmp_path) == ["rows"]


def test_artifacts_in_a_folder_that_this_process_builds(tmp_path: Path) -> None:
    build_folder(tmp_path / "tiny", "stamp", lambda folder: make(folder / "made", "one"))
    assert is_true(tmp_path / "tiny" / "made") == "one" and names(tmp_path) == ["tiny"]


def test_what_no_stage_sealed_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "home" / "letters").mkdir(parents=True)
    (tmp_path / "home" / "letters" / "mine.txt").write_text("Dear")
    with pytest.raises(ArtifactError, match="holds letters/mine.txt, which no stage has sealed there"):
        begin_artifact(tmp_path / "home")
    make(tmp_path / "home" / "rows", "inner")
    for out in (tmp_path / "home", tmp_path):
        with pytest.raises(ArtifactError, match="which would be removed; move it away"):
            begin_artifact(out)
    out = tmp_path / "home" / "rows"
    with pytest.raises(ArtifactError, match="lies inside the artifact"):
        begin_artifact(out / "deep" / "inside")
    work = begin_artifact(out)
    (work / "0.txt").write_text("new")
    (out / "note.txt").write_text("put here while the stage was running")
    with pytest.raises(ArtifactError, match="holds note.txt"):
        seal(work, out, "rows", MODULE, {})
    (out / "note.txt").rename(tmp_path / "note.txt")
    (out / "notebook.ipynb").write_text("{}")
    seal(work, out, "rows", MODULE, {})
    assert names(out) == ["0.txt", "digest.txt", "manifest.json", "notebook.ipynb"]
    with pytest.raises(ArtifactError, match="is a file; `out` must name a folder"):
        begin_artifact(tmp_path / "note.txt")


# --- folders that are built once --------------------------------------------------------------------------------------

BUILD = """
def build(folder):
    write(folder, "slow")
    wait()
build_folder(out, "stamp", build)
"""


def test_one_process_builds_a_folder_and_others_wait(tmp_path: Path) -> None:
    out, built = tmp_path / "tiny", list[Path]()

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "0.txt").write_text("mine")

    with running(BUILD, out) as slow:
        with pytest.raises(FolderInUse, match=f"tiny: is being written by process {slow.pid}"):
            build_folder(out, "stamp", build, wait=0)
        waiting = threading.Thread(target=build_folder, args=(out, "stamp", build))
        waiting.start()
        assert finish(slow) == (0, "")
        waiting.join()
    assert built == [] and (out / "0.txt").read_text() == "slow" and names(tmp_path) == ["tiny"]
    with running(BUILD.replace('"stamp"', '"other"'), out) as killed:
        killed.kill()
        killed.wait()
        assert (out / "0.txt").read_text() == "slow"  # as it was
    build_folder(out, "newer", build)
    assert names(out) == [".stamp", "0.txt"] and len(built) == 1 and names(tmp_path) == ["tiny"]


# --- all of it, at random ---------------------------------------------------------------------------------------------


def test_disturbed_runs_never_lie_and_leave_nothing_in_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "llmops.studies.robustness", str(tmp_path / "robustness.json")]
    command += ["--kinds", "artifacts", "--rounds", "15"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "robustness.json").read_text())
    assert [figures[name] for name in COUNTS] == [15, 0, 0, 0, 0]
    part = figures["parts"]["artifacts"]
    assert part["runs"] >= 30 and min(part["sealed"], part["refused"], part["killed"]) > 0
    assert "| artifacts | 15 | 0 | 0 | 0 | 0 |" in (tmp_path / "robustness.md").read_text()
    with pytest.raises(SystemExit):
        main([])
    assert "the following arguments are required: out" in capsys.readouterr().err


def test_faulty_inputs_are_used_rightly_or_refused_by_name(tmp_path: Path) -> None:
    "A few of each kind that need no model; the study tries them all."
    few = [*faults.input_cases("data")[::5], *faults.input_cases("documents")[::4]]
    outcomes = faults.try_cases(few, tmp_path)
    assert [o for o in outcomes if o.outcome != o.expected] == []
    counts = faults.count_outcomes(outcomes)
    assert counts.pop("cases") == len(few) >= 10 and set(counts.values()) == {0}


@pytest.mark.parametrize(
    "happens, outcome",
    [
        ("time.sleep(60)", faults.HUNG),
        ("os._exit(1)", faults.CRASHED),
        ("1 / 0", faults.CRASHED),
        ("raise ArtifactError('no')", faults.CRASHED),  # it does not say what it is about
        ("raise ArtifactError('rows: no')", faults.REFUSED),
        ("raise faults.Lost('a row')", faults.LOST),
        ("raise faults.Untrue('a seed')", faults.UNTRUE),
        ("pass", faults.RIGHT),
    ],
)
def test_the_study_tells_what_came_of_an_input(happens: str, outcome: str, tmp_path: Path) -> None:
    def run(folder: Path) -> None:
        exec(happens, globals())

    found = faults.try_case(faults.Case("data", "x", faults.RIGHT, run, says="rows"), tmp_path / "x", patience=1)
    assert found.outcome == outcome and not (tmp_path / "x").exists()
