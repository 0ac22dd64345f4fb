"""patch: what is found, what is replaced, and that it is undone exactly."""

import functools
import inspect
import threading

import fake_ar as ar
import pytest
import torch
from fake_ar import attentions, nothing_is_left_behind  # noqa: F401
from torch import nn

import lightforcing as lf
from lightforcing import hook

SMALL = {"block_q": 16, "block_k": 16}  # blocks that fit frames of 20 tokens
FAMILIES = [ar.InPlace, ar.Deferred, ar.Raw, ar.Rolling]


# ---- bit-identity and exact undoing ------------------------------------------------------


@pytest.mark.parametrize("layer", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sparsity_zero_is_bit_identical(layer, dtype):
    model = ar.make(layer, dtype=dtype)
    dense = ar.rollout(model, dtype=dtype)
    with lf.patched(model, sparsity=0, **SMALL) as handle:
        assert torch.equal(ar.rollout(model, dtype=dtype), dense)
    assert handle.stats()["dense"] == {"sparsity 0": 30}
    assert torch.equal(ar.rollout(model, dtype=dtype), dense)


@pytest.mark.parametrize("layer", FAMILIES)
def test_sparse_differs_and_unpatch_restores(layer):
    model = ar.make(layer)
    dense = ar.rollout(model)
    handle = lf.patch(model, "fast", **SMALL)
    assert not torch.equal(ar.rollout(model), dense)
    assert handle.stats()["sparse_calls"] == 24
    handle.unpatch()
    assert torch.equal(ar.rollout(model), dense)


def test_unpatch_restores_the_objects():
    model = ar.make()
    original, dictionaries = ar.attention, [dict(vars(m)) for m in model.modules()]
    handle = lf.patch(model)
    assert ar.attention is not original
    assert all(isinstance(a.forward, hook.Hook) for a in attentions(model))
    handle.unpatch()
    assert ar.attention is original
    for module, before in zip(model.modules(), dictionaries, strict=True):
        assert vars(module).keys() == before.keys()
        assert all(vars(module)[name] is value for name, value in before.items())
    handle.unpatch()  # harmless
    assert ar.attention is original


def test_an_instance_forward_is_kept_called_and_restored():
    model = ar.make()
    layer = attentions(model)[0]
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(1)
        return type(layer).forward(layer, *args, **kwargs)

    layer.forward = wrapped
    with lf.patched(model, **SMALL) as handle:
        ar.rollout(model, 2)
        assert len(calls) == 6 and handle.stats()["calls"] == 12
    assert vars(layer)["forward"] is wrapped


@pytest.mark.parametrize("keeps_wrapped", [True, False])
def test_somebody_wraps_the_patched_layer(keeps_wrapped):
    """Offload hooks: the forward that they saved is ours; unpatch leaves a pass-through."""
    model = ar.make()
    dense = ar.rollout(model, 2)
    handle = lf.patch(model, "fast", **SMALL)
    layer = attentions(model)[0]
    ours = layer.forward
    if keeps_wrapped:
        layer.forward = functools.wraps(ours)(lambda *a, **k: ours(*a, **k))
    else:
        layer._old_forward = ours
        layer.forward = lambda *a, **k: layer._old_forward(*a, **k)
    theirs = layer.forward
    ar.rollout(model, 2)
    assert handle.stats()["sparse_calls"] == 6
    assert lf.patch(model, sparsity=0.5, **SMALL) is handle and layer.forward is theirs
    handle.unpatch()
    assert layer.forward is theirs and not handle.active
    assert torch.equal(ar.rollout(model, 2), dense)
    again = lf.patch(model, "fast", **SMALL)
    ar.rollout(model, 2)
    assert len(again.hooks) == 2 and again.stats()["sparse_calls"] == 6
    again.unpatch()


def test_somebody_replaces_the_global_after_us():
    model, original = ar.make(), ar.attention
    dense = ar.rollout(model, 3)
    handle = lf.patch(model, "fast", **SMALL)
    shim = ar.attention
    theirs = lambda q, k, v: shim(q, k, v)  # noqa: E731
    ar.attention = theirs
    ar.rollout(model, 3)
    assert handle.stats()["sparse_calls"] == 12
    assert lf.patch(model, "fast", **SMALL) is handle  # cannot see through it: goes on top
    ar.rollout(model, 3)
    assert handle.stats()["calls"] == 18 and handle.stats()["sparse_calls"] == 12
    handle.unpatch()
    assert ar.attention is theirs
    assert torch.equal(ar.rollout(model, 3), dense)
    ar.attention = original


def test_nothing_is_added_to_the_model():
    model = ar.make()
    names = [n for n, _ in model.named_parameters()], [n for n, _ in model.named_buffers()]
    modules, state = [n for n, _ in model.named_modules()], list(model.state_dict())
    with lf.patched(model, **SMALL):
        ar.rollout(model, 2)
        assert [n for n, _ in model.named_parameters()] == names[0]
        assert [n for n, _ in model.named_buffers()] == names[1]
        assert [n for n, _ in model.named_modules()] == modules
        assert list(model.state_dict()) == state
        model.load_state_dict(ar.make(seed=3).state_dict())


def test_signature_and_repr_of_the_patched_forward():
    model = ar.make()
    layer = attentions(model)[0]
    signature = inspect.signature(layer.forward)
    with lf.patched(model):
        assert inspect.signature(layer.forward) == signature
        assert "InPlace.forward" in repr(layer.forward)
        assert inspect.signature(ar.attention).parameters["causal"].default is False


# ---- patching twice, context managers ----------------------------------------------------


def test_patching_twice_updates_the_settings():
    model = ar.make()
    handle = lf.patch(model, "fast", **SMALL)
    hooks = [a.forward for a in attentions(model)]
    ar.rollout(model)
    assert lf.patch(model, sparsity=0.5, **SMALL) is handle is lf.handle_of(model)
    assert [a.forward for a in attentions(model)] == hooks
    assert handle.config.sparsity == 0.5 and handle.stats()["calls"] == 0
    assert lf.patch(ar.Pipeline(model), "paper") is handle
    handle.unpatch()
    assert lf.handle_of(model) is None and not handle.active


def test_a_layer_of_a_patched_model_is_the_same_patch():
    model = ar.make()
    handle = lf.patch(model, **SMALL)
    assert lf.patch(model.blocks[1], "fast") is handle
    assert [h.layer for h in handle.hooks] == [0, 1] and handle.depth == 2
    handle.unpatch()


def test_models_patched_one_by_one_join_in_one_handle():
    a, b = ar.make(), ar.make(seed=1)
    first, second = lf.patch(a, **SMALL), lf.patch(b, **SMALL)
    assert first is not second
    joined = lf.patch([a, b], **SMALL)
    assert joined is first and [h.layer for h in joined.hooks] == [0, 1, 2, 3]
    assert not second.active
    second.unpatch()
    assert len(joined.hooks) == 4
    joined.unpatch()


def test_handle_is_a_context_manager():
    model = ar.make()
    with lf.patch(model) as handle:
        assert handle.active
    assert not handle.active and "forward" not in vars(attentions(model)[0])


def test_patched_inside_patch_gives_settings_and_counts_back():
    model = ar.make()
    handle = lf.patch(model, "fast", **SMALL)
    ar.rollout(model)
    with lf.patched(model, sparsity=0) as inner:
        assert inner is handle
        ar.rollout(model, 2)
        assert handle.stats()["sparse_calls"] == 0
    assert handle.active and handle.config == lf.Config.preset("fast", **SMALL)
    assert handle.stats()["sparse_calls"] == 24
    handle.unpatch()


def test_patched_undoes_itself_after_an_error():
    model = ar.make()
    with pytest.raises(ZeroDivisionError), lf.patched(model):
        raise ZeroDivisionError
    assert "forward" not in vars(attentions(model)[0])


def test_dense_context_nests_and_is_of_its_thread():
    model = ar.make()
    dense = ar.rollout(model)
    with lf.patched(model, "fast", **SMALL) as handle:
        with lf.dense():
            with lf.dense():
                pass
            assert torch.equal(ar.rollout(model), dense)
            thread = threading.Thread(target=ar.rollout, args=(model,))
            thread.start()
            thread.join()
        assert handle.stats()["dense"] == {"lf.dense()": 30, "first chunk": 6}
        assert handle.stats()["sparse_calls"] == 24
        handle.reset()
        ar.rollout(model)
        assert handle.stats()["sparse_calls"] == 24


# ---- where models hide -------------------------------------------------------------------


class Wrapper(nn.Module):
    """As FSDP and friends: a module around the model whose forward takes anything."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_finds_layers_through_wrappers_and_pipelines():
    model = ar.make(layers=3)
    for target in (model, Wrapper(model), ar.Pipeline(model), ar.Pipeline(Wrapper(model)), [model]):
        with lf.patched(target) as handle:
            assert [h.module for h in handle.hooks] == attentions(model)
            assert lf.handle_of(target) is handle


def test_a_module_that_hides_the_model_in_a_plain_attribute():
    model, pipeline = ar.make(), nn.Linear(2, 2)
    pipeline.hidden = [model]
    with lf.patched(pipeline) as handle:
        assert [h.module for h in handle.hooks] == attentions(model)
        assert lf.handle_of(pipeline) is handle
        model.num_frame_per_block = 5
        assert handle.chunk_frames == 5


def test_a_layer_wrapped_in_a_module():
    model = ar.make()
    layer = model.blocks[0].self_attn
    model.blocks[0].self_attn = Wrapper(layer)
    with lf.patched(model, "fast", **SMALL) as handle:
        assert handle.hooks[0].module is layer
        ar.rollout(model)
        assert handle.stats()["sparse_calls"] == 24


def test_finds_layers_below_a_class_swapped_underneath():
    """Offloaders swap the class of a module for a subclass of it."""
    model = ar.make()
    for layer in attentions(model):
        layer.__class__ = type("Swapped", (type(layer),), {})
    with lf.patched(model, "fast", **SMALL) as handle:
        ar.rollout(model)
        assert handle.stats()["sparse_calls"] == 24


def test_decorated_forward_is_looked_through():
    class Decorated(ar.InPlace):
        forward = torch.no_grad()(ar.InPlace.forward)

    model = ar.make(Decorated)
    with lf.patched(model, "fast", **SMALL) as handle:
        ar.rollout(model)
        assert handle.stats()["sparse_calls"] == 24


@pytest.mark.parametrize(
    "target, kind",
    [
        (ar.Model, "the class Model"),
        ("model.pt", "str"),
        (ar.make().state_dict(), "OrderedDict"),
    ],
)
def test_what_is_no_instance_is_told_so(target, kind):
    for use in (lf.patch, lambda target: lf.capture(target, "never-made")):
        with pytest.raises(ValueError) as failure:
            use(target)
        assert str(failure.value) == (
            f"target: expected a model instance, or what holds one, got {kind}"
        )


def test_nothing_found_says_what_was_missing():
    with pytest.raises(ValueError) as failure:
        lf.patch(nn.Linear(2, 2))
    assert str(failure.value) == (
        "target: expected a model with causal self-attention, got Linear (1 modules). Looked for "
        "modules that have num_heads, and whose forward has a parameter kv_cache and calls a "
        "global function attention(q, k, v); no module has any of the three."
    )
    with pytest.raises(ValueError) as failure:
        lf.patch(ar.Model(ar.Unsplit, layers=3))
    text = str(failure.value)
    assert "got Model (" in text
    assert "Unsplit (3 of them) fails in that it calls no global function attention" in text
    assert "Block (3 of them) fails in that it calls no global function attention" in text
    with pytest.raises(ValueError, match=r"got NoneType \(0 modules\)"):
        lf.patch(None)


def test_wrong_settings_leave_the_model_alone():
    model = ar.make()
    for settings in ({"preset": "turbo"}, {"sparsity": 2}, {"keep_frames": 1}):
        with pytest.raises(ValueError):
            lf.patch(model, **settings)
    for settings in ({"speed": 1}, {"config": 3}, {"dense_layers": 1}):
        with pytest.raises(TypeError):
            lf.patch(model, **settings)
    assert "forward" not in vars(attentions(model)[0])


def test_config_objects_and_dicts():
    model = ar.make()
    config = lf.Config.preset("paper", sparsity=0.5)
    with lf.patched(model, config=config, probe=4) as handle:
        assert handle.config == config.replace(probe=4)
        assert lf.patch(model, config=config.to_dict()).config == config
        assert lf.patch(model, config=config, sparsity=0.7).config.sparsity == 0.7
        assert lf.patch(model, config=config, strict=True).config.strict


def test_cuda_model_without_cuda_kernels(monkeypatch):
    """There is no GPU to put the model on: its device is told by a stand-in."""

    class OnGpu:
        device = torch.device("cuda:0")

    model = ar.make()
    for layer in attentions(model):
        layer.parameters = lambda: iter([OnGpu])
    from lightforcing import reasons

    monkeypatch.setattr(reasons, "cuda_kernels", lambda: False)
    with pytest.raises(RuntimeError) as failure:
        lf.patch(model)
    assert "got one on cuda:0" in str(failure.value) and "pip install" in str(failure.value)
    assert "forward" not in vars(attentions(model)[0])


# ---- errors, threads, torch.compile, several handles ----------------------------------------


def test_an_error_inside_forward_clears_the_context():
    model = ar.make()
    dense = ar.rollout(model)
    with lf.patched(model, "fast", **SMALL) as handle:
        sparse = ar.rollout(model)
        with pytest.raises(RuntimeError):
            model(torch.zeros(1, 3 * ar.T, 31), kv_cache=ar.new_cache(model))
        assert hook.local.visit is None
        q = torch.ones(1, 4, 2, 16)
        ar.attention(q, q, q)  # outside of any forward
        handle.reset()
        assert torch.equal(ar.rollout(model), sparse)
    assert torch.equal(ar.rollout(model), dense)


def test_two_rollouts_in_two_threads_on_one_model():
    model = ar.make()
    with lf.patched(model, "fast", **SMALL) as handle:
        alone = [ar.rollout(model, seed=s) for s in (1, 2)]
        handle.reset()
        together = [None, None]

        def run(i):
            together[i] = ar.rollout(model, seed=i + 1)

        threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
        assert handle.stats()["calls"] == 60 and handle.stats()["sparse_calls"] == 48


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled_first", [False, True])
def test_torch_compile_before_and_after(compiled_first):
    model = ar.make(layers=1)
    with lf.patched(model, "fast", **SMALL):
        sparse = ar.rollout(model, 3, steps=1)
    if compiled_first:
        model.compile(backend="eager")
        ar.rollout(model, 2, steps=1)
    with lf.patched(model, "fast", **SMALL) as handle:
        if not compiled_first:
            model.compile(backend="eager")
        assert torch.equal(ar.rollout(model, 3, steps=1), sparse)
        assert handle.stats()["sparse_calls"] == 4 and handle.stats()["calls"] == 6


@pytest.mark.filterwarnings("ignore")
def test_torch_compile_does_not_see_the_bookkeeping(monkeypatch):
    """Neither traced, nor met as frames of its own."""
    seen, model = [], ar.make(layers=1)

    def unseen(method):
        def run(*args):
            seen.append(hook.is_watched())
            return method(*args)

        return run

    for name in ("enter", "attend", "leave"):
        monkeypatch.setattr(lf.Handle, name, unseen(getattr(lf.Handle, name)))
    with lf.patched(model, "fast", **SMALL) as handle:
        model.compile(backend="eager")
        ar.rollout(model, 3, steps=1)
        assert handle.stats()["sparse_calls"] == 4
    assert seen == [False] * 18


def test_layers_taken_over_leave_the_old_handle_nothing():
    a, b, original = ar.make(), ar.make(seed=1), ar.attention
    first, second = lf.patch(a, **SMALL), lf.patch(b, **SMALL)
    assert lf.patch([a, b], **SMALL) is first
    first.unpatch()
    assert ar.attention is original and not second.active


def test_layers_left_with_the_old_handle_stay_patched():
    a, b = ar.make(), ar.make(seed=1)
    first, second = lf.patch(a, **SMALL), lf.patch(b, "fast", **SMALL)
    assert lf.patch([a, b.blocks[0]], **SMALL) is first
    first.unpatch()
    ar.rollout(b, 2)
    assert second.stats()["sparse_calls"] == 3  # its second layer
    second.unpatch()
