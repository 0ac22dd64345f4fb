"""Seeded faults that the suite must catch: `python tests/mutants/run.py [NAME ...]`.

Each `*.patch` beside this file is one fault, a unified diff under a short header:

    Fault: what is wrong, in a sentence
    Tests: the files (or tests) that should catch it

The tree is copied, built and tested unharmed; then each fault is applied to the copy, the
extension rebuilt where C changed, the named tests run, and the fault taken out again. The run
fails if a fault survives, a patch does not apply, a tree does not build or import, or the
unharmed tree fails.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "demo", "*.so", "*.egg-info", "__pycache__", ".*_cache"
)
PASSED, FAILED = 0, 1  # pytest's exit codes; any other is an accident, not a verdict


@dataclass(frozen=True)
class Mutant:
    """One fault: its patch, and the tests that should catch it."""

    path: Path
    fault: str
    tests: list[str]
    touches_c: bool

    @property
    def name(self):
        return self.path.stem


def read(path):
    """Parse the header of a patch."""
    text = path.read_text()
    fields = dict(re.findall(r"^(Fault|Tests): (.+)$", text, flags=re.M))
    if set(fields) != {"Fault", "Tests"}:
        raise SystemExit(f"{path.name}: expected a 'Fault:' and a 'Tests:' line")
    touches_c = re.search(r"^\+\+\+ b/csrc/", text, flags=re.M) is not None
    return Mutant(path, fields["Fault"], shlex.split(fields["Tests"]), touches_c)


def call(tree, *command):
    """Run a command in the copied tree; (exit code, everything it printed)."""
    done = subprocess.run(
        command,
        cwd=tree,
        env=os.environ | {"LIGHTFORCING_NO_CUDA": "1"},  # no fault is in it; nvcc takes minutes
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def must(tree, what, *command):
    """Run a command that has to succeed."""
    code, output = call(tree, *command)
    if code:
        raise SystemExit(f"{what} failed:\n{output[-4000:]}")


def build(tree):
    """Compile the extension in place."""
    must(tree, "the build", sys.executable, "setup.py", "-q", "build_ext", "--inplace")


def test(tree, arguments):
    """Run pytest to the first failure; (exit code, name of what failed, seconds)."""
    start = time.monotonic()
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    code, output = call(tree, *command, *arguments)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, flags=re.M)
    if code not in (PASSED, FAILED) or (code == FAILED and not failed):
        raise SystemExit(f"pytest {shlex.join(arguments)} ended with {code}:\n{output[-4000:]}")
    return code, failed.group(1) if failed else "", time.monotonic() - start


def try_mutant(tree, mutant):
    """Apply, build, test, and restore; (what caught it or None, seconds)."""
    must(tree, f"{mutant.name}: git apply", "git", "apply", str(mutant.path))
    try:
        if mutant.touches_c:
            build(tree)
        must(tree, f"{mutant.name}: import", sys.executable, "-B", "-c", "import lightforcing")
        code, failed, seconds = test(tree, mutant.tests)
    finally:
        must(tree, f"{mutant.name}: git apply -R", "git", "apply", "-R", str(mutant.path))
    return (failed if code == FAILED else None), seconds


def main():
    """Run every mutant, or those named; exit 1 if one survives."""
    parser = argparse.ArgumentParser(description="Run the seeded faults against the suite.")
    parser.add_argument("names", nargs="*", help="stems of patches (default: all)")
    names = set(parser.parse_args().names)
    mutants = [m for m in map(read, sorted(HERE.glob("*.patch"))) if not names or m.name in names]
    if not mutants or names - {m.name for m in mutants}:
        raise SystemExit(f"no such patch: {', '.join(sorted(names)) or HERE}")

    with tempfile.TemporaryDirectory(prefix="lightforcing-mutants-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=NOT_COPIED)
        must(tree, "git init", "git", "init", "-q")  # so that git apply is at home here
        for mutant in mutants:
            must(tree, f"{mutant.name}: git apply", "git", "apply", "--check", str(mutant.path))
        build(tree)
        code, failed, seconds = test(tree, sorted({t for m in mutants for t in m.tests}))
        if code != PASSED:
            raise SystemExit(f"the unharmed tree fails {failed}; a mutant would prove nothing")
        print(f"{'mutant':<24} {'verdict':<9} {'s':>5}  caught by")
        print(f"{'(none)':<24} {'passes':<9} {seconds:5.1f}", flush=True)

        survivors = []
        rebuild = False
        for mutant in mutants:
            if rebuild and not mutant.touches_c:
                build(tree)
            caught, seconds = try_mutant(tree, mutant)
            rebuild = mutant.touches_c
            verdict = "caught" if caught else "SURVIVED"
            print(
                f"{mutant.name:<24} {verdict:<9} {seconds:5.1f}  {caught or mutant.fault}",
                flush=True,
            )
            if not caught:
                survivors.append(mutant.name)
    print(f"\n{len(mutants) - len(survivors)} of {len(mutants)} caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
