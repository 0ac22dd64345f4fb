"""Seeded faults that the suite must catch.

    python tests/mutants/run.py [--gpu] [--out FOLDER] [NAME ...]

Each `*.patch` beside this file, or in gpu/ those of CUDA kernels, is one fault, a unified diff
under a short header:

    Fault: what is wrong, in a sentence
    Tests: the files (or tests) that should catch it
    Build: environment of the build, such as LIGHTFORCING_FUZZ=1 (may be left out)
    Hangs: why its tests may never end (may be left out)

The tree is copied, built and tested unharmed; then each fault is applied to a copy, the extension
rebuilt, and the named tests run. The run fails if a fault survives, a patch does not apply, a tree
does not build or import, or the unharmed tree fails or passes no test. With --out the table and all
that the tests printed are written to that folder too.

Without --gpu the trees are built without CUDA and faults follow each other in one copy. With it
there are as many copies as faults, side by side, built for Hopper, which the run needs; a test run
that does not end within LIMIT is killed, and counts as caught only where the patch has a line
`Hangs:`, since anything else may just have been slow.
"""

import argparse
import datetime
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import child  # noqa: E402

NOT_COPIED = shutil.ignore_patterns(
    *".git .venv .gpu build dist demo *.so *.egg-info __pycache__ .*_cache".split()
)
PASSED, FAILED = 0, 1  # pytest's exit codes; any other is an accident, not a verdict
LIMIT = 90  # seconds of the tests of a fault on the GPU; the unharmed tree takes 25
BUILD_LIMIT = 300  # on the GPU's machine
GPU_TESTS_AT_ONCE = 4


@dataclass(frozen=True)
class Mutant:
    """One fault: its patch, the tests that should catch it, the environment of its build."""

    path: Path | None
    fault: str
    tests: tuple[str, ...]
    build: tuple[str, ...]
    touches_c: bool
    may_hang: bool = False

    @property
    def name(self):
        return self.path.stem if self.path else " ".join(("(none)", *self.build))


@dataclass(frozen=True)
class Verdict:
    """What the tests of one tree said."""

    passed: int
    caught: str  # the test that failed; empty: none
    seconds: float
    output: str
    ended: bool = True


def read(path):
    """Parse the header of a patch."""
    text = path.read_text()
    fields = dict(re.findall(r"^(Fault|Tests|Build|Hangs): (.+)$", text, flags=re.M))
    if not {"Fault", "Tests"} <= set(fields):
        raise SystemExit(f"{path.name}: expected a 'Fault:' and a 'Tests:' line")
    touches_c = re.search(r"^\+\+\+ b/csrc/", text, flags=re.M) is not None
    tests, build = (tuple(shlex.split(fields.get(x, ""))) for x in ("Tests", "Build"))
    return Mutant(path, fields["Fault"], tests, build, touches_c, "Hangs" in fields)


