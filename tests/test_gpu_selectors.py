"""Selectors on the GPU: the CPU's lists, no waiting for the device, and a patched model."""

import dataclasses
import warnings

import pytest
import torch
from gpu import needs_gpu

import lightforcing as lf
from lightforcing.models import CausalWan, Rollout, WanConfig
from lightforcing.selectors import Geometry, Mass, exact, make, metrics, names

pytestmark = needs_gpu
GEOMETRIES = [
    Geometry(256, 3, 9, 17, 16, 16, (16, 16), "morton"),
    Geometry(104, 3, 12, 5, 128, 64, (8, 13)),
]
STATIC = ("dense", "random", "sta", "radial")
EXACT = [n for n in names() if make(n).exact]


def tensors(g, device, dim=64, batch=2, heads=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(batch, n, heads, dim) for n in (g.q_len, g.k_len, g.k_len)]
    # Smooth over tokens, so that blocks differ by more than rounding.
    walk = [torch.randn(s, generator=draw).cumsum(1) for s in shapes]
    return [(w / w.std() * 1.2).to(device, torch.bfloat16) for w in walk]


@pytest.mark.parametrize("g", GEOMETRIES, ids=["tiles", "ragged"])
@pytest.mark.parametrize("name", names())
def test_lists_are_the_cpus(name, g):
    for layer in range(3):
        g = dataclasses.replace(g, layer=layer)
        (q, k, _), (cq, ck, _) = tensors(g, "cuda"), tensors(g, "cpu")
        there, here = make(name).select(q, k, g), make(name).select(cq, ck, g)
        assert there.indices.is_cuda and there.counts.is_cuda
        a, b = there.to_bool().cpu(), here.to_bool()
        if name in STATIC:
            assert torch.equal(a, b)
        assert (a & b).sum() >= 0.995 * b.sum(), "other blocks than on the CPU"
        if name in EXACT:
            assert (there.counts == g.kept).all()


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_selector_waits_for_nothing(name):
    g = GEOMETRIES[0]
    q, k, _ = tensors(g, "cuda")
    make(name).select(q, k, g)
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says that the mode does not detect everything
        try:
            torch.cuda.set_sync_debug_mode("error")
            make(name).select(q, k, g)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("g", GEOMETRIES, ids=["tiles", "ragged"])
def test_metrics_are_the_cpus(g):
    (q, k, v), (cq, ck, cv) = tensors(g, "cuda"), tensors(g, "cpu")
    for name in ("random", "mass", "sparge-topp"):
        here = make(name).select(cq, ck, g)
        there = lf.BlockList(here.indices.cuda(), here.counts.cuda(), *here._row()[2:])
        one, two = metrics.measure(cq, ck, cv, here), metrics.measure(q, k, v, there)
        for what in ("recall", "recall_p5", "rel_l1", "rel_l2", "density"):
            assert two[what] == pytest.approx(one[what], abs=2e-4), what
    mass = metrics.true_mass(q, k, frame_tokens=g.frame_tokens, block_k=g.block_k)
    own = metrics.true_mass(cq, ck, frame_tokens=g.frame_tokens, block_k=g.block_k)
    torch.testing.assert_close(mass.cpu(), own, atol=2e-4, rtol=2e-4)


def test_probabilities_lose_nothing_to_16_bits():
    g = GEOMETRIES[0]
    q, k, _ = tensors(g, "cuda")
    truth = (q.transpose(1, 2).double() @ k.transpose(1, 2).double().mT * 0.125).softmax(-1)
    truth = truth.flatten(0, 1)
    for some, part, p in exact.slabs(q, k, 16):
        torch.testing.assert_close(p.double(), truth[some, part], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("selector", [*names(), Mass(guarantee=0.3)])
def test_a_patched_model(selector):
    config = WanConfig.named("tiny", dim=256, ffn_dim=256, num_heads=2, num_layers=2)
    model = CausalWan(config, seed=0, device="cuda", dtype=torch.bfloat16)
    settings = {"schedule": [0, 0.5, 0.6, 0.7], "strict": True, "probe": 8, "refresh": 2}
    with lf.patch(model, selector=selector, **settings) as handle:
        video = Rollout(model).generate(12, size=(16, 26), seed=0).latents
        stats = handle.stats()
    assert video.isfinite().all() and stats["sparse_calls"] == 3 * 5 * 2
    assert 0 < stats["recall"] <= 1 + 1e-3 and isinstance(stats["density"], float)
