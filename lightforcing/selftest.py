"""The operators against the float64 reference on this machine, random and adversarial inputs.

Every instruction set that this processor and build have is tried, then the first CUDA device that
torch sees, with each attention kernel that runs there. A check draws cases until
its share of the time is spent, so a slow machine does fewer of them; it reports how many, and
the worst error as a share of what is allowed. What is allowed follows from the arithmetic,
see :func:`attention_bound`; selections may differ only where the reference itself says that
two scores are too close for float32 to tell.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np

import lightforcing as lf
from lightforcing import _core, reference
from lightforcing.arrays import to_numpy

EPS = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # half a unit: rounding


def torch_or_none():
    """Torch, if it is installed: for bfloat16, which NumPy lacks, and for a GPU."""
    try:
        import torch
    except ImportError:
        return None
    return torch


def cast(x: np.ndarray, dtype: str, device: str = "cpu"):
    """The array in that dtype; bfloat16, or on a GPU, as a torch tensor."""
    if dtype == "bfloat16" or device != "cpu":
        torch = torch_or_none()
        return torch.from_numpy(x).to(device, getattr(torch, dtype))
    return x.astype(dtype)


def dtypes(device: str = "cpu") -> list[str]:
    """What can be tried there."""
    if device != "cpu":
        return ["float16", "bfloat16"]
    return ["float32", "float16"] + (["bfloat16"] if torch_or_none() else [])


def draw_shape(draw, dims=(8, 40, 64, 128)) -> dict:
    """A random geometry in which nothing divides anything, now and then the smallest one."""
    if draw.random() < 0.1:
        return dict(batch=1, heads=1, dim=dims[0], frame_tokens=1, frames=1, q_frames=1)
    frames = int(draw.integers(1, 10))
    return dict(
        batch=int(draw.integers(1, 3)),
        heads=int(draw.integers(1, 3)),
        dim=int(draw.choice(dims)),
        frame_tokens=int(draw.choice([1, 7, 64, 65, 97, 130])),
        frames=frames,
        q_frames=int(draw.integers(1, min(frames, 2) + 1)),
    )


def draw_qkv(draw, shape, kind: str) -> list[np.ndarray]:
    """q, k, v in float32. ``kind``: normal, huge (logits in the hundreds), equal, nan."""
    tail = shape["heads"], shape["dim"]
    rows = shape["q_frames"] * shape["frame_tokens"], shape["frames"] * shape["frame_tokens"]
    lengths = rows[0], rows[1], rows[1]
    q, k, v = (draw.standard_normal((shape["batch"], n, *tail), np.float32) for n in lengths)
    if kind == "huge":
        q *= 60
    if kind == "equal":
        k[:] = k[:, :1]
    if kind == "nan":
        k[:, int(draw.integers(rows[1]))] = np.nan
    return [q, k, v]


# ---- checks: each yields (error / allowed, description) per case ------------------------


def schedule_cases(draw) -> Iterator[tuple[float, str]]:
    """``cag_schedule`` against bisection in NumPy, all laws."""
    while True:
        target = float(draw.uniform(0, 0.95))
        given = dict(
            sparsity=target,
            base=float(draw.uniform(target, 1)),
            window=[None, int(draw.integers(3, 24))][int(draw.integers(2))],
            law=str(draw.choice(["linear", "exponential", "constant", "count"])),
        )
        chunk = int(draw.integers(1, 5))
        sizes = chunk * int(draw.integers(1, 40)), chunk
        ours = lf.cag_schedule(*sizes, **given)
        truth = reference.cag_schedule(*sizes, **given)
        yield float(np.abs(ours - truth).max(initial=0)) / 1e-9, f"{sizes} {given}"


def compress_cases(draw, device: str = "cpu") -> Iterator[tuple[float, str]]:
    """``compress``: float32 sums of values rounded to the input's type."""
    while True:
        shape, dtype = draw_shape(draw), str(draw.choice(dtypes(device)))
        block = int(draw.choice([4, 16, 64, 128]))
        k = cast(draw_qkv(draw, shape, "normal")[1] + 2, dtype, device)
        ours = reference.as_float64(lf.compress(k, shape["frame_tokens"], block=block))
        truth = reference.compress(k, shape["frame_tokens"], block=block)
        worst = np.abs(ours - truth).max() / np.abs(truth).max()
        yield float(worst) / (8 * EPS["float32"]), f"{shape} {dtype} block {block}"


