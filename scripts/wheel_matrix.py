"""Builds the wheel and tries it on several Python and NumPy versions, each in a fresh venv.

    python scripts/wheel_matrix.py [--build-only] [--python PATH ...] [--json FILE]

Without --python the interpreters python3.10 to python3.13 of PATH, or of pyenv, are taken; one that
is missing is named and fails the run. Each row installs the wheel and one NumPy, nothing else, and
runs the smoke test below from an empty folder; one more row has torch. The table also goes to
benchmarks/results/wheel-matrix-<date>.txt.
"""

import argparse
import datetime
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NUMPY = {  # the oldest NumPy that people pin for that Python, and the newest there is
    "3.10": ("numpy==1.24.*", "numpy==2.2.*"),
    "3.11": ("numpy==1.24.*", "numpy"),
    "3.12": ("numpy==1.26.*", "numpy"),
    "3.13": ("numpy==2.1.*", "numpy"),
}
TORCH = ("3.11", "numpy", "torch==2.13.0", "safetensors")  # the one row with torch
IMPORT_LIMIT_MS = 20.0
SIZE_LIMIT_MB = 15.0

SMOKE = """
import json, subprocess, sys
import numpy as np
import lightforcing as lf
assert "torch" not in sys.modules, "import lightforcing must not import torch"
assert "site-packages" in lf.__file__, lf.__file__
s = lf.cag_schedule(21, 3, sparsity=0.88, base=0.98)
np.testing.assert_allclose(s, [0, .8270, .8551, .8718, .8832, .8917, .8982], atol=5e-5)
T, F, H, D = 70, 4, 2, 64
draw = np.random.default_rng(0)
q, k, v = (draw.standard_normal((1, n, H, D), dtype=np.float32) for n in (2 * T, F * T, F * T))
means = lf.compress(k, T, block=64)
assert means.shape == (1, 2 * F, H, D) and isinstance(means, np.ndarray)
np.testing.assert_allclose(means[0, 1], k[0, 64:70].mean(0), atol=1e-6)
logits = np.einsum("bqhd,bkhd->bhqk", q, k).astype(np.float64) / D**0.5
weights = np.exp(logits - logits.max(-1, keepdims=True))
truth = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
np.testing.assert_allclose(lf.block_sparse_attention(q, k, v), truth, atol=1e-5)
blocks = lf.select_blocks(q, k, frame_tokens=T, sparsity=0.5, score="mass", hierarchy=False)
assert blocks.indices.shape == (1, H, 2, 4) and blocks.blocks == 8
sparse = lf.attention(q, k, v, frame_tokens=T, sparsity=0.5, score="mass", hierarchy=False)
np.testing.assert_array_equal(sparse, lf.block_sparse_attention(q, k, v, blocks))
if sys.argv[1] == "torch":
    import torch
    ours = lf.block_sparse_attention(*(torch.from_numpy(x) for x in (q, k, v)))
    assert isinstance(ours, torch.Tensor)
    np.testing.assert_allclose(ours.numpy(), truth, atol=1e-5)
    half = lf.attention(*(torch.from_numpy(x).bfloat16() for x in (q, k, v)),
                        frame_tokens=T, sparsity=0.5)
    assert half.dtype == torch.bfloat16 and bool(half.isfinite().all())
    from lightforcing.world import load_world
    assert sum(p.numel() for p in load_world().parameters()) > 1e6  # the weights are in the wheel
for command in ("info", "doctor", "explain"):
    done = subprocess.run([sys.executable, "-m", "lightforcing", command, "--json"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)
print(json.dumps({"numpy": np.__version__, "isa": lf.info()["isa"]}))
"""

ASK_VERSION = "import sys; print('%d.%d' % sys.version_info[:2])"
IMPORT = (
    "import numpy, time; start = time.process_time(); import lightforcing; "
    "print((time.process_time() - start) * 1e3)"
)


def run(*command, cwd=None):
    """Run a command; its output, or an error with all that it said."""
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command[:4]))} ...\n{done.stdout}{done.stderr}")
    return done.stdout


