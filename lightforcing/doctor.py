"""What this build is and what it found here: the answers of ``info`` and ``doctor``.

Nothing here needs nvcc or a GPU. Torch is asked for its version only, and imported where there is
a driver for the GPUs that it may see.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import sys

import lightforcing as lf

from . import _core

# The static CUDA runtime inside the build decides which drivers can load it.
DRIVER_FLOOR = {12: "525", 13: "580"}
REBUILD = "to build it: `pip install .` in a checkout with nvcc on PATH"


def version(package: str) -> str | None:
    """Installed version of a distribution, None when it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def facts() -> dict:
    """``lf.info()`` with what surrounds it: Python, packages, variables."""
    return {
        **lf.info(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "torch": version("torch"),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith("LIGHTFORCING_")},
    }


def said(value) -> str:
    """A fact as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{k}={v}" for k, v in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None or value == "" else str(value)


def check(name: str, state: str, found: str, advice: str = "") -> dict:
    """One finding; ``state`` is ok, missing (works without) or broken."""
    return {"name": name, "state": state, "found": found, "advice": advice}


def checks() -> list[dict]:
    """Every finding, most basic first."""
    return [
        check("python", "ok", f"{platform.python_version()} at {sys.executable}"),
        check("build", "ok", f"lightforcing {lf.__version__}, {lf.info()['binary']}"),
        processor(),
        arithmetic(),
        cuda(),
        torch(),
        *gpus(),
        *packages(),
        switches(),
    ]


def processor() -> dict:
    """Which CPU kernels run."""
    facts = lf.info()
    found = f"{facts['isa']} (has {' '.join(facts['isas'])}), {facts['threads']} threads"
    if facts["isa"] == "scalar":
        return check("cpu", "ok", found, "no SIMD kernel for this processor: correct but slow")
    return check("cpu", "ok", found)


def arithmetic() -> dict:
    """One small attention against NumPy: a build that loads can still be wrong."""
    import numpy as np

    draw = np.random.default_rng(0)
    q, k, v = (draw.standard_normal((1, n, 2, 64), np.float32) for n in (130, 390, 390))
    logits = np.einsum("bqhd,bkhd->bhqk", q, k, dtype=np.float64) / 8
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    error = np.abs(lf.block_sparse_attention(q, k, v) - np.einsum("bhqk,bkhd->bqhd", weights, v))
    worst = float(error.max())
    if worst < 1e-5:
        return check("ops", "ok", f"attention agrees with NumPy to {worst:.0e}")
    advice = "run `python -m lightforcing selftest` and report what it prints"
    return check("ops", "broken", f"attention differs from NumPy by {worst:.0e}", advice)


def installed_driver() -> int:
    """The CUDA version that the NVIDIA driver supports (13000 is 13.0), 0 without a driver."""
    try:
        driver, answer = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
        driver.cuDriverGetVersion(ctypes.byref(answer))
    except (OSError, AttributeError):
        return 0
    return answer.value


def dotted(cuda_version: int) -> str:
    """13000 as 13.0."""
    return f"{cuda_version // 1000}.{cuda_version % 1000 // 10}"


def cuda() -> dict:
    """Whether the CUDA half is built, for which chips, and whether a driver can run it."""
    facts, driver = lf.info(), installed_driver()
    has_driver = f"a driver for CUDA {dotted(driver)}" if driver else "no driver"
    if not facts["cuda_built"]:
        return check("cuda", "missing", f"not built, {has_driver}: CPU tensors only", REBUILD)
    runtime = facts["cuda_runtime"]
    found = f"built for {said(facts['cuda_archs'])}, CUDA {dotted(runtime)}, {has_driver}"
    if driver and driver // 1000 < runtime // 1000:
        floor = DRIVER_FLOOR.get(runtime // 1000, "a newer one")
        return check("cuda", "broken", found, f"install driver {floor} or newer, or {REBUILD}")
    if driver and facts["cuda_status"]:
        found = f"{found}, but CUDA answers error {facts['cuda_status']}"
        return check("cuda", "broken", found, "check nvidia-smi and CUDA_VISIBLE_DEVICES")
    if not driver:
        return check("cuda", "missing", f"{found}: CPU tensors only")
    return check("cuda", "ok", f"{found}, {facts['cuda_devices']} GPUs")


def devices() -> list[tuple[str, str]]:
    """Name and chip, such as 90, of every CUDA device that torch sees; none without a driver."""
    if not installed_driver():
        return []
    try:
        from torch import cuda
    except ImportError:
        return []
    if not cuda.is_available():
        return []
    facts = [cuda.get_device_properties(i) for i in range(cuda.device_count())]
    return [(f.name, f"{f.major}{f.minor}") for f in facts]


def code_for(chip: str) -> str | None:
    """How this build runs on a chip: code of its own, of a smaller sibling, or PTX; None: not.

    Code for 8.0 runs on 8.6 and 8.9, code for 90a on 9.0 alone; every build holds PTX for 8.0.
    """
    archs = lf.info()["cuda_archs"]
    if not archs or int(chip) < 80:
        return None
    if chip in archs or f"{chip}a" in archs:
        return "its code is in this build"
    if any(a.isdigit() and a[:-1] == chip[:-1] and a < chip for a in archs):
        return "code for an older chip of its family is in this build"
    return "no code for it is in this build, the driver compiles PTX at the first call"


def gpus() -> list[dict]:
    """Every CUDA device that torch sees, and the attention kernel of the usual call there.

    The usual call is bfloat16 with D 128, 128 query rows to blocks of 64 keys.
    """
    rows = []
    wanted = os.environ.get("LIGHTFORCING_KERNEL") or "auto"
    for i, (name, chip) in enumerate(devices()):
        row, found, code = f"cuda:{i}", f"{name}, chip {chip[:-1]}.{chip[-1]}", code_for(chip)
        if code is None:
            rows.append(check(row, "missing", f"{found}: no code that runs there", REBUILD))
            continue
        reason = _core.why_portable(i)
        if wanted == "portable":
            reason = "LIGHTFORCING_KERNEL=portable asks for it"
        if wanted not in ("auto", "portable", "sm90") or (wanted == "sm90" and reason):
            found = f"{found}; {code}; no attention kernel: LIGHTFORCING_KERNEL={wanted}"
            because = f", but {reason}" if wanted == "sm90" else ", not auto, portable or sm90"
            rows.append(check(row, "broken", found + because, "unset LIGHTFORCING_KERNEL"))
            continue
        kernel = f"the portable kernel ({reason})" if reason else "the Hopper kernel"
        rows.append(check(row, "ok", f"{found}; {code}; attention runs on {kernel}"))
    return rows


def torch() -> dict:
    """Torch is optional: NumPy arrays and the schedule work without it."""
    found = version("torch")
    if found is None:
        advice = "patch, the models and the demo need it: pip install 'lightforcing[models]'"
        return check("torch", "missing", "not installed", advice)
    return check("torch", "ok", found)


def packages() -> list[dict]:
    """NumPy, and the optional packages by the extra that brings them."""
    rows = [check("numpy", "ok", version("numpy") or "unknown version")]
    extras = {
        "models": (["safetensors"], "loading *.safetensors weights"),
        "viz": (["matplotlib", "imageio", "imageio-ffmpeg", "tqdm"], "demo, plots and notebooks"),
    }
    for extra, (names, purpose) in extras.items():
        found = {n: version(n) for n in names}
        absent = [n for n, v in found.items() if v is None]
        if absent:
            advice = f"for {purpose}: pip install 'lightforcing[{extra}]'"
            rows.append(check(extra, "missing", f"no {', '.join(absent)}", advice))
        else:
            rows.append(check(extra, "ok", ", ".join(f"{n} {v}" for n, v in found.items())))
    return rows


def switches() -> dict:
    """The environment variables that change what runs."""
    variables = facts()["variables"]
    if _core.is_disabled():
        advice = "unset LIGHTFORCING_DISABLE to run sparse attention"
        return check("variables", "ok", f"{said(variables)}: everything stays dense", advice)
    return check("variables", "ok", f"LIGHTFORCING_*: {said(variables)}")