def selection_cases(draw, score: str, device: str = "cpu") -> Iterator[tuple[float, str]]:
    """``select_blocks``: the same lists, but for scores that float32 cannot tell apart."""
    while True:
        shape, dtype = draw_shape(draw), str(draw.choice(dtypes(device)))
        q, k, _ = draw_qkv(draw, shape, "equal" if draw.random() < 0.1 else "normal")
        if score == "mean" and draw.random() < 0.3:  # exact sums: a tie is a tie in both
            q, k = np.round(q), np.round(k)
        q, k = cast(q, dtype, device), cast(k, dtype, device)
        given = dict(
            frame_tokens=shape["frame_tokens"],
            sparsity=float(draw.uniform(0, 1)),
            score=score,
            hierarchy=bool(draw.random() < 0.5),
            block_q=int(draw.choice([64, 128])),
            block_k=int(draw.choice([16, 64])),
        )
        blocks = lf.select_blocks(q, k, **given)
        truth = reference.select_blocks(q, k, **given)
        kept = to_numpy(blocks.indices, "indices").reshape(truth.indices.shape)
        yield selection_error(kept, truth), f"{shape} {dtype} {given}"


def selection_error(kept: np.ndarray, truth) -> float:
    """0 when every row keeps what the reference keeps, or could for all that float32 tells."""
    wrong = 0
    for row in np.ndindex(kept.shape[:3]):
        ours, right = set(kept[row].tolist()), set(truth.indices[row].tolist())
        if ours == right:
            continue
        if len(ours) != len(right):
            return float("inf")
        scores, room = truth.scores[row], truth.tolerance[row]
        swapped = [scores[sorted(ours - right)], scores[sorted(right - ours)]]
        close = np.abs(np.sort(swapped[0]) - np.sort(swapped[1])).max() <= 2 * room.max()
        frames = np.sort(truth.frame_scores[row])
        if truth.forced and len(frames) > 1:  # two frames too close to tell swap all their blocks
            close = close or np.diff(frames).min() <= 2 * room.max() * truth.blocks_per_frame
        wrong += not close
    return float(wrong) * 2


def attention_bound(q, k, v, scale: float, dtype: str) -> float:
    """What rounding allows, absolute: of the output and the weights, and of float32 logits."""
    longest = [np.nanmax(np.linalg.norm(x, axis=-1), initial=0) for x in (q, k)]
    logits = scale * longest[0] * longest[1]
    rounding = 2 * EPS[dtype] + EPS["float32"] * (32 + 4 * logits)
    return float(rounding * np.abs(v).max(initial=1e-30))


def attention_cases(
    draw, kind: str, sparse: bool, device: str = "cpu"
) -> Iterator[tuple[float, str]]:
    """``block_sparse_attention``: output and LSE, dense or with random lists."""
    while True:
        shape = draw_shape(draw) if device == "cpu" else draw_shape(draw, (64, 128))
        dtype = str(draw.choice(dtypes(device)))
        q, k, v = (cast(x, dtype, device) for x in draw_qkv(draw, shape, kind))
        blocks, mask = None, None
        if sparse:
            blocks, mask = random_blocks(draw, shape, device)
        out, lse = lf.block_sparse_attention(q, k, v, blocks, return_lse=True)
        truth, true_lse = reference.attention(q, k, v, mask)
        pairs = [(reference.as_float64(out), truth), (reference.as_float64(lse), true_lse)]
        scale = shape["dim"] ** -0.5
        q, k, v = (reference.as_float64(x) for x in (q, k, v))
        bound = attention_bound(q, k, v, scale, dtype)
        lse_bound = attention_bound(q, k, np.ones(1), scale, "float32")
        if device != "cpu":
            lse_bound += 2e-5  # the logarithm and exponentials of a GPU are approximate
        worst = 0.0
        for (ours, right), allowed in zip(pairs, (bound, lse_bound), strict=True):
            finite = np.isfinite(right)
            if not np.array_equal(ours[~finite], right[~finite], equal_nan=True):
                worst = float("inf")
            if finite.any():
                gap = np.abs(ours[finite] - right[finite]).max()
                worst = max(worst, float(gap) / allowed if np.isfinite(gap) else float("inf"))
        yield worst, f"{shape} {dtype} {kind}"