def build_wheel():
    """Build exactly one wheel into dist/ and check its tag and its binary's symbols."""
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as copy:
        # From a copy: an old build/lib would slip stale modules into the wheel.
        left_out = shutil.ignore_patterns(".*", "build", "dist", "demo", "*.so", "*.egg-info")
        shutil.copytree(ROOT, copy, ignore=left_out, dirs_exist_ok=True)
        run(sys.executable, "-m", "pip", "wheel", "--quiet", copy, "--no-deps", "-w", dist)
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    (wheel,) = dist.iterdir()
    if not re.fullmatch(r"lightforcing-[\w.]+-cp310-abi3-linux_\w+\.whl", wheel.name):
        raise SystemExit(f"{wheel.name}: expected one cp310-abi3 wheel")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        (binary,) = (n for n in archive.namelist() if n.endswith(".so"))
        symbols = run("nm", "-D", archive.extract(binary, folder))
        if wheel.stat().st_size > SIZE_LIMIT_MB * 1e6:
            raise SystemExit(f"{wheel.name}: {wheel.stat().st_size} bytes, over {SIZE_LIMIT_MB} MB")
        if foreign := [s for s in symbols.splitlines() if re.search(r"torch|c10|_ZN2at", s)]:
            raise SystemExit(f"{binary} has torch symbols: {foreign[:3]}")
        exported = [s.split()[-1] for s in symbols.splitlines() if " T " in s]
        facts = {
            "wheel": wheel.name,
            "bytes": wheel.stat().st_size,
            "build_seconds": round(seconds),
            "build_processor_seconds": round(
                after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            ),
            "files": len(archive.namelist()),
            "torch_symbols": 0,
            "exported": exported,
        }
    return wheel, facts


def try_row(python, requirements, wheel, folder):
    """One venv: install, smoke test, import cost (median of 9 processes)."""
    venv = Path(folder) / "venv"
    run(python, "-m", "venv", "--clear", venv)
    own = venv / "bin" / "python"
    run(own, "-m", "pip", "install", "--quiet", wheel, *requirements)
    kind = "torch" if len(requirements) > 1 else "numpy"
    facts = json.loads(run(own, "-c", SMOKE, kind, cwd=folder).splitlines()[-1])
    costs = sorted(float(run(own, "-c", IMPORT, cwd=folder)) for _ in range(9))
    facts["import_ms"] = round(costs[4], 1)
    return facts


def find_python(version):
    """An interpreter of that version that runs; pyenv's shims on PATH may not."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))]
    for python in filter(None, found):
        try:
            if run(python, "-c", ASK_VERSION).strip() == version:
                return python
        except RuntimeError:
            continue
    return None


def matrix(pythons, wheel):
    """Every row of the table, as dicts with `ok` and, on failure, `error`."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for version, python in pythons.items():
            cases = [(n,) for n in NUMPY.get(version, ("numpy",))]
            if version == TORCH[0]:
                cases.append(TORCH[1:])
            for requirements in cases:
                row = {"python": version, "asked": " ".join(requirements), "ok": False}
                rows.append(row)
                try:
                    if python is None:
                        raise RuntimeError(f"python{version} is not on PATH; name it with --python")
                    row |= try_row(python, requirements, wheel, folder)
                    row["ok"] = row["import_ms"] <= IMPORT_LIMIT_MS
                    if not row["ok"]:
                        row["error"] = f"import cost above {IMPORT_LIMIT_MS} ms"
                except RuntimeError as error:
                    row["error"] = str(error)
                print(line(row), flush=True)
    return rows


def line(row):
    """One line of the table."""
    start = f"{row['python']:7} {row['asked']:32} {row.get('numpy', '-'):8} {row.get('isa', '-'):7}"
    cost = f"{row['import_ms']:6.1f} ms" if "import_ms" in row else "        -"
    end = "ok" if row["ok"] else "FAILED " + row.get("error", "").strip().splitlines()[-1]
    return f"{start} {cost}  {end}"


def main():
    """Build the wheel; unless --build-only, try it everywhere."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--python", nargs="+", metavar="PATH", help="interpreters to try")
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON too")
    options = parser.parse_args()
    wheel, facts = build_wheel()
    head = (
        f"{facts['wheel']}: {facts['bytes'] / 1e3:.0f} kB, {facts['files']} files, built in "
        f"{facts['build_seconds']} s ({facts['build_processor_seconds']} s of processors), "
        f"no torch symbol in nm -D, exports {', '.join(facts['exported'])}"
    )
    print(head)
    if options.build_only:
        return 0
    if options.python:
        pythons = {run(p, "-c", ASK_VERSION).strip(): p for p in options.python}
    else:
        pythons = {v: find_python(v) for v in NUMPY}
    columns = f"{'python':7} {'installed beside it':32} {'numpy':8} {'isa':7} {'import':>9}"
    print(columns)
    rows = matrix(pythons, wheel)
    text = [
        f"$ python scripts/wheel_matrix.py    # {datetime.date.today()}, {platform.machine()}",
        head,
        "import: processor time of `import lightforcing` after `import numpy`, median of 9",
        columns,
        *map(line, rows),
    ]
    (RESULTS / f"wheel-matrix-{datetime.date.today()}.txt").write_text("\n".join(text) + "\n")
    if options.json:
        Path(options.json).write_text(json.dumps({"wheel": facts, "rows": rows}, indent=1))
    failed = [r for r in rows if not r["ok"]]
    for row in failed:
        print(f"\n{row['python']} {row['asked']}:\n{row.get('error')}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
