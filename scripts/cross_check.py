"""Builds the C core for this machine and for aarch64, runs both, and compares what they print.

    python scripts/cross_check.py [--log FILE]

Needs ``aarch64-linux-gnu-gcc`` and ``qemu-aarch64`` (Debian: gcc-aarch64-linux-gnu, qemu-user,
libc6-dev-arm64-cross). Exit code 1 when a selection differs by a bit or an attention is off.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "-std=gnu11 -O3 -fopenmp -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -static"


def run_on(compiler, emulator, folder):
    """The lines that the check prints when built with ``compiler``."""
    sources = [ROOT / "scripts/cross_check.c", *sorted((ROOT / "csrc/cpu").glob("*.c"))]
    sources += sorted((ROOT / "csrc/common").glob("*.c"))
    program = folder / compiler
    build = [compiler, *FLAGS.split(), *map(str, sources), "-lm", "-o", str(program)]
    # -static warns of dlopen inside libgomp, which the check never reaches.
    subprocess.run(build, check=True, stderr=subprocess.DEVNULL)
    done = subprocess.run([*emulator, str(program)], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", type=Path, help="also write what is printed here")
    log = parser.parse_args().log
    missing = [t for t in ("gcc", "aarch64-linux-gnu-gcc", "qemu-aarch64") if not shutil.which(t)]
    if missing:
        sys.exit(f"not on PATH: {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder:
        here = run_on("gcc", [], Path(folder))
        arm = run_on("aarch64-linux-gnu-gcc", ["qemu-aarch64"], Path(folder))
    exact = [[line for line in lines if not line.startswith("attend")] for lines in (here, arm)]
    lines = ["this machine", *("  " + x for x in here), "aarch64 under qemu-user"]
    lines += ["  " + x for x in arm]
    lines.append("equal to the bit" if exact[0] == exact[1] else "DIFFERENT")
    print("\n".join(lines))
    if log:
        log.write_text("\n".join(lines) + "\n")
    return exact[0] != exact[1]


if __name__ == "__main__":
    sys.exit(main())