class Tree:
    """A copy of the project, in which commands run."""

    def __init__(self, path, gpu):
        """Copies; with `gpu` also the objects of the last build: setup.py knows them by content."""
        self.path, self.gpu = path, gpu
        shutil.copytree(ROOT, path, ignore=NOT_COPIED)
        for objects in ROOT.glob("build/temp*/cuda") if gpu else ():
            shutil.copytree(objects, path / objects.relative_to(ROOT))
        self.must("git init", "git", "init", "-q")  # so that git apply is at home here

    def call(self, *command, build=(), limit=None):
        """Run a command; (exit code, None when out of time; everything it printed)."""
        # The CPU's faults need no CUDA: nvcc takes minutes.
        ours = {"LIGHTFORCING_CUDA_ARCHS": "90a"} if self.gpu else {"LIGHTFORCING_NO_CUDA": "1"}
        ours |= {"PYTHONPATH": str(self.path)} | dict(x.split("=", 1) for x in build)
        return child.run(command, self.path, ours, limit)

    def must(self, what, *command, build=()):
        """Run a command that has to succeed."""
        code, output = self.call(*command, build=build, limit=BUILD_LIMIT if self.gpu else None)
        if code != 0:
            raise RuntimeError(f"{what} failed:\n{output[-4000:]}")

    def apply(self, mutant, *options):
        """Put the fault in, or with -R take it out."""
        self.must(f"{mutant.name}: git apply", "git", "apply", *options, str(mutant.path))

    def build(self, mutant=None):
        """Compile the extension in place, and import it."""
        environment = mutant.build if mutant else ()
        what, python = f"{mutant.name if mutant else 'the unharmed tree'}: ", sys.executable
        command = (python, "setup.py", "-q", "build_ext", "--inplace")
        self.must(what + "build", *command, build=environment)
        self.must(what + "import", python, "-B", "-c", "import lightforcing")

    def test(self, arguments):
        """Run pytest to the first failure."""
        start = time.monotonic()
        command = [sys.executable, "-B", "-m", "pytest", "-x", "-p", "no:cacheprovider"]
        code, output = self.call(*command, *arguments, limit=LIMIT if self.gpu else None)
        seconds = time.monotonic() - start
        if code is None:
            return Verdict(0, "", seconds, output, ended=False)
        failed = re.search(r"^FAILED (\S+)", output, flags=re.M)
        out_of_memory = "OutOfMemoryError" in output  # of a GPU that others use: no verdict
        if code not in (PASSED, FAILED) or (code == FAILED and not failed) or out_of_memory:
            raise RuntimeError(
                f"pytest {shlex.join(arguments)} ended with {code}:\n{output[-4000:]}"
            )
        passed = re.search(r"\b(\d+) passed", output)
        caught = failed.group(1) if code == FAILED else ""
        return Verdict(int(passed.group(1)) if passed else 0, caught, seconds, output)


class Table:
    """Prints a line for each tree, keeps what its tests printed, and counts what went wrong."""

    def __init__(self, out=None):
        """The head of the table, and where to write both."""
        self.out, self.wrong, self.count, self.caught = out, 0, 0, 0
        for name in ("mutants.txt", "mutants.log") if out else ():
            (out / name).write_text("")
        self.say(f"{'mutant':<32} {'verdict':<9} {'s':>5}  caught by")

    def say(self, line, output=None):
        """A line of the table, and what lies behind it."""
        print(line, flush=True)
        if self.out:
            with (self.out / "mutants.txt").open("a") as file:
                file.write(f"{line}\n")
            with (self.out / "mutants.log").open("a") as file:
                file.write(f"==== {line}\n{output}\n" if output else "")

    def unharmed(self, mutant, verdict):
        """The tree without a fault, which has to pass something and fail nothing."""
        good = verdict.ended and verdict.passed and not verdict.caught
        why = verdict.caught or ("no test passed" if verdict.ended else f"no end in {LIMIT} s")
        word, told = ("passes", f"{verdict.passed} tests") if good else ("FAILS", why)
        self.say(f"{mutant.name:<32} {word:<9} {verdict.seconds:5.1f}  {told}", verdict.output)
        self.wrong += not good
        return good

    def harmed(self, mutant, verdict):
        """A tree with a fault."""
        word, told, good = "SURVIVED", mutant.fault, False
        if verdict.caught:
            word, told, good = "caught", verdict.caught, True
        elif not verdict.ended:
            good = mutant.may_hang
            word, told = "caught" if good else "NO END", f"no end within {LIMIT} s"
        self.say(f"{mutant.name:<32} {word:<9} {verdict.seconds:5.1f}  {told}", verdict.output)
        self.count += 1
        self.caught += good
        self.wrong += not good

    def broken(self, mutant, error):
        """A tree that came to no verdict; it loses nobody else's."""
        self.say(f"{mutant.name:<32} {'BROKEN':<9} {'':5}  {mutant.fault}", str(error))
        print(error, flush=True)
        self.count, self.wrong = self.count + bool(mutant.path), self.wrong + 1

    def end(self):
        """Prints the sum; the exit status."""
        self.say(f"\n{self.caught} of {self.count} caught")
        return int(self.wrong > 0)


def united(mutants, build=()):
    """The unharmed tree, with the tests of all these faults."""
    tests = sorted({t for m in mutants for t in m.tests})
    return Mutant(None, "", tuple(tests), build, False)


