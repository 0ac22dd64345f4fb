"""capture: what is written is what the layers computed, and nothing else changes."""

import json

import fake_ar as ar
import pytest
import torch
from fake_ar import nothing_is_left_behind  # noqa: F401
from safetensors.torch import save_file
from small_wan import HEIGHT, WIDTH, build

import lightforcing as lf
from lightforcing import capturing
from lightforcing.models import Rollout, WanConfig

SMALL = {"block_q": 16, "block_k": 16}  # blocks that fit frames of 20 tokens
FAMILIES = [ar.InPlace, ar.Deferred, ar.Raw, ar.Rolling]


def tiny_wan():
    config = WanConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=3, freq_dim=32,
                       cross_attention=False)  # fmt: skip
    return build(config).float()


def spied(monkeypatch):
    """The arguments of every dense self-attention call of fake_ar, copied."""
    seen, original = [], ar.attention

    def attention(q, k, v):
        if k.shape[1] != 7:  # cross-attention's
            seen.append(tuple(x.clone() for x in (q, k, v)))
        return original(q, k, v)

    monkeypatch.setattr(ar, "attention", attention)
    return seen


# ---- what is written ---------------------------------------------------------------------


@pytest.mark.parametrize("layer", FAMILIES)
def test_a_file_holds_what_the_layer_gave_its_dense_call(layer, tmp_path, monkeypatch):
    seen, model = spied(monkeypatch), ar.make(layer)
    with lf.capture(model, tmp_path, layers=(0, 1), chunks=(1, 2, 3), steps=None) as captured:
        ar.rollout(model, 3)
    assert len(captured.files) == len(seen) == 3 * 3 * 2  # chunks, forwards, layers
    for path, tensors in zip(captured.files, seen, strict=True):
        call = capturing.load(path)
        for name, expected in zip("qkv", tensors, strict=True):
            assert torch.equal(getattr(call, name), expected)
    assert captured.nbytes == sum(x.nbytes for call in seen for x in call)


def test_a_grid_of_no_tokens_is_no_grid(tmp_path):
    """As for patch: the facts say what a selector would have been told."""
    model = ar.make(ar.Deferred)

    def blank(module, args):
        return (*args[:2], torch.tensor([[3, 0, 0]]), *args[3:])

    for layer in ar.attentions(model):
        layer.register_forward_pre_hook(blank)
    with lf.patched(model, sparsity=0, frame_tokens=ar.T), lf.capture(model, tmp_path):
        ar.rollout(model, 2)
    grids = [call.facts.grid for call in capturing.load_folder(tmp_path)]
    assert grids == [None, None]


def test_the_facts_of_a_call(tmp_path):
    model = ar.make(num_heads=2, local_attn_size=9, sink_size=1)
    with lf.capture(model, tmp_path, chunks=(4,)):
        ar.rollout(model, 5, cache=ar.new_cache(model, frames=9))
    calls = list(capturing.load_folder(tmp_path))
    assert [c.facts.layer for c in calls] == [0, 1]
    assert calls[1].facts == capturing.Facts(
        layer=1, chunk=4, step=0, number=0, first_frame=9, frame_tokens=ar.T,
        grid=(ar.HEIGHT, ar.WIDTH), frames_per_chunk=3, window=9, scale=0.25, model="InPlace",
        sink_frames=1,
    )  # fmt: skip
    assert calls[0].q.shape == (1, 3 * ar.T, 2, 16) and calls[0].k.shape[1] == 9 * ar.T


def test_by_default_first_middle_and_last_layer_of_chunks_with_a_past(tmp_path):
    model = ar.make(layers=5)
    with lf.capture(model, tmp_path):
        ar.rollout(model, 3)
    facts = [c.facts for c in capturing.load_folder(tmp_path)]
    assert {f.layer for f in facts} == {0, 2, 4}
    assert {f.chunk for f in facts} == {2, 3} and {f.step for f in facts} == {0}


