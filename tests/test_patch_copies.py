"""patch: copies, pickles, two checkouts in one process, LoRA, and another contract."""

import copy
import importlib.util
import inspect
import io
import pickle
import subprocess
import sys
from pathlib import Path

import fake_ar as ar
import pytest
import torch
from fake_ar import attentions, nothing_is_left_behind  # noqa: F401
from torch import nn

import lightforcing as lf
from lightforcing import hook

SMALL = {"block_q": 16, "block_k": 16}
FAMILIES = [ar.InPlace, ar.Deferred, ar.Raw, ar.Rolling]


# ---- copies ------------------------------------------------------------------------------


def test_deep_copy_is_patched_on_its_own():
    model = ar.make()
    dense = ar.rollout(model)
    handle = lf.patch(model, "fast", **SMALL)
    sparse = ar.rollout(model)
    twin = copy.deepcopy(model)
    other = lf.handle_of(twin)
    assert other is not handle and other.config == handle.config
    assert [h.module for h in other.hooks] == attentions(twin)
    assert [h.module for h in handle.hooks] == attentions(model)
    assert torch.equal(ar.rollout(twin), sparse)
    assert other.stats()["sparse_calls"] == 24 and handle.stats()["sparse_calls"] == 24
    handle.unpatch()
    assert torch.equal(ar.rollout(model), dense)
    assert torch.equal(ar.rollout(twin), sparse)  # the shim stays for the copy
    assert lf.patch(twin, sparsity=0, **SMALL) is other
    assert torch.equal(ar.rollout(twin), dense)
    other.unpatch()
    assert "forward" not in vars(attentions(twin)[0]) and inspect.isfunction(ar.attention)


def test_deep_copy_of_one_layer_copies_no_other():
    model = ar.make(layers=3)
    with lf.patched(model):
        twin = copy.deepcopy(model.blocks[1].self_attn)
        other = lf.handle_of(twin)
        assert [h.module for h in other.hooks] == [twin]
        other.unpatch()