def run_in_turn(mutants, folder, out):
    """All faults in one copy, one after the other."""
    tree, table = Tree(folder / "tree", gpu=False), Table(out)
    table.say(f"the CPU's, commit {git_head()}, {datetime.date.today().isoformat()}")
    for mutant in mutants:
        tree.apply(mutant, "--check")
    tree.build()
    if not table.unharmed(united(mutants), tree.test(united(mutants).tests)):
        raise RuntimeError("the unharmed tree fails; a mutant would prove nothing")
    rebuild = False
    for mutant in mutants:
        if rebuild and not mutant.touches_c:
            tree.build()
        tree.apply(mutant)
        try:
            if mutant.touches_c:
                tree.build(mutant)
            table.harmed(mutant, tree.test(mutant.tests))
        finally:
            tree.apply(mutant, "-R")
        rebuild = mutant.touches_c
    return table.end()


def run_on_gpu(mutants, folder, out):
    """Each fault in a copy of its own, all built at once; so are the unharmed trees they need."""
    name, _, driver = nvidia_smi().partition(", ")
    commit = os.environ.get("LIGHTFORCING_COMMIT") or git_head()
    table = Table(out)
    table.say(f"{name}, driver {driver}, commit {commit}, {datetime.date.today().isoformat()}")
    # One unharmed tree for each way to build, with the tests of the faults that are built so.
    ways = sorted({m.build for m in mutants})
    whole = [united([m for m in mutants if m.build == way], way) for way in ways]
    pool, turns = ThreadPoolExecutor(os.cpu_count()), ThreadPoolExecutor(GPU_TESTS_AT_ONCE)

    def attempt(number, mutant):
        tree = Tree(folder / f"tree{number}", gpu=True)
        if mutant.path:
            tree.apply(mutant)
        tree.build(mutant)
        return turns.submit(tree.test, mutant.tests).result()

    with pool, turns:
        waiting = [pool.submit(attempt, n, m) for n, m in enumerate([*whole, *mutants])]
        try:
            for mutant, job in zip([*whole, *mutants], waiting, strict=True):
                try:
                    (table.harmed if mutant.path else table.unharmed)(mutant, job.result())
                except (RuntimeError, OSError) as error:
                    table.broken(mutant, error)
        except BaseException:  # Ctrl-C comes to this thread alone
            for threads in (pool, turns):
                threads.shutdown(wait=False, cancel_futures=True)
            child.stop()
            raise
    return table.end()


def nvidia_smi():
    """Card and driver of the first GPU; refuses to go on without a Hopper one."""
    query = ("nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader")
    try:
        said = subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0]
    except OSError:
        said = ""
    found, _, capability = said.rpartition(", ")
    if capability != "9.0":
        raise RuntimeError(f"--gpu needs a GPU of compute capability 9.0, found {said or 'none'}")
    return found


def git_head():
    """The commit of this tree, if git knows."""
    command = ("git", "rev-parse", "--short=10", "HEAD")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main():
    """Run every mutant, or those named; exit 1 if one survives."""
    parser = argparse.ArgumentParser(description="Run the seeded faults against the suite.")
    parser.add_argument("names", nargs="*", help="stems of patches (default: all)")
    parser.add_argument("--gpu", action="store_true", help="the faults of CUDA kernels")
    parser.add_argument("--out", type=Path, help="folder of the table and all output")
    options = parser.parse_args()
    if options.out and options.out.exists() and not options.out.is_dir():
        parser.error(f"--out: expected a folder, got the file {options.out}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    names, where = set(options.names), HERE / "gpu" if options.gpu else HERE
    mutants = [m for m in map(read, sorted(where.glob("*.patch"))) if not names or m.name in names]
    if not mutants or names - {m.name for m in mutants}:
        parser.error(f"no such patch: {', '.join(sorted(names)) or where}")
    with tempfile.TemporaryDirectory(prefix="lightforcing-mutants-") as folder:
        try:
            return (run_on_gpu if options.gpu else run_in_turn)(mutants, Path(folder), options.out)
        except RuntimeError as error:
            raise SystemExit(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
