"""Weights from files: every form that trainings leave, and a sentence for what does not fit."""

import dataclasses
import re

import pytest
import torch
from small_wan import SMALL

from lightforcing.models import CausalWan, WanConfig, load_wan, save_wan
from lightforcing.models.loading import infer_config

WIDE = WanConfig(  # one head of 128 channels, so that the shapes tell everything
    dim=128, ffn_dim=64, num_heads=1, num_layers=2, freq_dim=32, text_dim=20
)


@pytest.fixture(scope="module")
def weights():
    return CausalWan(WIDE, seed=1).state_dict()


def equal(model, weights):
    state = model.state_dict()
    return set(state) == set(weights) and all(torch.equal(state[n], weights[n]) for n in weights)


def wrapped(weights, *prefixes):
    return {"".join(prefixes) + name: x for name, x in weights.items()}


def inside(weights, wrapper):
    return {re.sub(r"^blocks\.(\d+)\.", rf"blocks.\1.{wrapper}", n): x for n, x in weights.items()}


FORMS = {
    "plain": lambda w: w,
    "generator": lambda w: {"generator": wrapped(w, "model."), "step": 7},
    "generator_ema first": lambda w: {
        "generator": {n: x + 1 for n, x in wrapped(w, "model.").items()},
        "generator_ema": wrapped(w, "model."),
        "critic": {"w": torch.zeros(1)},
    },
    "FSDP": lambda w: {
        "generator_ema": wrapped(inside(w, "_fsdp_wrapped_module."), "model._fsdp_wrapped_module.")
    },
    "compiled": lambda w: {"model": wrapped(inside(w, "_orig_mod."), "_orig_mod.")},
    "data parallel": lambda w: {"state_dict": wrapped(w, "module.", "model.")},
}


@pytest.mark.parametrize("form", FORMS)
def test_loads_what_trainings_leave(tmp_path, weights, form):
    file = tmp_path / "model.pt"
    torch.save(FORMS[form](weights), file)
    model = load_wan(file)
    assert model.config == WIDE
    assert equal(model, weights)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_loads_the_oldest_file_format(tmp_path, weights):
    file = tmp_path / "model.pth"
    torch.save(weights, file, _use_new_zipfile_serialization=False)
    assert equal(load_wan(file), weights)


def test_the_model_shares_no_memory_with_its_source(tmp_path, weights):
    file = tmp_path / "model.pt"
    torch.save(weights, file)
    models = load_wan(file), load_wan(weights)
    file.write_bytes(b"")
    for model in models:
        model.head.head.weight.zero_()
    assert weights["head.head.weight"].any()
    assert torch.equal(models[0].head.modulation, weights["head.modulation"])


def test_the_dict_to_take_can_be_named(tmp_path, weights):
    file = tmp_path / "model.pt"
    torch.save(
        {"generator": weights, "generator_ema": {n: x + 1 for n, x in weights.items()}}, file
    )
    assert equal(load_wan(file, weights="generator"), weights)
    with pytest.raises(ValueError) as failure:
        load_wan(file, weights="ema")
    assert str(failure.value) == "weights: no 'ema' in the file, which has generator, generator_ema"


def test_loads_safetensors_and_folders_of_them(tmp_path, weights):
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "one.safetensors")
    assert equal(load_wan(tmp_path / "one.safetensors"), weights)
    folder = tmp_path / "sharded"
    folder.mkdir()
    names = sorted(weights)
    for i, part in enumerate((names[:20], names[20:])):
        save_file({n: weights[n] for n in part}, folder / f"diffusion-{i}.safetensors")
    assert equal(load_wan(folder), weights)


def test_saving_keeps_the_configuration(tmp_path):
    model = CausalWan(dataclasses.replace(SMALL, window_frames=6, sink_frames=1), seed=4)
    save_wan(model, tmp_path / "small.safetensors")
    again = load_wan(tmp_path / "small.safetensors")
    assert again.config == model.config
    assert equal(again, model.state_dict())


def test_changes_and_type_are_applied(weights):
    model = load_wan(weights, dtype=torch.bfloat16, window_frames=6, sink_frames=2)
    assert (model.config.window_frames, model.config.sink_frames) == (6, 2)
    assert model.blocks[1].self_attn.local_attn_size == 6
    assert model.blocks[1].self_attn.sink_size == 2
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert weights["head.head.weight"].dtype == torch.float32  # the caller's dict is left alone


def test_a_file_that_runs_code_is_refused(tmp_path):
    import pickle

    file = tmp_path / "model.pt"
    torch.save({"generator": re.compile("x")}, file)
    with pytest.raises(ValueError, match="expected weights .*, and nothing else") as refused:
        load_wan(file)
    assert isinstance(refused.value.__cause__, pickle.UnpicklingError)


def without(weights, name):
    return {n: x for n, x in weights.items() if n != name}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda w: without(without(w, "blocks.0.norm3.bias"), "head.modulation"),
            "source: the weights do not fit the configuration: 2 weights are missing "
            "(blocks.0.norm3.bias, head.modulation)",
        ),
        (
            lambda w: w | {f"blocks.0.lora_{i}": w["head.head.bias"] for i in range(4)},
            "source: the weights do not fit the configuration: 4 are not known (blocks.0.lora_0, "
            "blocks.0.lora_1, blocks.0.lora_2, ...)",
        ),
        (
            lambda w: w | {"blocks.1.modulation": torch.zeros(1, 5, 128)},
            "source: the weights do not fit the configuration: 1 have another shape "
            "(blocks.1.modulation [1, 5, 128] instead of [1, 6, 128])",
        ),
        (
            lambda w: {"encoder.weight": torch.zeros(2)},
            "source: not the weights of a Wan, patch_embedding.weight is missing",
        ),
        (
            lambda w: w | {"img_emb.proj.1.weight": torch.zeros(2)},
            "source: image-to-video weights (img_emb, k_img) are not supported",
        ),
        (
            lambda w: w | {"patch_embedding.weight": torch.zeros(128, 16, 2, 2)},
            "patch_embedding.weight: expected [dim, in_dim, 1, 2, 2], got [128, 16, 2, 2]",
        ),
        (
            lambda w: w | {"patch_embedding.weight": torch.zeros(48, 16, 1, 2, 2)},
            "config: heads of 128 channels were expected, and the weights have a width of 48; give "
            "the configuration, shapes do not tell the number of heads",
        ),
        (lambda w: w | {"step": 3}, "source: expected a tensor for 'step', got int"),
    ],
)
def test_loading_says_what_does_not_fit(weights, change, message):
    with pytest.raises(ValueError) as failure:
        load_wan(change(weights))
    assert str(failure.value) == message


def test_loading_says_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="source: no file .*gone.pt"):
        load_wan(tmp_path / "gone.pt")
    with pytest.raises(FileNotFoundError, match="source: no .safetensors file in"):
        load_wan(tmp_path)
    (tmp_path / "weights.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match="source: expected a .pt, .pth, .bin or .safetensors file"):
        load_wan(tmp_path / "weights.gguf")


def test_infers_the_named_sizes():
    for name in ("1.3B", "14B", "5B"):
        with torch.device("meta"):
            state = CausalWan(WanConfig.named(name), seed=None).state_dict()
        assert infer_config(state) == WanConfig.named(name)
