"The papermill engine as other programs meet it: real `papermill` commands on a project of their own."

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbdev.export import nb_export

ENV = {**os.environ, "WANDB_MODE": "offline", "WANDB_API_KEY": "5ec2e7" * 7}
DEFINITIONS = """#| export
import math
import time
from tqdm.auto import tqdm

class BadRank(ValueError): "The rank is odd."

def double(x: int) -> int:
    if x % 2:
        raise BadRank(f"rank: must be even; got {x}")
    return 2 * x"""


def project(folder: Path, *below: str) -> Path:
    "A project with one exported stage notebook; the library is called `demo`."
    code = nbformat.v4.new_code_cell
    parameters = code("rank: int = 4  # a number\napi_key: str = ''  # a secret\nout: str = 'runs/x'  # where to write")
    parameters.metadata.tags = ["parameters"]
    cells = [
        nbformat.v4.new_markdown_cell("# Stage\n\n> One stage."),
        code("#| default_exp stage"),
        code(DEFINITIONS),
        code("print('a demonstration')\nopen('demonstrated', 'w').close()"),
        parameters,
        *map(code, below),
    ]
    cells[3].outputs = [nbformat.v4.new_output("stream", name="stdout", text="saved before\n")]
    nb = nbformat.v4.new_notebook(cells=cells)
    nb.metadata.kernelspec = {"name": "python3", "display_name": "python3", "language": "python"}
    for name in ("nbs", "demo"):
        (folder / name).mkdir()
    (folder / "settings.ini").write_text("[DEFAULT]\nlib_name = demo\nlib_path = demo\nnbs_path = nbs\n")
    (folder / "demo" / "__init__.py").touch()
    nbformat.write(nb, folder / "nbs" / "stage.ipynb")
    nb_export(str(folder / "nbs" / "stage.ipynb"), str(folder / "demo"))
    return folder


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "papermill", "nbs/stage.ipynb", "runs/x/notebook.ipynb", *args]


def papermill(folder: Path, *args: str) -> subprocess.CompletedProcess:
    args = args if "--engine" in args else ("--engine", "llmops", *args)
    return subprocess.run(command(*args), cwd=folder, env=ENV, capture_output=True, text=True, timeout=120)


def executed(folder: Path) -> nbformat.NotebookNode:
    return nbformat.read(folder / "runs" / "x" / "notebook.ipynb", 4)


def below(nb: nbformat.NotebookNode) -> list[list[dict]]:
    "What the cells below the parameters show."
    first = next(i for i, c in enumerate(nb.cells) if "parameters" in c.metadata.get("tags", []))
    return [
        [{k: v for k, v in o.items() if k != "execution_count"} for o in c.outputs]
        for c in nb.cells[first:]
        if c.cell_type == "code" and "injected-parameters" not in c.metadata.get("tags", [])
    ]


STAGE = (
    "print(double(rank), math.floor(1.5), out)",
    "[rank] * 3",
    "import matplotlib.pyplot as plt\nplt.plot([rank]);",
)


def test_engine_shows_the_same_as_plain_papermill(tmp_path):
    project(tmp_path, *STAGE)
    ran = papermill(tmp_path, "-p", "rank", "6")
    assert ran.returncode == 0, ran.stderr
    assert "12 1 runs/x" in ran.stderr and "[6, 6, 6]" in ran.stderr  # seen in the terminal
    assert not (tmp_path / "demonstrated").exists()
    library = executed(tmp_path)
    assert library.cells[3].outputs[0].text == "saved before\n"
    assert papermill(tmp_path, "-p", "rank", "6", "--engine", "nbclient").returncode == 0
    plain = executed(tmp_path)
    assert (tmp_path / "demonstrated").exists()
    assert [c.source for c in library.cells] == [c.source for c in plain.cells]
    assert below(library) == below(plain)
    assert library.metadata.papermill.parameters == plain.metadata.papermill.parameters
    assert {c.metadata.papermill.status for c in library.cells} == {"completed"}