def random_blocks(draw, shape, device: str = "cpu"):
    """A random list with some empty rows, and its token mask."""
    block_q, block_k = 128, 64
    rows = -(-shape["q_frames"] * shape["frame_tokens"] // block_q)
    columns = shape["frames"] * -(-shape["frame_tokens"] // block_k)
    keep = draw.random((shape["batch"], shape["heads"], rows, columns)) < draw.uniform(0, 1)
    keep[draw.random(keep.shape[:3]) < 0.1] = False
    q_len, k_len = (shape[f] * shape["frame_tokens"] for f in ("q_frames", "frames"))
    kept = keep if device == "cpu" else torch_or_none().from_numpy(keep).to(device)
    blocks = lf.BlockList.from_bool(
        kept, q_len, k_len, shape["frame_tokens"], block_q=block_q, block_k=block_k
    )
    mask = reference.token_mask(
        keep, q_len, k_len, frame_tokens=shape["frame_tokens"], block_q=block_q, block_k=block_k
    )
    return blocks, mask


def thread_cases(draw) -> Iterator[tuple[float, str]]:
    """Bit for bit the same whatever the number of threads."""
    while True:
        shape = draw_shape(draw)
        q, k, v = draw_qkv(draw, shape, "normal")
        given = dict(frame_tokens=shape["frame_tokens"], sparsity=0.5, score="mass")
        results = []
        for threads in (1, 2, 5):
            lf.set_num_threads(threads)
            results.append(lf.attention(q, k, v, **given))
        lf.set_num_threads(0)
        same = all(np.array_equal(results[0], r, equal_nan=True) for r in results)
        yield 0.0 if same else float("inf"), f"{shape}"


CHECKS: dict[str, Callable] = {
    "cag_schedule": schedule_cases,
    "compress": compress_cases,
    "select_blocks mean": lambda draw: selection_cases(draw, "mean"),
    "select_blocks mass": lambda draw: selection_cases(draw, "mass"),
    "select_blocks lse": lambda draw: selection_cases(draw, "lse"),
    "attention dense": lambda draw: attention_cases(draw, "normal", sparse=False),
    "attention sparse": lambda draw: attention_cases(draw, "normal", sparse=True),
    "attention huge logits": lambda draw: attention_cases(draw, "huge", sparse=True),
    "attention equal keys": lambda draw: attention_cases(draw, "equal", sparse=True),
    "attention NaN in a key": lambda draw: attention_cases(draw, "nan", sparse=True),
    "same on 1, 2, 5 threads": thread_cases,
}

DEVICE = "cuda"  # the first that torch sees
CUDA_CHECKS: dict[str, Callable] = {
    "compress": compress_cases,
    "select_blocks mean": lambda draw, device: selection_cases(draw, "mean", device),
    "select_blocks mass": lambda draw, device: selection_cases(draw, "mass", device),
}
KERNEL_CHECKS: dict[str, Callable] = {
    "attention dense": lambda draw, device: attention_cases(draw, "normal", False, device),
    "attention sparse": lambda draw, device: attention_cases(draw, "normal", True, device),
}


# ---- running ---------------------------------------------------------------------------


def run(*, seconds: float = 20, seed: int = 0, report: Callable | None = None) -> list[dict]:
    """Run every check under every instruction set, then those of CUDA where it runs; one row each.

    Args:
        seconds: budget of the whole test; each check runs at least one case.
        seed: of the drawn inputs; a failing row names it with its case.
        report: called with each row as it is done.

    Returns:
        Rows ``{check, isa, cases, worst, ok, failure, seconds}``; ``worst`` is the largest
        error as a share of what is allowed. ``isa`` is "cuda", or the attention kernel, on a GPU.
    """
    rows = []
    torch_or_none()  # importing torch takes seconds: not on the first check's time
    isas, kernels = lf.info()["isas"], [] if why_not_cuda() else cuda_kernels()
    on_cuda = len(CUDA_CHECKS) + len(kernels) * len(KERNEL_CHECKS) if kernels else 0
    share = seconds / (len(isas) * len(CHECKS) + on_cuda)

    def try_all(checks, code, *device):
        for name, cases in checks.items():
            row = run_one(lambda draw, make=cases: make(draw, *device), share, seed)
            rows.append({"check": name, "isa": code, **row})
            if report:
                report(rows[-1])

    try:
        for isa in isas:
            _core.force_isa(isa)
            try_all(CHECKS, isa)
    finally:
        _core.force_isa("best")
    if not kernels:
        return rows
    try_all(CUDA_CHECKS, "cuda", DEVICE)
    try:
        for kernel in kernels:
            _core.force_kernel(kernel)
            try_all(KERNEL_CHECKS, kernel, DEVICE)
    finally:
        _core.force_kernel("auto")
    return rows


def why_not_cuda() -> str | None:
    """The reason why no GPU is tried, or None."""
    if not lf.info()["cuda_built"]:
        return "this build has no CUDA half"
    torch = torch_or_none()
    if torch is None:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if status := lf.info()["cuda_status"]:
        return f"CUDA answers error {status} to this build, though torch sees a device"
    return None


def cuda_kernels() -> list[str]:
    """The attention kernels that run on the first CUDA device."""
    return ["portable"] + (["sm90"] if _core.why_portable(0) is None else [])


def run_one(cases: Callable, seconds: float, seed: int) -> dict:
    """Draw cases until the time is spent or one fails."""
    draw = np.random.default_rng(seed)
    start, count, worst, failure = time.perf_counter(), 0, 0.0, None
    for error, description in cases(draw):
        count += 1
        worst = max(worst, error)
        if not error <= 1:
            failure = f"case {count}: {description}"
            break
        if time.perf_counter() - start >= seconds:
            break
    spent = round(time.perf_counter() - start, 2)
    worst = worst if np.isfinite(worst) else None
    ok = failure is None
    return dict(cases=count, worst=worst, ok=ok, failure=failure, seconds=spent)


def line(row: dict) -> str:
    """One row as text."""
    worst = "wrong" if row["worst"] is None else f"{row['worst']:.2f} of allowed"
    start = f"{row['isa']:<8} {row['check']:<24} {row['cases']:>6} cases  worst {worst}"
    return start + ("" if row["ok"] else f"  FAILED {row['failure']}")