def test_two_caches_are_two_files(tmp_path):
    """Guidance runs two caches through one layer: the same place of the video, twice."""
    model = ar.make()
    caches = [ar.new_cache(model) for _ in range(2)]
    with lf.capture(model, tmp_path, layers=(-1,), chunks=(2,)) as captured:
        for start in (0, 3 * ar.T):
            for seed, cache in enumerate(caches):
                model(ar.noise(3, seed=seed), kv_cache=cache, current_start=start)
    assert [p.name for p in captured.files] == [
        "layer01-chunk002-step0-0.safetensors",
        "layer01-chunk002-step0-1.safetensors",
    ]
    first, second = (capturing.load(p).q for p in captured.files)
    assert not torch.equal(first, second)


def test_a_scale_is_told_and_other_arguments_are_skipped(tmp_path, monkeypatch):
    model, extra = ar.make(), {"softmax_scale": 0.5}
    first, second = ar.new_cache(model), ar.new_cache(model)
    with lf.capture(model, tmp_path, layers=(0,), chunks=(1,)) as captured:
        shim = ar.attention
        monkeypatch.setattr(ar, "attention", lambda q, k, v: shim(q, k, v, **extra))
        model(ar.noise(3), kv_cache=first)
        extra["causal"] = True
        model(ar.noise(3), kv_cache=second)
        monkeypatch.undo()
    assert [capturing.load(p).facts.scale for p in captured.files] == [0.5]
    assert dict(captured.skipped) == {"extra argument causal=True": 1}


def test_bfloat16_stays_bfloat16(tmp_path):
    model = ar.make(dtype=torch.bfloat16)
    with lf.capture(model, tmp_path, layers=(0,), chunks=(2,)) as captured:
        ar.rollout(model, 2, dtype=torch.bfloat16)
    assert capturing.load(captured.files[0]).k.dtype == torch.bfloat16


def test_the_limit_ends_the_writing(tmp_path):
    model = ar.make()
    one = (3 + 6 + 6) * ar.T * 32 * 4
    with lf.capture(model, tmp_path, layers=(0,), steps=None, limit=2.5 * one / 2**30) as captured:
        ar.rollout(model, 2)
    assert len(captured.files) == 2 and captured.nbytes == 2 * one
    assert list(captured.skipped.values()) == [1] and "limit" in repr(captured)


def test_watch_gives_the_same_calls_without_files(tmp_path):
    model, seen = ar.make(), []
    with capturing.watch(model, lambda call: seen.append((call.facts, call.k.clone()))) as watch:
        ar.rollout(model, 3)
    with lf.capture(model, tmp_path) as captured:
        ar.rollout(model, 3)
    assert watch.calls == len(seen) == len(captured.files) == 4
    for (facts, k), path in zip(seen, captured.files, strict=True):
        assert capturing.load(path).facts == facts and torch.equal(capturing.load(path).k, k)


# ---- nothing changes ----------------------------------------------------------------------


@pytest.mark.parametrize("layer", FAMILIES)
@pytest.mark.parametrize("patched", [False, True])
def test_results_do_not_change(layer, patched, tmp_path):
    model = ar.make(layer)
    handle = lf.patch(model, "fast", **SMALL) if patched else None
    expected = ar.rollout(model)
    before = handle and handle.stats()["sparse_calls"]
    with lf.capture(model, tmp_path, steps=None):
        assert torch.equal(ar.rollout(model), expected)
    assert torch.equal(ar.rollout(model), expected)
    if patched:
        assert handle.stats()["sparse_calls"] == 3 * before
        assert capturing.load(next(iter(tmp_path.iterdir()))).facts.patched == (
            handle.config.to_dict()
        )
        handle.unpatch()


def test_the_unpatched_model_is_restored_exactly(tmp_path):
    model, original = ar.make(), ar.attention
    before = [dict(vars(m)) for m in model.modules()]
    running = lf.capture(model, tmp_path)
    assert running.active and ar.attention is not original
    running.close()
    running.close()
    assert not running.active and ar.attention is original
    for module, attributes in zip(model.modules(), before, strict=True):
        assert vars(module).keys() == attributes.keys()


def test_a_patch_made_meanwhile_stays(tmp_path):
    model = ar.make()
    with lf.capture(model, tmp_path):
        handle = lf.patch(model, "fast", **SMALL)
    assert handle.active and not hasattr(handle, "watch")
    handle.unpatch()


