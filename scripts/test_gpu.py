"""Runs every GPU test, then the same kernels under compute-sanitizer, and keeps the raw logs.

    python scripts/test_gpu.py [--only tests,fuzz,memcheck,racecheck,synccheck,cpu]
                               [--out FOLDER] [--limit S]

tests      every tests/test_gpu_*.py; those of attention run the portable and the Hopper kernel
fuzz       attention with random pauses wherever warps hand over, built here, bit for bit against
           the ordinary build
memcheck   the operator tests under memcheck, without torch's caching allocator, so that each
           tensor is an allocation of its own; first planted faults, which must be reported
racecheck  small cases of every kernel under racecheck
synccheck  small cases of attention under synccheck
cpu        the operators' CPU tests, on every instruction set that this processor has

memcheck does not see what bulk copies (TMA) read: one more planted fault shows that, and
tests/test_gpu_attend_inputs.py covers it with guarded memory.

All run side by side: the GPU is shared, cores are many. Where other work shares them, too, run the
sanitizers by themselves: --only memcheck takes 45 s of an H100. summary.txt, summary.json and, for
each part, a log of all that its processes printed go to benchmarks/results/gpu-<card>, or to
FOLDER. The exit status is 1 if a test failed, a sanitizer reported anything or said no sum, a
process was still running after --limit seconds (500, of the whole run) or passed no test at all. A
skipped test is counted as skipped, never as passed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import child

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("tests", "fuzz", "memcheck", "racecheck", "synccheck", "cpu")
SANITIZERS = ("memcheck", "racecheck", "synccheck")
KERNEL = re.compile(r"__global__\s[^;{}]*?\b(\w+_kernel)\s*\(", re.S)
REPORTED = 86  # exit status by which compute-sanitizer says that it reported something
# Seconds that compute-sanitizer gives Python to start. Its default was too short where many started
# at once: it gave two of nine up ("No attachable process found"), and they never ended.
ATTACH = 120

FUZZ = "test_gpu_fuzz.py"
CPU_TESTS = [f"tests/test_{name}.py" for name in ("compress", "select", "attend", "blocks", "cag")]

# What runs under each tool, a process each: a name, a regular expression of test ids. "attend X"
# takes only the tests of kernel X.
ATTEND_SMALL = (
    r"test_gpu_attend\.py::test_(lists_of_every_length\[.*(60-7|78-6|880-3).*bfloat16"
    r"|dense_of_any_length\[.*(1-500|300-1000|257-64).*bfloat16"
    r"|whole_waves_and_halves\[.*-[15]\])"
)
TABLES = {
    "memcheck": {
        "attend portable": r"test_gpu_attend\.py::",
        "attend sm90": r"test_gpu_attend\.py::",
        "inputs portable": r"test_gpu_attend_inputs\.py::",
        "inputs sm90": r"test_gpu_attend_inputs\.py::",
        "block sizes": r"test_gpu_attend_inputs\.py::test_(every_block_size|dense_with_heads)",
        "select frames": r"test_gpu_select\.py::test_(frame_sizes|block_sizes|budgets)",
        "select others": r"test_gpu_select\.py::(?!test_(frame_sizes|block_sizes|budgets))",
        "compress": r"test_gpu_compress\.py::",
        # Capture and flat memory need the caching allocator; the compiler's kernels are not ours.
        "torch": r"test_gpu_torch\.py::(?!.*(graph|memory|compiled|opcheck))",
    },
    "racecheck": {
        "attend portable": ATTEND_SMALL,
        "attend sm90": ATTEND_SMALL,
        "compress": r"test_gpu_compress\.py::test_bits_of_the_cpu\[(37|60|78)-.*(bfloat16|float32)",
        "select": r"test_gpu_select\.py::test_(frame_sizes\[.*(-|\[)(60|78)(-|\])"
        r"|a_nan_key_ranks_last|given_means_give_the_same_bits)",
    },
    "synccheck": {
        "attend portable": ATTEND_SMALL,
        "attend sm90": ATTEND_SMALL,
    },
}

# An operator on a tensor whose memory was cut behind its back: memcheck must see it. So large that
# what lies behind the cut tensor cannot all be other allocations.
PLANTED = """
import sys, torch, lightforcing as lf
from lightforcing import _core
options = dict(dtype=torch.bfloat16, device="cuda")
what, kernel = (sys.argv[1].split() + ["auto"])[:2]
q, k, v = (torch.zeros(1, n, 2, 128, **options) for n in (8192, 1024, 1024))
out, blocks = torch.zeros_like(q), None
if what == "lists":
    indices = torch.zeros(1, 2, 64, 1024, dtype=torch.int32, device="cuda")
    counts = torch.full((1, 2, 64), 1024, dtype=torch.int32, device="cuda")
    blocks = lf.BlockList(indices, counts, 8192, 1024, 128, 128, 64)
