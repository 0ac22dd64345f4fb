"""Attention with random pauses at every hand-over between warps: the bits of the ordinary build.

LIGHTFORCING_FUZZ_BINARY names an extension built with LIGHTFORCING_FUZZ=1 (scripts/test_gpu.py
makes one). The pauses come from the clock, so each call, and each repetition, has others.
"""

import importlib.machinery
import importlib.util
import os
import random
import time

import pytest
import torch
from gpu import draw, lists, needs_gpu, use_kernel

import lightforcing as lf
from lightforcing import _core, ops

BINARY = os.environ.get("LIGHTFORCING_FUZZ_BINARY")
pytestmark = [
    needs_gpu,
    pytest.mark.skipif(not BINARY, reason="LIGHTFORCING_FUZZ_BINARY names no build with pauses"),
]
SEEDS = 250
REPEATS = 4


@pytest.fixture(params=["portable", "sm90"])
def cores(request):
    """The ordinary extension and the one with pauses, both on this kernel."""
    use_kernel(request.param)
    loader = importlib.machinery.ExtensionFileLoader("paused._core", BINARY)
    paused = importlib.util.module_from_spec(
        importlib.util.spec_from_loader("paused._core", loader)
    )
    loader.exec_module(paused)
    paused.force_kernel(request.param)
    yield _core, paused
    _core.force_kernel("auto")


def attend(core, monkeypatch, *call):
    with monkeypatch.context() as patch:
        patch.setattr(ops, "_core", core)
        return lf.block_sparse_attention(*call, return_lse=True)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def draw_call(seed):
    """q, k, v and lists (every eighth time none) of a random geometry, from one tile to 300."""
    choose = random.Random(seed)
    tokens = choose.choice([1, 60, 64, 78, 130, 390, 880, 1560])
    most = max(2, 6000 // tokens)
    frames = choose.randint(2, min(most, 60))
    q_len = choose.choice([1, 64, 127, 128, 129, 500, 1560])
    batch, heads = choose.choice([(1, 1), (2, 3), (1, 12), (1, 24)])
    dtype = choose.choice([torch.bfloat16, torch.float16])
    dim, block_q = choose.choice([64, 128, 128]), choose.choice([64, 128, 128])
    q = draw((batch, q_len, heads, dim), dtype, seed)
    k, v = (draw((batch, frames * tokens, heads, dim), dtype, seed + i) for i in (1, 2))
    if seed % 8 == 7:
        return q, k, v, None
    lengths = choose.choice(
        [[0, 1, 2, 3, 4, 5], [7, 8, 9], [1, 40, 3], [33], [0, 64, 65, 2], [400]]
    )
    return q, k, v, lists(lengths, batch, heads, q_len, k.shape[1], tokens, block_q, 64, seed)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_the_bits_of_the_ordinary_build(cores, monkeypatch, seed):
    plain, paused = cores
    call = draw_call(seed)
    expected = attend(plain, monkeypatch, *call)
    # Without a wait between them, so that a launch may begin while the one before it ends.
    results = [attend(paused, monkeypatch, *call) for _ in range(REPEATS)]
    for result in results:
        assert same(result, expected)


def test_replays_of_a_graph(cores, monkeypatch):
    """Three launches in one graph, replayed: each finds the workspace as the last one left it."""
    plain, paused = cores
    calls = [draw_call(seed) for seed in (101, 102, 104)]
    expected = [attend(plain, monkeypatch, *call) for call in calls]
    paused.cuda_warmup(torch.cuda.current_device())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [attend(paused, monkeypatch, *call) for call in calls]
    for _ in range(20):
        for result in results:
            for x in result:
                x.fill_(float("nan"))
        graph.replay()
        assert all(same(a, b) for a, b in zip(results, expected, strict=True))


def test_it_does_pause(cores, monkeypatch):
    """Else the other tests would prove nothing."""
    q, k = draw((1, 1560, 12, 128), torch.bfloat16, 1), draw((1, 3120, 12, 128), torch.bfloat16, 2)
    call, seconds = (q, k, k, None), []
    for core in cores:
        attend(core, monkeypatch, *call)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(20):
            attend(core, monkeypatch, *call)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    assert seconds[1] > 1.15 * seconds[0], seconds