def test_our_wan_is_captured_through_its_rollout(tmp_path):
    model = tiny_wan()
    sampler, options = Rollout(model), {"size": (HEIGHT, WIDTH), "seed": 5}
    expected = sampler.generate(9, **options).latents
    with lf.capture(sampler, tmp_path, chunks=(3,), steps=(0, 4)) as captured:
        assert torch.equal(sampler.generate(9, **options).latents, expected)
    calls = [capturing.load(p) for p in captured.files]
    assert [(c.facts.layer, c.facts.step) for c in calls] == [
        (layer, step) for step in (0, 4) for layer in (0, 1, 2)
    ]
    tokens = HEIGHT * WIDTH // 4
    assert calls[0].facts.grid == (HEIGHT // 2, WIDTH // 2)
    assert calls[0].q.shape == (1, 3 * tokens, 2, 24) and calls[0].k.shape[1] == 9 * tokens
    # The query's own keys are the last ones: q and k of a step differ from another step's there.
    first, last = calls[0].k, calls[3].k
    assert torch.equal(first[:, : 6 * tokens], last[:, : 6 * tokens])
    assert not torch.equal(first[:, 6 * tokens :], last[:, 6 * tokens :])


# ---- what is refused ----------------------------------------------------------------------


def test_what_is_refused(tmp_path):
    model = ar.make()
    with pytest.raises(ValueError, match=r"layers: expected layers of the 2 found, got \[2\]"):
        lf.capture(model, tmp_path / "a", layers=(2,))
    with pytest.raises(ValueError, match="target: expected a model with causal self-attention"):
        lf.capture(torch.nn.Linear(2, 2), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with lf.capture(model, tmp_path / "b", layers=(0,)):
        with pytest.raises(ValueError, match="not being captured, .* end that capture first"):
            lf.capture(model, tmp_path / "c")
        ar.rollout(model, 2)
    with pytest.raises(FileExistsError, match="expected one without .safetensors files"):
        lf.capture(model, tmp_path / "b")
    save_file({"q": torch.zeros(1)}, tmp_path / "d.safetensors", {"format": json.dumps("else")})
    with pytest.raises(ValueError, match="expected a file of lightforcing.capture"):
        capturing.load(tmp_path / "d.safetensors")
    with pytest.raises(FileNotFoundError, match="expected .safetensors files of a capture"):
        capturing.load_folder(tmp_path / "c")


def test_wrong_settings_and_an_empty_capture_are_told(tmp_path, caplog):
    model = ar.make()
    for chunks in ((0,), (2, -1)):
        with pytest.raises(ValueError, match="chunks: expected numbers counted from 1, got"):
            lf.capture(model, tmp_path / "a", chunks=chunks)
    for layers in ("all", 1, [0.5]):
        with pytest.raises(TypeError, match="layers: expected a list of integers, such as"):
            lf.capture(model, tmp_path / "a", layers=layers)
    for name, value in (("steps", "0"), ("steps", 0), ("chunks", "3"), ("chunks", 3)):
        with pytest.raises(TypeError, match=rf"{name}: expected a list .*\[3\], got {value!r}"):
            lf.capture(model, tmp_path / "a", **{name: value})
    for name in ("layers", "chunks", "steps"):
        with pytest.raises(ValueError, match=f"{name}: expected at least one number"):
            lf.capture(model, tmp_path / "a", **{name: []})
    with pytest.raises(ValueError, match=r"steps: expected numbers counted from 0, got \[-1\]"):
        lf.capture(model, tmp_path / "a", steps=[-1])
    for folder in ("", None, 5):
        with pytest.raises(TypeError, match="folder: expected the path of a folder, got"):
            lf.capture(model, folder)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="folder: expected a folder, got .*, which is a file"):
        lf.capture(model, tmp_path / "file")
    for limit in ("8", None, float("nan")):
        with pytest.raises(ValueError, match="limit: expected GiB, a number above 0, got"):
            lf.capture(model, tmp_path / "a", limit=limit)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match=f"grid: expected rows and columns of a frame's {ar.T} "):
        with lf.capture(model, tmp_path / "b", grid=(3, 3)):
            ar.rollout(model, 2)
    caplog.clear()
    with lf.capture(model, tmp_path / "c", chunks=(9,)):
        ar.rollout(model, 2)
    assert "capture: no call was captured; skipped: none" in caplog.text
    caplog.clear()
    with lf.capture(model, tmp_path / "d"):
        ar.rollout(model, 2)
    assert not caplog.text