cut = {"out": out, "lists": blocks and indices}.get(what, k)
cut.untyped_storage().resize_(4096)
torch.cuda.synchronize()
if what == "compress":
    lf.compress(k, 64)
elif what == "select":
    lf.select_blocks(q[:, :256], k, frame_tokens=128, sparsity=0.5)
else:
    _core.force_kernel(kernel)
    lf.block_sparse_attention(q, k, v, blocks, out=out)
torch.cuda.synchronize()
"""
PLANTS = ("compress", "select", "out portable", "lists portable", "out sm90", "lists sm90")
UNSEEN = "keys sm90"  # read by bulk copies alone


@dataclass
class Run:
    """One process and what came of it."""

    part: str
    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    reports: int | None = None  # of the sanitizer; None: it said no sum
    planted: bool = False  # a fault that must be reported
    unseen: bool = False  # a planted fault that the tool is known not to see
    status: int | None = None  # exit status; None: out of time, or never begun
    skips: dict[str, int] = field(default_factory=dict)
    torn: str | None = None  # why pytest's XML file could not be read

    @property
    def good(self):
        """Did it show what it is there to show?"""
        if self.unseen:
            return self.reports is not None
        if self.planted:
            return bool(self.reports)
        silent = self.reports == (0 if self.part in SANITIZERS else None)
        return self.status == 0 and self.failed == 0 and self.passed > 0 and silent

    def __str__(self):
        """One line."""
        text = f"{self.part:<10} {self.name:<18} "
        if self.planted:
            text += f"planted fault, {self.reports} reports"
            text += " (guarded memory in the tests stands in)" if self.unseen else ""
        else:
            text += f"{self.passed:>5} passed {self.failed:>4} failed {self.skipped:>4} skipped"
            text += "" if self.reports is None else f" {self.reports:>3} reports"
        text += f" {self.seconds:6.0f} s"
        if self.part in SANITIZERS and self.reports is None:
            text += "  no sum of reports"
        if self.status is None:
            text += "  no end"
        if self.torn:
            text += f"  torn results ({self.torn})"
        return text + ("" if self.good else "  <- NOT GOOD")


def output(*command):
    """What a command prints, or an empty string."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def facts():
    """Card, driver, versions and commit, asked in another process."""
    program = (
        "import json, torch, lightforcing as lf; i = lf.info(); print(json.dumps({"
        "'card': torch.cuda.get_device_name() if torch.cuda.is_available() else None, "
        "'chip': torch.cuda.get_device_capability() if torch.cuda.is_available() else None, "
        "'torch': torch.__version__, 'cuda': torch.version.cuda, 'isas': i['isas'], "
        "'embedded': i['cuda_archs'], 'cuda_built': bool(i['cuda_built']), "
        "'lightforcing': lf.__version__}))"
    )
    found = json.loads(output(sys.executable, "-c", program) or "{}")
    query = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    head = os.environ.get("LIGHTFORCING_COMMIT") or output("git", "rev-parse", "--short=10", "HEAD")
    if not os.environ.get("LIGHTFORCING_COMMIT") and output("git", "status", "--porcelain", "-uno"):
        head += "+"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": head or None,
        "driver": query.partition("\n")[0] or None,
        "python": sys.version.split()[0],
        **found,
    }


def kernels():
    """Names of all kernels in csrc/cuda, for the sanitizer's filter."""
    text = "\n".join(p.read_text() for p in (ROOT / "csrc" / "cuda").glob("*.cu*"))
    return sorted(set(KERNEL.findall(text)))


def sanitizer(tool):
    """The command in front of Python, None without the tool.

    API errors are left to the tests: each raises there.
    """
    program = shutil.which("compute-sanitizer")
    for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if not program and root and (Path(root) / "bin" / "compute-sanitizer").is_file():
            program = str(Path(root) / "bin" / "compute-sanitizer")
    if not program:
        return None
    command = [program, "--tool", tool, "--error-exitcode", str(REPORTED), "--print-limit", "20"]
    command += ["--target-processes", "application-only", "--launch-timeout", str(ATTACH)]
    if tool == "memcheck":
        command += ["--report-api-errors", "no"]
    elif tool == "racecheck":
        command += ["--racecheck-report", "all"]
    for name in kernels():
        command += ["--kernel-name", f"kns={name}"]
    return command


