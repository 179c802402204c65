"""What a notebook shows in git is the saved run: nobody takes its place by running a notebook, with or without set-up."""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import ROOT, copy_env
from nbclient import NotebookClient

from llmops.tools.published import FILTER, look_again, set_up_filter

NOTEBOOK = "nbs/12_tools/13_profiles.ipynb"  # runs in a second


def git(folder: Path, *words: str) -> str:
    "What git prints; the filter that it starts finds the library of the tests."
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    done = subprocess.run(["git", *identity, *words], cwd=folder, env=copy_env(ROOT), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    "A fresh clone, in which the files of the working tree are committed."
    folder = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    for name in (".gitattributes", NOTEBOOK):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--allow-empty", "-m", "as it is")
    return folder


def changed_outputs(text: str) -> str:
    "A notebook after a Run All in JupyterLab whose outputs are other than the published ones."
    nb = json.loads(text)
    for number, cell in enumerate(c for c in nb["cells"] if c["cell_type"] == "code"):
        cell["execution_count"] = number + 1
        cell["metadata"]["scrolled"] = True
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": ["mine\n"]}]
    nb["metadata"] = {"kernelspec": {"display_name": "llmops", "language": "python", "name": "python3"}}
    return json.dumps(nb, indent=1) + "\n"


def test_without_set_up_a_clone_is_usable(clone: Path) -> None:
    assert git(clone, "status", "--porcelain") == ""
    assert git(clone, "check-attr", "filter", NOTEBOOK).strip().endswith(FILTER)
    assert (clone / NOTEBOOK).read_bytes() == (ROOT / NOTEBOOK).read_bytes()
    (clone / NOTEBOOK).write_text(changed_outputs((clone / NOTEBOOK).read_text()))
    assert git(clone, "status", "--porcelain") == f" M {NOTEBOOK}\n"
    git(clone, "commit", "-qam", "without set-up, git does what it always did")


def test_an_environment_that_is_gone_does_not_stop_git(clone: Path) -> None:
    git(clone, "config", f"filter.{FILTER}.clean", '"/no/such/python" -m llmops.tools.published %f')
    (clone / NOTEBOOK).write_text(changed_outputs((clone / NOTEBOOK).read_text()))
    git(clone, "commit", "-qam", "git warns, and takes the file as it is")
    assert git(clone, "status", "--porcelain") == ""


def test_the_notebooks_of_a_fresh_clone_are_filtered_once(clone: Path) -> None:
    "A manifest asks git for the commit; hundreds of notebooks would be filtered each time while they look as new as the index."

    def filtered() -> int:
        command = ["git", "--no-optional-locks", "status", "--porcelain"]
        env = copy_env(ROOT) | {"GIT_TRACE": "1"}
        done = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True, check=True)
        return done.stderr.count("llmops.tools.published")

    git(clone, "config", f"filter.{FILTER}.clean", f'"{sys.executable}" -m llmops.tools.published %f')
    assert filtered() > 0
    time.sleep(1.1)  # git compares whole seconds
    assert set_up_filter(clone) and filtered() == 0


def test_run_all_is_not_seen_and_keeps_your_outputs(clone: Path) -> None:
    "The notebook really runs; what JupyterLab adds to a file is added."
    assert set_up_filter(clone)
    published = git(clone, "show", f"HEAD:{NOTEBOOK}")
    nb = nbformat.read(clone / NOTEBOOK, 4)
    resources = {"metadata": {"path": str(ROOT / "nbs/12_tools")}}
    NotebookClient(nb, resources=resources, env=copy_env(ROOT)).execute()
    nbformat.write(nb, clone / NOTEBOOK)
    mine = (clone / NOTEBOOK).read_text()
    assert mine != published and look_again(clone) == [NOTEBOOK]
    assert git(clone, "status", "--porcelain") == "" and git(clone, "diff") == ""
    assert (clone / NOTEBOOK).read_text() == mine, "the file keeps what you ran"


def test_a_commit_of_everything_takes_no_output_along(clone: Path) -> None:
    assert set_up_filter(clone)
    published = git(clone, "show", f"HEAD:{NOTEBOOK}")
    edited = changed_outputs(published).replace("The profiles that there are", "Which profiles there are")
    (clone / NOTEBOOK).write_text(edited)
    assert look_again(clone) == [], "a changed sentence is a change"
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "one sentence")
    stored = git(clone, "show", f"HEAD:{NOTEBOOK}")
    assert stored == published.replace("The profiles that there are", "Which profiles there are")
    assert git(clone, "show", "--stat", "--format=").strip().endswith("1 file changed, 1 insertion(+), 1 deletion(-)")


def test_a_new_cell_brings_its_output(clone: Path) -> None:
    assert set_up_filter(clone)
    nb = json.loads((clone / NOTEBOOK).read_text())
    output = {"name": "stdout", "output_type": "stream", "text": ["2\n"]}
    cell = {"cell_type": "code", "id": "new1", "metadata": {}, "execution_count": 9, "source": ["print(1 + 1)"]}
    nb["cells"].append(cell | {"outputs": [output]})
    (clone / NOTEBOOK).write_text(json.dumps(nb, indent=1))
    git(clone, "commit", "-qam", "a cell")
    stored = json.loads(git(clone, "show", f"HEAD:{NOTEBOOK}"))["cells"][-1]
    assert stored["outputs"] == [output] and stored["execution_count"] is None


def test_outputs_are_published_on_purpose(clone: Path) -> None:
    "`nbdev_clean`, and `make results` which writes in the same form."
    assert set_up_filter(clone)
    (clone / NOTEBOOK).write_text(changed_outputs((clone / NOTEBOOK).read_text()))
    clean = [sys.executable, "-c", "from nbdev.clean import nbdev_clean; nbdev_clean()", "--fname", NOTEBOOK]
    done = subprocess.run(clean, cwd=clone, env=copy_env(ROOT), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert git(clone, "status", "--porcelain") == f" M {NOTEBOOK}\n"
    git(clone, "commit", "-qam", "published")
    assert "mine" in git(clone, "show", f"HEAD:{NOTEBOOK}")


def test_a_save_in_jupyter_leaves_git_status_clean(clone: Path) -> None:
    "Jupyter's own contents manager, with the hook as the environment's settings name it."
    from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager

    assert set_up_filter(clone)
    manager = AsyncLargeFileManager(root_dir=str(clone), post_save_hook="llmops.tools.published.after_save")

    async def run_all() -> None:
        model: dict[str, Any] = await manager.get(NOTEBOOK)
        model["content"] = nbformat.from_dict(json.loads(changed_outputs(json.dumps(model["content"]))))
        await manager.save(model, NOTEBOOK)

    asyncio.run(run_all())
    assert "mine" in (clone / NOTEBOOK).read_text()
    assert git(clone, "status", "--porcelain") == ""
