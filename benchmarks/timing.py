"""The one timer of the GPU benchmarks, and the facts of the machine that its figures depend on.

A sample is one replay of a CUDA graph of 20 calls after 30 ms of idle: a short burst, before the
power cap lowers the clock. A spinning kernel in front wakes the card and gives the host time to
queue the replay, so that neither is in the sample. Works of a group take turns, sample by sample,
so that whatever the card does hits all of them. `sustained` is the same graph without idle.

A work with a prelude (an operation that writes its inputs, or one that empties the L2 cache) is
the difference of two graphs, 20 times prelude and call, and 20 times the prelude alone.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

CALLS, IDLE, SPIN_CYCLES = 20, 0.030, 200_000  # the spin is 100 us at 1980 MHz
SUSTAINED_SECONDS = 0.2  # once to warm up, once timed


@dataclass(eq=False)
class Work:
    """What is timed: one row of the table."""

    case: str
    kernel: str
    run: Callable[[], Any]
    flops: float | None = None  # a call
    calls: int = CALLS  # in one graph
    prelude: Callable[[], Any] | None = None
    host: bool = False  # also measure the host's time a call
    check: Callable[[], float] | None = None  # error before the first timing; raises if too large
    note: str = ""
    samples: list[float] = field(default_factory=list)  # milliseconds a call
    sustained: float | None = None
    host_us: float | None = None
    error: float | None = None
    failed: str = ""

    @property
    def name(self):
        return f"{self.case} {self.kernel}"

    @property
    def ms(self):
        return statistics.median(self.samples) if self.samples else None

    def spread(self):
        """The 10th and 90th percentile."""
        ordered = sorted(self.samples)
        last = len(ordered) - 1
        return ordered[round(0.1 * last)], ordered[round(0.9 * last)]


class L2Flush:
    """Writes three times the L2 cache."""

    def __init__(self):
        size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.buffer = torch.empty(3 * size, dtype=torch.int8, device="cuda")

    def __call__(self):
        self.buffer.zero_()


def capture(run, calls):
    """A graph of `calls` calls; two calls before it load kernels and fill caches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph


def replay_ms(graph, times=1):
    """Device milliseconds of `times` replays."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SPIN_CYCLES)
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def burst_ms(graph):
    """One replay after the idle time."""
    torch.cuda.synchronize()
    time.sleep(IDLE)
    return replay_ms(graph)


def sustained_ms(graph, calls):
    """A call's milliseconds once the card has been busy for a while."""
    torch.cuda.synchronize()
    once = max(replay_ms(graph), 1e-3)
    times = max(1, int(1e3 * SUSTAINED_SECONDS / once))
    replay_ms(graph, times)
    return replay_ms(graph, times) / times / calls


def host_us(run, calls=20, rounds=7):
    """Host microseconds of an eager call while the device is behind, the median of the rounds."""
    spent = []
    run()
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        spent.append((time.perf_counter() - start) / calls)
    torch.cuda.synchronize()
    return 1e6 * statistics.median(spent)


def measure(works, *, samples=15, sustained=True):
    """Check, then time a group of works in turn; fills them in place."""
    ready = []
    for work in works:
        try:
            if work.check is not None:
                work.error = work.check()
            prelude = work.prelude
            if prelude is None:
                graphs = capture(work.run, work.calls), None
            else:

                def both(run=work.run, prelude=prelude):
                    prelude()
                    return run()

                graphs = capture(both, work.calls), capture(prelude, work.calls)
        except Exception as error:  # a peer that cannot run must not end the others' run
            work.failed = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        ready.append((work, *graphs))
    for turn in range(samples + 1):
        for work, graph, without in ready:
            ms = burst_ms(graph)
            if without is not None:
                ms -= burst_ms(without)
            if turn > 0:  # the first turn warms up
                work.samples.append(ms / work.calls)
    for work, graph, without in ready:
        if sustained and without is None:
            work.sustained = sustained_ms(graph, work.calls)
        if work.host:
            work.host_us = host_us(work.run)
    del ready
    gc.collect()
    torch.cuda.empty_cache()


# ---- the machine ------------------------------------------------------------------------------


def output(*command):
    """What a command prints, or an empty string."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def clocks():
    """Clocks, power and temperature now; nothing is set."""
    query = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    line = output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", index)
    return dict(zip(query.split(","), [x.strip() for x in line.split(",")], strict=False))


def commit():
    """The commit of this tree, `+` if changed; LIGHTFORCING_COMMIT where there is no git."""
    given = os.environ.get("LIGHTFORCING_COMMIT")
    if given:
        return given
    head = output("git", "rev-parse", "--short=10", "HEAD")
    return head + ("+" if output("git", "status", "--porcelain", "-uno") else "") if head else None


def machine():
    """Card, driver and versions, as plain values."""
    import lightforcing as lf

    facts = {
        "card": torch.cuda.get_device_name(),
        "driver": output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        ).partition("\n")[0],
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "lightforcing": lf.__version__,
        "embedded": lf.info()["cuda_archs"],
        "commit": commit(),
    }
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    return facts


def ceilings():
    """Measured here: a large bf16 product (TFLOP/s) and a device copy (TB/s)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    source = torch.randn(2**28, device="cuda")
    copy = torch.empty_like(source)
    works = [
        Work("ceiling", "bf16 matmul 8192", lambda: torch.mm(a, b, out=c), calls=5),
        Work("ceiling", "copy 1 GiB", lambda: copy.copy_(source), calls=5),
    ]
    measure(works, samples=5, sustained=False)
    return {
        "matmul_tflops": 2 * 8192**3 / works[0].ms / 1e9,
        "copy_tb_s": 2 * source.nbytes / works[1].ms / 1e9,
    }