def reports(text):
    """How many errors or hazards the sanitizer's last line tells; None without that line."""
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    return int(found[-1]) if found else None


def counts(path, run):
    """Fill in what pytest's XML file says."""
    if not path.exists():
        return
    try:
        cases = list(xml.parse(path).getroot().iter("testcase"))
    except xml.ParseError as error:  # pytest was killed while it wrote
        run.failed += 1
        run.torn = str(error)
        return
    skips = Counter()
    for case in cases:
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            run.failed += 1
        elif skip is not None:
            run.skipped += 1
            skips[skip.get("message", "")] += 1
        else:
            run.passed += 1
    run.skips = dict(skips)
    path.unlink()


def execute(run, command, out, deadline, environment=None):
    """Run one process, its output to a log; fills `run`. Without a command: it could not begin."""
    stem = f"{run.part}-{run.name}".replace(" ", "-")
    log, result = out / f"{stem}.log", out / f"{stem}.xml"
    if isinstance(command, str):
        return finish(run, command, log)
    if "pytest" in command:
        command = [*command, f"--junitxml={result}"]
    began = time.monotonic()
    environment = {"PYTHONPATH": str(ROOT), **(environment or {})}
    run.status, text = child.run(command, ROOT, environment, max(1, deadline - began))
    run.seconds = time.monotonic() - began
    counts(result, run)
    if run.part in SANITIZERS:
        run.reports = reports(text)
        if run.status == REPORTED and not run.reports:
            run.reports = 1
    shown = " ".join(c if len(c) < 200 else f"{c[:60]}..." for c in command[:60])
    return finish(run, f"$ {shown}\n{text}", log)


def finish(run, text, log):
    """Write the log of a process, and tell how it ended."""
    for secret, name in ((f"{ROOT}/", ""), (str(Path.home()), "~"), (sys.prefix, "python")):
        text = text.replace(secret, name)
    log.write_text(f"==== {run}\n{text.rstrip()}\n\n")
    print(run, flush=True)
    if not run.good:
        print("\n".join(text.splitlines()[-25:]), flush=True)
    return run


def collected():
    """Ids of all GPU tests."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-o", "addopts=-q", *gpu_tests()]
    status, text = child.run(command, ROOT, {"PYTHONPATH": str(ROOT)}, 120)
    ids = [line for line in text.splitlines() if "::" in line]
    if status or not ids:
        raise SystemExit(f"the GPU tests could not be collected:\n{text}")
    return ids


def gpu_tests():
    """The files of tests, the one with pauses last."""
    found = sorted(p.name for p in (ROOT / "tests").glob("test_gpu_*.py"))
    return [f"tests/{name}" for name in sorted(found, key=lambda name: name == FUZZ)]


def pytest(*arguments):
    """The command of one pytest process."""
    plain = ("-p", "no:cacheprovider", "-ra", "--durations=10")
    return [sys.executable, "-m", "pytest", *plain, *arguments]


def sanitizer_jobs(tool, ids, hopper):
    """Of one tool: runs, commands and environment."""
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
    front, jobs = sanitizer(tool), []
    if not front:
        return [(Run(tool, "(all)"), "compute-sanitizer is not on PATH nor in CUDA_HOME/bin", {})]
    for name, pattern in TABLES[tool].items():
        kernel = name.split()[1] if name.endswith((" sm90", " portable")) else ""
        chosen = [i for i in ids if re.search(pattern, i) and kernel in i]
        command = [*front, *pytest(*chosen)] if chosen else f"no test is called {pattern}"
        jobs.append((Run(tool, name), command))
    if tool == "memcheck":
        for name in (*PLANTS, UNSEEN):
            run = Run(tool, f"planted {name}", planted=True, unseen=name == UNSEEN)
            jobs.append((run, [*front, sys.executable, "-c", PLANTED, name]))
    return [(*job, environment) for job in jobs if hopper or "sm90" not in job[0].name]


def fuzz(folder, archs, out, deadline):
    """Builds a copy of the tree with pauses; the tests find its binary by an environment name."""
    tree, run = Path(folder) / "tree", Run("fuzz", "pauses")
    left_out = shutil.ignore_patterns("lib*", "sanitize", "*.so", "__pycache__")
    for name in ("csrc", "lightforcing", "build"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=left_out)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tree / name)
    command = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    environment = {"LIGHTFORCING_FUZZ": "1", "LIGHTFORCING_CUDA_ARCHS": " ".join(archs)}
    status, text = child.run(command, tree, environment, max(1, deadline - time.monotonic()))
    binaries = [str(p) for p in (tree / "lightforcing").glob("_core*.so")]
    if status != 0 or not binaries:
        return execute(run, f"the build with pauses failed:\n{text}", out, deadline)
    environment = {"LIGHTFORCING_FUZZ_BINARY": binaries[0]}
    return execute(run, pytest(f"tests/{FUZZ}"), out, deadline, environment)


def run_parts(parts, out, limit, machine):
    """All runs of the chosen parts, those that take longest first."""
    deadline, jobs, hopper = time.monotonic() + limit, [], machine.get("chip") == [9, 0]
    with tempfile.TemporaryDirectory(prefix="lightforcing-fuzz-") as folder:
        if set(parts) & set(SANITIZERS):
            ids = collected()
            for tool in SANITIZERS:
                jobs += sanitizer_jobs(tool, ids, hopper) if tool in parts else []
        if "tests" in parts:
            for file in gpu_tests()[:-1]:
                name = Path(file).stem.removeprefix("test_gpu_")
                jobs.append((Run("tests", name), pytest(file), {}))
        if "cpu" in parts:
            quiet = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "4"}
            jobs.append((Run("cpu", "operators"), pytest(*CPU_TESTS), quiet))
        with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) * 3 // 4)) as pool:
            waiting = []
            if "fuzz" in parts:
                waiting.append(pool.submit(fuzz, folder, machine["embedded"], out, deadline))
            waiting += [pool.submit(execute, r, c, out, deadline, e) for r, c, e in jobs]
            try:
                return [job.result() for job in waiting]
            except BaseException:  # Ctrl-C comes to this thread alone
                pool.shutdown(wait=False, cancel_futures=True)
                child.stop()
                raise


def join(parts, out):
    """One log for each part, of its processes' logs."""
    for part in parts:
        logs = sorted(out.glob(f"{part}-*.log"))
        (out / f"{part}.log").write_text("".join(log.read_text() for log in logs))
        for log in logs:
            log.unlink()


