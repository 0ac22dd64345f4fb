"""100,000 calls leave memory and reference counts as they were."""

import gc
import os
import sys
import time

import numpy as np
import pytest
import torch
from numerics import draw
from producers import Shared

import lightforcing as lf
from lightforcing import _core
from lightforcing.step import Step

ROUNDS = 100_000
PAGE = os.sysconf("SC_PAGE_SIZE")
SANITIZED = os.environ.get("LIGHTFORCING_SANITIZE") == "1"


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


class Refusing(Shared):
    def __dlpack__(self, **keywords):
        raise BufferError("not today")


Q, K, V = (1, 4, 1, 8), (1, 12, 1, 8), (1, 12, 1, 8)
KINDS = {
    "torch": lambda: draw(Q, K, V),
    "bfloat16": lambda: draw(Q, K, V, dtype=torch.bfloat16),
    "numpy": lambda: [x.numpy() for x in draw(Q, K, V)],
    "dlpack": lambda: [Shared(x.numpy()) for x in draw(Q, K, V)],
}


def calls(q, k, v):
    """One call of each operator, as functions without arguments."""
    options = dict(frame_tokens=4, sparsity=0.5, block_q=16, block_k=16)
    blocks = lf.select_blocks(q, k, **options)
    means = lf.compress(k, 4, block=16)
    patched = []
    if isinstance(q, torch.Tensor):
        config = lf.Config(block_q=16, block_k=16, score="mean")
        step = Step(q, k, v, frame_tokens=4, sparsity=0.5, **config.selection())
        patched = [
            lambda: step.run(q, k, v),
            lambda: step.run(q, k, v, means, 1, want_lse=True),
            lambda: _core.facts(q, k, v, k),
        ]
    return patched + [
        lambda: lf.compress(k, 4, block=16),
        lambda: lf.compress(k, 4, block=16, out=means),
        lambda: lf.select_blocks(q, k, **options),
        lambda: lf.select_blocks(q, k, **options, k_means=means, return_scores=True),
        lambda: lf.block_sparse_attention(q, k, v),
        lambda: lf.block_sparse_attention(q, k, v, blocks, return_lse=True),
    ]


def failing_calls(q, k, v):
    """Calls that raise at different depths, some with tensors already borrowed."""
    refusing = Refusing(np.zeros(K, np.float32))
    readonly = np.zeros(Q, np.float32)
    readonly.flags.writeable = False
    bad = [
        lambda: lf.compress(k, 5, block=16),
        lambda: lf.compress("k", 4),
        lambda: lf.select_blocks(q, k, frame_tokens=4, sparsity=2.0),
        lambda: lf.select_blocks(q, refusing, frame_tokens=4, sparsity=0.5),
        lambda: lf.block_sparse_attention(q, k, refusing),
        lambda: lf.block_sparse_attention(q, k, v, out=readonly),
    ]

    def attempt(call):
        try:
            call()
        except (TypeError, ValueError):
            return
        raise AssertionError("expected an error")

    return [lambda call=call: attempt(call) for call in bad]


def numpy_calls():
    """Schedules and list conversions."""
    keep = np.zeros((1, 1, 2, 3), bool)
    keep[..., 1] = True
    options = dict(q_len=20, k_len=12, frame_tokens=4, block_q=16, block_k=16)
    blocks = lf.BlockList.from_bool(keep, **options)
    return [
        lambda: lf.cag_schedule(21, 3, sparsity=0.88),
        lambda: lf.cag_schedule(21, 3, sparsity=0.3, base=0.95, law="exponential"),
        lambda: lf.BlockList.from_bool(keep, **options),
        lambda: (blocks.to_bool(), blocks.to_csr(), blocks.density),
        lambda: lf.plan_selection(1, 3, 4, sparsity=0.5),
    ]


def assert_flat(functions, watched, rounds):
    """Run round robin; after a warm-up neither memory nor reference counts may grow."""

    def run(count):
        for _ in range(count // len(functions)):
            for function in functions:
                function()

    run(rounds // 10)
    gc.collect()
    references = [sys.getrefcount(x) for x in watched]
    before, blocks = resident_bytes(), sys.getallocatedblocks()
    run(rounds)
    gc.collect()
    grown, more_blocks = resident_bytes() - before, sys.getallocatedblocks() - blocks
    assert [sys.getrefcount(x) for x in watched] == references
    # One object leaked by one of six functions would be rounds / 6. The interpreter itself
    # makes some (a few hundred) while it specialises.
    assert more_blocks < rounds // 20, f"{more_blocks} more Python objects"
    most = 8 << 20 if SANITIZED else 1 << 20  # the sanitizer's shadow comes in once, and stays
    assert grown < most, f"{grown / 2**20:.1f} MiB more resident memory"


# The share of each kind: those that cost more Python time get fewer calls.
SHARES = {"torch": 0.30, "bfloat16": 0.15, "numpy": 0.20, "dlpack": 0.10}


@pytest.mark.parametrize("kind", KINDS)
def test_operators(kind):
    tensors = KINDS[kind]()
    lf.set_num_threads(1)
    try:
        assert_flat(calls(*tensors), tensors, round(ROUNDS * SHARES[kind]))
    finally:
        lf.set_num_threads(0)


def test_errors():
    tensors = KINDS["torch"]()
    assert_flat(failing_calls(*tensors), tensors, round(ROUNDS * 0.10))


def test_schedules_and_lists():
    assert_flat(numpy_calls(), [], round(ROUNDS * 0.15))


def test_the_shares_make_up_the_rounds():
    assert sum(SHARES.values()) + 0.10 + 0.15 == pytest.approx(1.0)


def test_exports_end_with_the_call():
    """Each DLPack export is released, on success and on failure."""
    arrays = [np.zeros(shape, np.float32) for shape in (Q, K, V)]
    references = [sys.getrefcount(x) for x in arrays]
    for _ in range(50):
        q, k, v = (Shared(x) for x in arrays)
        lf.block_sparse_attention(q, k, v)
        with pytest.raises(ValueError):
            lf.block_sparse_attention(q, k, v, scale=-1.0)
        with pytest.raises(TypeError):
            lf.block_sparse_attention(q, k, "v")
        del q, k, v
    gc.collect()
    assert [sys.getrefcount(x) for x in arrays] == references


def test_results_outlive_their_inputs():
    q, k, v = draw((1, 64, 2, 16), (1, 640, 2, 16), (1, 640, 2, 16))
    expected = lf.block_sparse_attention(q, k, v).clone()
    out = lf.block_sparse_attention(*[Shared(x.numpy()) for x in (q, k, v)])
    del q, k, v
    gc.collect()
    junk = [np.full(640 * 32, np.nan, np.float32) for _ in range(20)]
    np.testing.assert_array_equal(np.asarray(out), expected.numpy())
    del junk


def test_a_long_call_releases_the_interpreter_lock():
    import threading

    q, k, v = draw((1, 2000, 4, 64), (1, 4000, 4, 64), (1, 4000, 4, 64))
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    lf.block_sparse_attention(q, k, v)
    end = time.perf_counter()
    done.set()
    thread.join()
    inside = [t for t in ticks if start < t < end]
    assert end - start < 0.02 or len(inside) > 2, (end - start, len(inside))
