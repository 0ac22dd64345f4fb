"""Builds the CPU half with AddressSanitizer and UBSan in a copy of the tree and runs the suite.

The copy lives in build/sanitize, so the normal build stays as it is. The raw output, with the
counts, goes to benchmarks/results/sanitize-<date>.log; the exit code is pytest's. Leak detection
is off, because CPython and torch keep memory until exit on purpose: tests/test_leaks.py counts
references and resident memory instead. The tests in test_gpu_*.py need a GPU and the CUDA half,
which has a checker of its own (compute-sanitizer); they are not collected. Arguments are handed
to pytest.
"""

import datetime
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "sanitize"
LEFT_OUT = (
    ".git",
    ".venv",
    "build",
    "dist",
    "demo",
    "*.so",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
)


def output(*command):
    """What a command prints, or an empty string."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def library(name):
    """The compiler's own copy of a runtime library."""
    found = output("gcc", f"-print-file-name={name}")
    if not os.path.isabs(found):
        raise SystemExit(f"gcc has no {name}: install the sanitizer runtimes of your compiler")
    return found


def build(environment):
    """A sanitized extension in the copy; the symbols prove that it is one."""
    shutil.rmtree(COPY, ignore_errors=True)
    shutil.copytree(ROOT, COPY, ignore=shutil.ignore_patterns(*LEFT_OUT))
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=COPY, check=True, env=environment)
    (binary,) = (COPY / "lightforcing").glob("_core*.so")
    symbols = output("nm", "-D", str(binary))
    for needed in ("__asan_report_load4", "__ubsan_handle_mul_overflow"):
        if needed not in symbols:
            raise SystemExit(f"{binary}: expected the symbol {needed}, the build is not sanitized")


def main():
    """Build, run, log."""
    environment = dict(os.environ, LIGHTFORCING_SANITIZE="1", LIGHTFORCING_NO_CUDA="1")
    # CPython's own flags may hold -fwrapv, which would switch the overflow checks off.
    environment["CFLAGS"] = f"{os.environ.get('CFLAGS', '')} -fno-wrapv".strip()
    build(environment)
    # The C++ library goes first into the process too: torch throws exceptions, and the
    # sanitizer finds the real throw function only in libraries that were there at start-up.
    preload = [library("libasan.so"), library("libubsan.so"), library("libstdc++.so")]
    environment |= {
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONMALLOC": "malloc",  # small Python objects too come from the watched allocator
        "PYTHONPATH": str(COPY),
    }
    command = [sys.executable, "-m", "pytest", "tests", "--ignore-glob=*test_gpu_*", "-ra"]
    command += ["-p", "no:cacheprovider", *sys.argv[1:]]
    log = ROOT / "benchmarks" / "results" / f"sanitize-{datetime.date.today()}.log"
    state = "clean" if not output("git", "status", "--porcelain", "-uno") else "modified"
    with log.open("w") as file:

        def say(text):
            print(text, end="", flush=True)
            file.write(text.replace(str(COPY) + "/", "").replace(str(ROOT) + "/", ""))

        say(f"commit {output('git', 'rev-parse', '--short', 'HEAD')} ({state} tree)\n")
        say(f"{output('gcc', '--version').splitlines()[0]}; Python {sys.version.split()[0]}\n")
        say("built with -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-wrapv\n")
        say(f"ASAN_OPTIONS={environment['ASAN_OPTIONS']}\n")
        say(f"UBSAN_OPTIONS={environment['UBSAN_OPTIONS']} PYTHONMALLOC=malloc\n")
        say(f"$ python {' '.join(command[1:])}\n")
        run = subprocess.Popen(
            command,
            cwd=COPY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        for line in run.stdout:
            say(line)
        code = run.wait()
        say(f"exit code {code}\n")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
