"""Ask pip whether each extra of the wheel can be had: `python tests/resolve_extras.py [EXTRA ...] [-c CONSTRAINTS]`.

It needs a package index, so pytest leaves it alone. pip resolves and installs nothing (`--dry-run`). `-c` takes a file
of constraints, such as one with `torch==2.13.0` where that picks the CPU build."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import test_packaging
from conftest import copy_project

EXTRAS = ("", *test_packaging.EXTRAS)


def build_wheel(folder: Path) -> Path:
    "Build the wheel of a copy of the project with what is installed."
    project = str(copy_project(folder / "project"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), project]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def resolve(wheel: Path, extra: str, constraints: Sequence[str], report: Path) -> str:
    "What pip would install, in a line; raises `CalledProcessError` with what it said."
    options = [word for file in constraints for word in ("-c", file)]
    asked = f"{wheel}[{extra}]" if extra else str(wheel)
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "-q", "--report", str(report)]
    subprocess.run([*pip, *options, asked], check=True, capture_output=True, text=True)
    found = {p["metadata"]["name"].lower(): p["metadata"]["version"] for p in json.loads(report.read_text())["install"]}
    named = [
        f"{name} {found[name]}" for name in ("torch", "transformers", "gptqmodel", "nbdev", "numpy") if name in found
    ]
    return f"{len(found)} packages: {', '.join(named)}"


def main() -> int:
    "Resolve each extra; 1 when one cannot be had."
    parser = argparse.ArgumentParser(description="Ask pip whether each extra of the wheel can be had.")
    parser.add_argument("extras", nargs="*", help="which; every one when none is named")
    parser.add_argument("-c", dest="constraints", action="append", default=[], help="a file of constraints")
    args, failed = parser.parse_args(), 0
    with tempfile.TemporaryDirectory() as folder:
        wheel = build_wheel(Path(folder))
        for extra in args.extras or EXTRAS:
            start = time.monotonic()
            try:
                said = resolve(wheel, extra, args.constraints, Path(folder) / "report.json")
            except subprocess.CalledProcessError as e:
                failed, said = 1, f"CANNOT BE HAD\n{e.stderr[-2000:]}"
            print(f"llmops{f'[{extra}]' if extra else ''}: {said} ({time.monotonic() - start:.0f} s)", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