def test_progress_bars_are_text_and_short_in_a_log(tmp_path):
    project(tmp_path, "for _ in tqdm(range(50), desc='training'): time.sleep(0.01)", "print('after')")
    ran = papermill(tmp_path)
    assert "after" in ran.stderr and "training" in ran.stderr
    assert ran.stderr.count("training") <= 2
    outputs = below(executed(tmp_path))[1]
    assert [o["output_type"] for o in outputs] == ["stream"] and outputs[0]["text"].count("training") == 1


def test_export_drift_is_refused(tmp_path):
    project(tmp_path, *STAGE)
    module = tmp_path / "demo" / "stage.py"
    module.write_text(module.read_text().replace("2 * x", "3 * x"))
    ran = papermill(tmp_path)
    assert ran.returncode == 1 and "Traceback" not in ran.stderr
    assert "nbs/stage.ipynb and the module demo.stage differ" in ran.stderr
    assert not (tmp_path / "runs" / "x" / "notebook.ipynb").exists()
    assert "3 * x" in module.read_text()  # the comparison wrote nothing


@pytest.mark.parametrize("fails", [False, True])
def test_secrets_reach_nothing_that_is_written(tmp_path, fails):
    secret, wandb = "hush'hush\"42", ENV["WANDB_API_KEY"]
    show = "import os\nassert api_key == 'hush\\'hush\"42'\nprint(api_key, os.environ['WANDB_API_KEY'])"
    project(tmp_path, show, "{'key': api_key}", "raise RuntimeError(api_key)" if fails else "api_key")
    ran = papermill(tmp_path, "-r", "api_key", secret, "--stdout-file", "out.txt")
    assert ran.returncode == int(fails), ran.stderr
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix in (".ipynb", ".txt")]
    assert len(files) == 3
    for text in (ran.stdout, ran.stderr, *(p.read_text() for p in files)):
        for spelling in (secret, secret.replace('"', '\\"'), secret.replace("'", "\\'"), wandb):
            assert spelling not in text
    nb = executed(tmp_path)
    assert nb.metadata.papermill.parameters.api_key == "[redacted]"
    assert 'api_key = "[redacted]"' in "\n".join(c.source for c in nb.cells)


@pytest.mark.parametrize("args", [("-p", "rnk", "8"), ("-f", "params.yaml")])
def test_an_unknown_parameter_is_refused(tmp_path, args):
    project(tmp_path, *STAGE)
    (tmp_path / "params.yaml").write_text("rnk: 8\n")
    ran = papermill(tmp_path, *args)
    assert ran.returncode == 1 and "Traceback" not in ran.stderr
    assert "unknown parameter rnk; it has rank, api_key, out" in ran.stderr
    assert not (tmp_path / "runs").exists()


def test_a_stage_that_fails_on_purpose_says_one_line(tmp_path):
    project(tmp_path, "double(rank)", "print('never')")
    ran = papermill(tmp_path, "-p", "rank", "3")
    assert ran.returncode == 1
    said = [line for line in ran.stderr.splitlines() if "Notebook:" not in line]
    assert said == ["Error: demo.stage: rank: must be even; got 3"]
    nb = executed(tmp_path)  # kept, with the error and papermill's marks
    assert any(o.output_type == "error" for c in nb.cells for o in c.get("outputs", []))
    assert "papermill-error-cell-tag" in nb.cells[0].metadata.tags and nb.metadata.papermill.exception


def test_another_error_says_where(tmp_path):
    project(tmp_path, "double(None)")
    ran = papermill(tmp_path)
    assert ran.returncode == 1 and "TypeError: unsupported operand" in ran.stderr
    assert "demo/stage.py" in ran.stderr and "in double" in ran.stderr and len(ran.stderr.splitlines()) < 10


