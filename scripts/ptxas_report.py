"""What ptxas said of every kernel: registers, spills, stack, shared memory. Fails on a bad line.

    python scripts/ptxas_report.py [--check] [FOLDER ...]

Reads the logs that setup.py leaves in build/temp*/cuda (or those in the given folders) and prints
one line for each kernel and chip. The exit status is 1 if a kernel spills, has a stack frame that
ALLOWED does not excuse, if ptxas serialised a wgmma or ignored a setmaxnreg, or if no log is there.
With --check only bad lines are printed, and a build without CUDA, which has no log, is fine.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Kernels that may have a stack frame: a pattern of the demangled name -> the reason.
ALLOWED: dict[str, str] = {}

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
FRAME = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)  # fmt: skip
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
# Such as C7508 (setmaxnreg ignored) and C7510 (wgmma serialized).
BAD = re.compile(r"wgmma.*seriali[sz]ed|seriali[sz]\w* .*wgmma|setmaxnreg.*ignored", re.I)


@dataclass
class Kernel:
    """One entry function for one chip."""

    source: str
    name: str
    chip: str
    registers: int = 0
    shared: int = 0  # static; dynamic shared memory is not known to ptxas
    stack: int = 0
    spill: int = 0
    faults: list[str] = field(default_factory=list)


def read(path):
    """The kernels of one log, and its bad lines."""
    kernels, bad, current = [], [], None
    for line in path.read_text(errors="replace").splitlines():
        if BAD.search(line):
            bad.append(f"{path.name}: {line.strip()}")
        if found := ENTRY.search(line):
            current = Kernel(path.name.removesuffix(".ptxas.log"), *found.groups())
            kernels.append(current)
        elif current is None:
            continue
        elif found := FRAME.search(line):
            # Functions that were not inlined have frames of their own: they count for the kernel.
            stack, stores, loads = map(int, found.groups())
            current.stack = max(current.stack, stack)
            current.spill += stores + loads
        elif found := USED.search(line):
            current.registers = int(found[1])
            shared = SHARED.search(line)
            current.shared = int(shared[1]) if shared else 0
    return kernels, bad


def demangled(names):
    """Readable names, as far as c++filt is there."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if not tool or not names:
        return list(names)
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True)
    lines = done.stdout.splitlines()
    return lines if len(lines) == len(names) else list(names)


def shortened(name):
    """Without the arguments and the anonymous namespaces."""
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|\blf::", "", name)
    name = re.sub(r"^void ", "", name)
    depth, end = 0, len(name)
    for i, letter in enumerate(name):
        depth += letter == "<"
        depth -= letter == ">"
        if letter == "(" and depth == 0 and i > 0:
            end = i
            break
    return name[:end]


def judge(kernel):
    """Adds what is wrong with a kernel."""
    if kernel.spill:
        kernel.faults.append(f"spills {kernel.spill} bytes")
    if kernel.stack and not any(re.search(p, kernel.name) for p in ALLOWED):
        kernel.faults.append(f"stack frame of {kernel.stack} bytes")


def folders():
    """Where the newest build of setup.py left its logs."""
    found = [p for p in ROOT.glob("build/temp*/cuda") if any(p.glob("*.ptxas.log"))]
    return (
        [max(found, key=lambda p: max(x.stat().st_mtime for x in p.glob("*.ptxas.log")))]
        if (found)
        else []
    )


def main(argv=None):
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--check", action="store_true", help="print what is wrong, nothing else")
    options = parser.parse_args(argv)
    logs = [p for f in options.folders or folders() for p in sorted(f.glob("*.ptxas.log"))]
    kernels, bad = [], []
    for log in logs:
        found, lines = read(log)
        kernels += found
        bad += lines
    if not kernels and options.check:
        return 0
    if not kernels:
        print("no ptxas log with a kernel found: build with nvcc first")
        return 1
    for kernel, name in zip(kernels, demangled([k.name for k in kernels]), strict=True):
        kernel.name = shortened(name)
        judge(kernel)
    if not options.check:
        print(f"{'source':<14} {'chip':<8} registers  spill  stack  shared  kernel")
    for k in sorted(kernels, key=lambda k: (k.source, k.name, k.chip)):
        line = (
            f"{k.source:<14} {k.chip:<8} {k.registers:>9} {k.spill:>6} {k.stack:>6} {k.shared:>7}"
        )
        if k.faults or not options.check:
            print(f"{line}  {k.name}" + (f"  <- {'; '.join(k.faults)}" if k.faults else ""))
    for line in bad:
        print(line)
    faulty = sum(bool(k.faults) for k in kernels)
    print(f"{len(kernels)} kernels in {len(logs)} logs, {faulty} with faults, {len(bad)} warnings")
    return int(faulty > 0 or bool(bad))


if __name__ == "__main__":
    sys.exit(main())