def test_pickle_and_torch_save():
    model = ar.make()
    handle = lf.patch(model, "fast", **SMALL)
    sparse = ar.rollout(model)
    text = pickle.dumps(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    handle.unpatch()
    assert inspect.isfunction(ar.attention)
    stream.seek(0)
    for twin in (pickle.loads(text), torch.load(stream, weights_only=False)):
        assert torch.equal(ar.rollout(twin), sparse)  # patches the globals at its first call
        other = lf.handle_of(twin)
        assert other.stats()["sparse_calls"] == 24 and len(other.hooks) == 2
        other.unpatch()


def test_pickle_into_a_new_process(tmp_path):
    model = ar.make()
    with lf.patched(model, "fast", **SMALL):
        sparse = ar.rollout(model)
        (tmp_path / "model").write_bytes(pickle.dumps((model, sparse)))
    code = (
        "import pickle, sys; sys.path.insert(0, sys.argv[1]);"
        "model, sparse = pickle.load(open(sys.argv[2], 'rb'));"
        "import fake_ar as ar, torch, lightforcing as lf;"
        "assert torch.equal(ar.rollout(model), sparse);"
        "assert lf.handle_of(model).stats()['sparse_calls'] == 24"
    )
    here = Path(__file__).resolve().parent
    subprocess.run(
        [sys.executable, "-c", code, here, tmp_path / "model"], check=True, cwd=here.parent
    )


def test_a_dead_model_leaves_nothing():
    import gc
    import weakref

    model = ar.make()
    lf.patch(model, **SMALL)
    ar.rollout(model, 2)
    ghosts = [weakref.ref(model), weakref.ref(lf.handle_of(model))]
    del model
    gc.collect()
    assert [ghost() for ghost in ghosts] == [None, None]


# ---- two checkouts in one process --------------------------------------------------------


def checkout():
    """The file of models loaded once more under its own name, as a second checkout would be."""
    spec = importlib.util.spec_from_file_location("fake_ar", ar.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_checkouts_of_one_module_name():
    other = checkout()
    a, b, c = ar.make(), other.make(), other.make()
    dense = ar.rollout(a)
    originals = ar.attention, other.attention
    handle = lf.patch(a, "fast", **SMALL)
    assert other.attention is originals[1]
    assert torch.equal(other.rollout(b), dense)
    assert handle.stats()["calls"] == 0
    second, third = lf.patch(b, "fast", **SMALL), lf.patch(c, sparsity=0)
    assert torch.equal(other.rollout(b), ar.rollout(a))
    assert handle.stats()["calls"] == second.stats()["calls"] == 30
    handle.unpatch()
    assert ar.attention is originals[0] and other.attention is not originals[1]
    second.unpatch()
    assert other.attention is not originals[1]  # c is patched still
    assert torch.equal(other.rollout(c), dense) and third.stats()["calls"] == 30
    third.unpatch()
    assert other.attention is originals[1]


def test_an_unpatched_model_of_the_same_file_is_untouched():
    patched, plain = ar.make(), ar.make(seed=1)
    dense = ar.rollout(plain)
    with lf.patched(patched, "fast", **SMALL) as handle:
        assert torch.equal(ar.rollout(plain), dense)
        assert handle.stats()["calls"] == 0


# ---- LoRA, and another contract ----------------------------------------------------------


class Lora(nn.Module):
    """What LoRA libraries put in a linear layer's place."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(32, 2, bias=False), nn.Linear(2, 32, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def add_lora(model):
    torch.manual_seed(5)
    for layer in attentions(model):
        layer.q, layer.v = Lora(layer.q), Lora(layer.v)
    return model.requires_grad_(False)


@pytest.mark.parametrize("layer", FAMILIES)
def test_lora_layers_before_and_after(layer):
    before, after = add_lora(ar.make(layer)), ar.make(layer)
    dense = ar.rollout(before)
    with lf.patched(before, "fast", **SMALL), lf.patched(after, "fast", **SMALL) as handle:
        add_lora(after)
        sparse = ar.rollout(before)
        assert torch.equal(ar.rollout(after), sparse) and not torch.equal(sparse, dense)
        assert handle.stats()["sparse_calls"] == 24
    assert torch.equal(ar.rollout(after), dense)


def test_peft_before_and_after():
    peft = pytest.importorskip("peft")

    def wrap(model):
        torch.manual_seed(5)
        config = peft.LoraConfig(target_modules=["q", "v"], r=2, init_lora_weights=False)
        return peft.get_peft_model(model, config).eval().requires_grad_(False)

    before, after = wrap(ar.make()), ar.make()
    dense = ar.rollout(before.base_model.model)
    handles = lf.patch(before, "fast", **SMALL), lf.patch(after, "fast", **SMALL)
    after = wrap(after)
    assert lf.handle_of(after) is handles[1]
    sparse = ar.rollout(before.base_model.model)
    assert torch.equal(ar.rollout(after.base_model.model), sparse)
    assert not torch.equal(sparse, dense)
    for handle in handles:
        assert handle.stats()["sparse_calls"] == 24
        handle.unpatch()
    assert torch.equal(ar.rollout(after.base_model.model), dense)


class Split(nn.Module):
    """Another contract: the layer gets q, k, v, and ends in a submodule."""

    def __init__(self):
        super().__init__()
        self.attn = Inner()

    def forward(self, q, k, v, frame_seqlen, start):
        return self.attn(q, k, v)


class Inner(nn.Module):
    def forward(self, q, k, v):
        return ar.attention(q, k, v)


class Routed:
    """In the adapter's place of a shim."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, *args, **kwargs):
        return hook.route(type(self.inner).forward.__get__(self.inner), args, kwargs)


class SplitAdapter(lf.Adapter):
    name = "split"

    def find(self, modules):
        return [m for m in modules if isinstance(m, Split)]

    def context(self, layer, arguments):
        return lf.Call(start=arguments["start"], frame_tokens=arguments["frame_seqlen"])

    def install(self, layer, user):
        layer.attn.forward = Routed(layer.attn)

    def remove(self, layer, user):
        del layer.attn.forward


def test_register_adapter():
    from lightforcing import adapters

    model = nn.Sequential(Split(), Split())
    with pytest.raises(ValueError):
        lf.patch(model)
    adapter = lf.register_adapter(SplitAdapter())
    try:
        with pytest.raises(ValueError, match="split: no layer found. Looked for modules"):
            lf.patch(nn.Linear(2, 2))
        q, k = torch.randn(1, 60, 2, 16), torch.randn(1, 120, 2, 16)
        with lf.patched(model, sparsity=0.5, law="constant", **SMALL) as handle:
            out = model[1](q, k, k, 20, start=60)
            assert handle.stats()["sparse_calls"] == 1
            assert not torch.equal(out, ar.attention(q, k, k))
            twin = copy.deepcopy(model)
            assert torch.equal(twin[1](q, k, k, frame_seqlen=20, start=60), out)
            lf.handle_of(twin).unpatch()
        assert "forward" not in vars(model[0].attn)
    finally:
        adapters._adapters.remove(adapter)
    with pytest.raises(TypeError, match="adapter: expected an instance of Adapter, got <class"):
        lf.register_adapter(SplitAdapter)