def summary(machine, runs):
    """The text that is kept."""
    lines = [", ".join(f"{name} {value}" for name, value in machine.items())]
    lines += [str(run) for run in runs]
    skips = Counter()
    for run in runs:
        skips.update(run.skips)
    lines += [f"skipped {n}: {reason}" for reason, n in skips.items()]
    if any(r.part == "cpu" for r in runs) and "avx512" not in machine.get("isas", []):
        lines.append("the CPU tests ran without AVX-512: this processor has none")
    total = [sum(getattr(r, name) for r in runs) for name in ("passed", "failed", "skipped")]
    lines.append("{} passed, {} failed, {} skipped".format(*total))
    bad = [f"{r.part} {r.name}" for r in runs if not r.good]
    lines.append("all good" if runs and not bad else f"NOT GOOD: {', '.join(bad) or 'nothing ran'}")
    return "\n".join(lines) + "\n"


def main(argv=None):
    """Run the parts; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma between them")
    parser.add_argument("--out", type=Path, help="folder of logs and summary")
    parser.add_argument("--limit", type=float, default=500, help="seconds of the whole run")
    options = parser.parse_args(argv)
    parts = options.only.split(",")
    if unknown := [p for p in parts if p not in PARTS]:
        parser.error(f"--only: expected some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    if not options.limit > 0:
        parser.error(f"--limit: expected seconds above 0, got {options.limit:g}")
    if options.out and options.out.exists() and not options.out.is_dir():
        parser.error(f"--out: expected a folder, got the file {options.out}")
    machine = facts()
    if parts != ["cpu"] and not (machine.get("card") and machine.get("cuda_built")):
        print("no GPU, or a build without the CUDA half; --only cpu runs without")
        return 1
    card = re.sub(r"[^a-z0-9]+", "-", (machine.get("card") or "none").lower())
    card = card.removeprefix("nvidia-").strip("-")
    out = options.out or ROOT / "benchmarks" / "results" / f"gpu-{card}"
    out.mkdir(parents=True, exist_ok=True)
    runs = run_parts(parts, out.resolve(), options.limit, machine)
    text = summary(machine, runs)
    (out / "summary.txt").write_text(text)
    record = {"machine": machine, "runs": [asdict(r) | {"good": r.good} for r in runs]}
    (out / "summary.json").write_text(json.dumps(record, indent=1) + "\n")
    join(parts, out)
    print(text, end="")
    return int(not runs or any(not r.good for r in runs))


if __name__ == "__main__":
    sys.exit(main())