def test_a_library_that_cannot_be_imported_is_an_error(tmp_path):
    project(tmp_path, *STAGE)
    (tmp_path / "demo" / "__init__.py").write_text("import nowhere\n")
    ran = papermill(tmp_path)
    assert ran.returncode == 1 and "No module named 'nowhere'" in ran.stderr


def test_a_kernel_that_dies_is_an_error(tmp_path):
    project(tmp_path, "import os; os.kill(os.getpid(), 9)")
    ran = papermill(tmp_path)
    assert ran.returncode == 1 and "the kernel died" in ran.stderr and "Traceback" not in ran.stderr


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_batch_run_leaves_no_kernel(tmp_path, how):
    project(tmp_path, "import os; open('pid', 'w').write(str(os.getpid()))\nfor _ in range(600): time.sleep(0.1)")
    run = subprocess.Popen(
        command("--engine", "llmops"),
        cwd=tmp_path,
        env=ENV,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # a shell's `&` turns it off
    pid = tmp_path / "pid"
    wait_for(lambda: pid.exists() and pid.read_text())
    run.send_signal(how)
    assert run.wait(120) != 0
    wait_for(lambda: not alive(int(pid.read_text())))
    if how == signal.SIGTERM:
        assert executed(tmp_path).cells[-1].metadata.papermill.status == "failed"


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_parameters_that_are_not_yaml_name_the_line(tmp_path):
    project(tmp_path, *STAGE)
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "bad.yaml").write_text("rank: 8\nout: [1\n")
    ran = papermill(tmp_path, "-f", "params/bad.yaml")
    assert ran.returncode == 1 and "Traceback" not in ran.stderr
    assert "params/bad.yaml, line 3: not valid YAML" in ran.stderr


def test_a_profile_is_laid_over_the_parameters(tmp_path):
    "The later file wins, key by key; one in which nothing differs may hold a comment only."
    project(tmp_path, "print(rank, out)")
    (tmp_path / "params" / "smoke").mkdir(parents=True)
    (tmp_path / "params" / "x.yaml").write_text("rank: 8\nout: runs/y\n")
    over = tmp_path / "params" / "smoke" / "x.yaml"
    for text, shown in (("rank: 2\n", "2 runs/y\n"), ("# nothing differs\n", "8 runs/y\n")):
        over.write_text(text)
        ran = papermill(tmp_path, "-f", "params/x.yaml", "-f", "params/smoke/x.yaml")
        assert ran.returncode == 0, ran.stderr
        assert below(executed(tmp_path))[1][0]["text"] == shown


def test_outputs_are_carried_home(tmp_path):
    project(tmp_path, *STAGE, "import sys; print('a warning', file=sys.stderr)")
    assert papermill(tmp_path, "-p", "rank", "6").returncode == 0
    carry = [sys.executable, "-m", "llmops.tools.notebooks", "carry"]
    said = subprocess.run(carry, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert said == "stage.ipynb: 3 cells from x\n"
    nb = nbformat.read(tmp_path / "nbs" / "stage.ipynb", 4)
    assert nb.cells[5].outputs[0].text == "12 1 runs/x\n" and "image/png" in nb.cells[7].outputs[-1].data
    assert not nb.cells[8].outputs and nb.cells[3].outputs[0].text == "saved before\n"
    assert nb.metadata.keys() == {"kernelspec"} and len(nb.cells) == 9
    (tmp_path / "demo" / "stage.py").write_text("")
    checked = subprocess.run([*carry[:-1], "check"], cwd=tmp_path, capture_output=True, text=True)
    assert checked.returncode == 1 and "nbs/stage.ipynb and the module demo.stage differ" in checked.stdout


def test_the_projects_own_notebooks_are_in_order():
    root = Path(__file__).parents[1]
    checked = subprocess.run(
        [sys.executable, "-m", "llmops.tools.notebooks", "check"], cwd=root, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout
