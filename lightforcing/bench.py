"""A short benchmark of one attention call on this CPU: the last chunk of a 21-frame video.

It answers "is it fast here?"; the committed figures come from the programs in benchmarks/.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

import lightforcing as lf

from .report import plan

HEADS, DIM = 2, 128  # of the 12 heads of Wan 1.3B


def run(
    config, *, frame_tokens: int = 1560, seconds: float = 30, threads: int | None = None
) -> dict:
    """Time dense and sparse attention in turn, so that a slow moment hits all of them.

    Args:
        config: its schedule gives the sparsity; scores and frame stage are used as set.
        frame_tokens: tokens of a latent frame; 1560 is 480x832.
        seconds: budget; at least one round after the warm-up is timed.
        threads: of our operators and of torch; None is each one's default.

    Returns:
        Plain values: the case, and for each row the median, the shortest and the number of
        samples in milliseconds, and the speed relative to our dense attention.
    """
    page = plan(config, num_frames=21, frame_tokens=frame_tokens)
    last = page.rows[-1]
    q_len, k_len = 3 * frame_tokens, last["resident_frames"] * frame_tokens
    draw = np.random.default_rng(0)
    q, k, v = (draw.standard_normal((1, n, HEADS, DIM), np.float32) for n in (q_len, k_len, k_len))
    options = dict(
        frame_tokens=frame_tokens,
        sparsity=last["sparsity"],
        **config.selection(),
    )
    works = {
        "lightforcing dense": lambda: lf.block_sparse_attention(q, k, v),
        "lightforcing sparse, selection included": lambda: lf.attention(q, k, v, **options),
        "lightforcing selection alone": lambda: lf.select_blocks(q, k, **options),
    }
    lf.set_num_threads(threads or 0)  # checks it, before torch is asked
    if sdpa := torch_attention(q, k, v, threads):
        works["torch scaled_dot_product_attention"] = sdpa
    try:
        samples = time_in_turn(works, seconds)
        used = lf.info()["threads"]
    finally:
        lf.set_num_threads(0)
    dense = statistics.median(samples["lightforcing dense"])
    rows = [
        {
            "what": name,
            "median_ms": 1e3 * statistics.median(times),
            "best_ms": 1e3 * min(times),
            "samples": len(times),
            "speedup": dense / statistics.median(times),
        }
        for name, times in samples.items()
    ]
    return {
        "case": {"q": [1, q_len, HEADS, DIM], "k": [1, k_len, HEADS, DIM], "dtype": "float32"},
        "kept": last["kept"],
        "blocks": last["blocks"],
        "isa": lf.info()["isa"],
        "threads": used,
        "torch": lf.info()["torch"],
        "rows": rows,
    }


def torch_attention(q, k, v, threads):
    """The same dense call in torch, None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    if threads:
        torch.set_num_threads(threads)
    inputs = [torch.from_numpy(x).transpose(1, 2) for x in (q, k, v)]
    return lambda: torch.nn.functional.scaled_dot_product_attention(*inputs)


def time_in_turn(works: dict, seconds: float) -> dict[str, list[float]]:
    """Seconds of every sample: one untimed round, then rounds until the budget is spent."""
    samples = {name: [] for name in works}
    for work in works.values():
        work()
    end = time.perf_counter() + seconds
    while True:
        for name, work in works.items():
            start = time.perf_counter()
            work()
            samples[name].append(time.perf_counter() - start)
        if time.perf_counter() >= end:
            return samples


def text(result: dict) -> str:
    """The result as a table."""
    case = result["case"]
    lines = [
        f"{case['dtype']}, q {case['q']}, k {case['k']}, {result['kept']} of {result['blocks']} "
        f"blocks kept, {result['isa']}, {result['threads']} threads, torch {result['torch']}",
        f"{'':<40} {'median':>9} {'best':>9} {'n':>4}  against our dense",
    ]
    for row in result["rows"]:
        lines.append(
            f"{row['what']:<40} {row['median_ms']:7.0f}ms {row['best_ms']:7.0f}ms "
            f"{row['samples']:>4}  {row['speedup']:.2f}x"
        )
    return "\n".join(lines)
