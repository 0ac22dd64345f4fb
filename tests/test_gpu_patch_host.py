"""patch on the GPU and the host: graphs of a whole chunk, streams, threads, memory, launches."""

import threading
from pathlib import Path

import pytest
import torch
from gpu import needs_gpu, use_kernel

import lightforcing as lf
from lightforcing import _core
from lightforcing.models import CausalWan, Rollout, WanConfig

pytestmark = needs_gpu
SIZE, LAYERS = (16, 26), 2  # 104 tokens a frame: a whole block and a short one
CONFIG = WanConfig.named("tiny", dim=256, ffn_dim=256, num_heads=2, num_layers=LAYERS)


@pytest.fixture(scope="module")
def model():
    made = CausalWan(CONFIG, seed=0, device="cuda", dtype=torch.bfloat16).eval()
    made.num_frame_per_block = 3
    return made


@pytest.fixture(params=["portable", "sm90"])
def kernel(request):
    use_kernel(request.param)
    yield request.param
    _core.force_kernel("auto")


def latents(seed):
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(1, CONFIG.in_dim, 3, *SIZE, generator=g, device="cuda").to(torch.bfloat16)


def begin(model, cache, seed, chunks=2):
    """The first chunks of a video."""
    cache.reset()
    for c in range(chunks):
        model(latents(100 * seed + c), 500.0, cache=cache, start_frame=3 * c)


@pytest.mark.parametrize("preset", ["paper", "fast"])
def test_a_captured_chunk_replays_like_eager(kernel, model, preset):
    """All layers and two steps in one graph, replayed for other videos in the same cache."""
    x, cache = latents(7), model.new_cache(9, *SIZE)

    def chunk(cache, x):
        y = model(x, 500.0, cache=cache, start_frame=6)
        return y, model(y, 250.0, cache=cache, start_frame=6)

    with torch.no_grad(), lf.patched(model, preset, strict=True) as handle:
        begin(model, cache, 0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                chunk(cache, x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = chunk(cache, x)
        before = handle.stats()["sparse_calls"]
        for seed in (1, 2, 1):
            begin(model, cache, seed)  # by eager calls, in the cache that the graph reads
            x.copy_(latents(10 + seed))
            graph.replay()
            fresh = model.new_cache(9, *SIZE)
            begin(model, fresh, seed)
            for mine, theirs in zip(result, chunk(fresh, latents(10 + seed)), strict=True):
                assert torch.equal(mine, theirs)
            # and eager calls in the cache that a replay wrote
            assert torch.equal(chunk(cache, x)[1], result[1])
        assert handle.stats()["sparse_calls"] > before
        handle.reset()  # what the graph works in is its own
        torch.cuda.empty_cache()
        waste = [torch.full((1 << 22,), -1, dtype=torch.int32, device="cuda") for _ in range(8)]
        graph.replay()
        assert torch.equal(result[1], chunk(fresh, x)[1])
        del waste


def test_several_streams_take_turns(kernel, model):
    """A video a stream, chunk by chunk in turn; nobody waits for anybody."""
    settings = dict(strict=True, step_share=None)  # which would learn from the first video
    with torch.no_grad(), lf.patched(model, "fast", **settings):
        caches = [model.new_cache(12, *SIZE) for _ in range(3)]

        def step(cache, seed, c):
            return model(latents(100 * seed + c), 500.0, cache=cache, start_frame=3 * c)

        alone = [[step(caches[0], seed, c) for c in range(4)] for seed in _reset(caches[0])]
        for cache in caches:
            cache.reset()
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in caches]
        mixed = [[], [], []]
        for c in range(4):
            for seed, (stream, cache) in enumerate(zip(streams, caches, strict=True)):
                with torch.cuda.stream(stream):
                    mixed[seed] += [step(cache, seed, c)]
        torch.cuda.synchronize()
    for one, other in zip(alone, mixed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _reset(cache):
    for seed in range(3):
        cache.reset()
        yield seed


def test_threads_on_one_stream(kernel, model):
    """Two videos in two threads, both on the default stream: workspaces are not shared."""
    rollout = Rollout(model)
    with lf.patched(model, "fast", strict=True):
        alone = [rollout.generate(12, size=SIZE, seed=s).latents for s in (1, 2)]
        for _ in range(3):
            together = [None, None]

            def run(i, together=together):
                together[i] = rollout.generate(12, size=SIZE, seed=i + 1).latents

            threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_memory_of_host_and_device_is_flat_over_10000_calls(kernel):
    config = WanConfig.named("tiny", dim=256, ffn_dim=256, num_heads=2, num_layers=1)
    model = CausalWan(config, seed=0, device="cuda", dtype=torch.bfloat16)
    layer = model.blocks[0].self_attn
    cache = model.new_cache(9, *SIZE)
    told, forward = [], type(layer).forward

    def spy(*args, **kwargs):
        told[:] = [(args, kwargs)]
        return forward(layer, *args, **kwargs)

    with torch.no_grad():
        layer.forward = spy
        begin(model, cache, 0, chunks=3)
        del layer.forward
        (args, kwargs), *_ = told
        with lf.patched(model, "fast", strict=True, step_share=None) as handle:

            def run(count):
                for _ in range(count):
                    layer(*args, **kwargs)
                torch.cuda.synchronize()
                return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

            before, host = run(2000), resident()
            assert run(10_000) == before
            assert resident() - host < 4 << 20
        assert handle.stats()["sparse_calls"] == 12_000
