"""Build a checkout's own pipeline at a small size, and run its own chunk loop."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import random
import re
from dataclasses import replace

import torch
from _checkout import Checkout, Settings
from _entries import (
    FULL_FRAME,
    SCENE_CUT,
    Entry,
    OnCpu,
    Size,
    TextEncoder,
    Vae,
    Variant,
    cross_attention,
    silence,
)

PROMPTS = ["a boat on a lake at dawn", "the boat reaches a harbour at night", "snow falls on it"]


def random_weights(cls, size: Size, channels, kwargs):
    """Create a model class at the wanted size with seeded weights; the head, zero at birth, too."""
    known = inspect.signature(cls.__init__).parameters
    wanted = dict(
        model_type="t2v",
        dim=size.dim,
        ffn_dim=size.ffn or 2 * size.dim,
        freq_dim=size.freq,
        text_dim=size.text,
        text_len=size.text_len,
        in_dim=channels,
        out_dim=channels,
        num_heads=size.heads,
        num_layers=size.layers,
        **kwargs,
    )
    torch.manual_seed(size.seed)
    with torch.device(size.device):
        model = cls(**{k: v for k, v in wanted.items() if k in known})
    torch.nn.init.normal_(model.head.head.weight, std=size.dim**-0.5)
    return model


@contextlib.contextmanager
def weights(checkout: Checkout, size: Size, channels):
    """Let `from_pretrained` of the checkout's models mean random weights."""
    made = []
    for name, module in checkout.loaded().items():
        for cls in vars(module).values():
            if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
                continue
            known = inspect.signature(cls.__init__).parameters
            if cls.__module__ == name and {"num_layers", "num_heads", "patch_size"} <= set(known):

                def from_pretrained(cls, path, **kwargs):
                    return random_weights(cls, size, channels, kwargs)

                cls.from_pretrained = classmethod(from_pretrained)
                made.append(cls)
    checkout.note("from_pretrained", "weights are random (seeded), not downloaded")
    try:
        yield
    finally:
        for cls in made:
            del cls.from_pretrained


def _config(entry: Entry, variant: Variant, accepts, size: Size, channels):
    model = {"timestep_shift": 5.0, **variant.model}
    if entry.kind == "shots":
        model |= {"model_name": "Wan2.2-TI2V-5B", "num_frame_per_block": variant.chunk}
    args = Settings(
        denoising_step_list=[1000, 750, 500, 250],
        warp_denoising_step=True,
        num_frame_per_block=variant.chunk,
        independent_first_frame=False,
        context_noise=0,
        num_train_timestep=1000,
        timestep_shift=5.0,
        guidance_scale=3.0,
        negative_prompt="blurred",
        image_or_video_shape=[1, 0, channels, size.height, size.width],
        model_kwargs=Settings({k: v for k, v in model.items() if k in accepts}),
    )
    if entry.kind == "rolling":
        args.denoising_step_list = [1000, 800, 600, 400, 200]
    if entry.kind == "self-built":
        args.update(denoising_step_list=[1000, 757, 522, 0], warp_denoising_step=False)
        args.model_name = "causal_wan"
    if entry.kind == "shots":
        args.inference = Settings(
            sampling_steps=4,
            sink_size=8,
            guidance_scale=1.0,
            multi_shot_sink=True,
            multi_shot_rope_offset=8,
            scene_cut_prefix=SCENE_CUT,
        )
    args.update(variant.args)
    return args


class Rollout:
    """A checkout's pipeline, built small, ready to run its loop again and again.

    Args:
        checkout, entry, variant, size: what to build.
        generator: the pipeline's model wrapper if it shall be shared, else a new one.
    """

    def __init__(self, checkout, entry, variant, size, generator=None):
        self.checkout, self.entry, self.variant, self.size = checkout, entry, variant, size
        self.channels = 48 if entry.kind == "shots" else 16
        self.literal = 880 if entry.kind == "shots" else 1560
        with checkout, silence():
            module = checkout.load(entry.module)
            self._stand_in(module)
            self.pipeline = self._create(module, generator)
            if generator is None:
                self.pipeline.generator.to(size.dtype).eval()
            self._resize(new_model=generator is None)

    def _stand_in(self, module):
        if importlib.util.find_spec("flash_attn") is None:
            for name, loaded in self.checkout.loaded().items():
                found = vars(loaded).get("flash_attention")
                if found and getattr(found, "__module__", name) != name:
                    loaded.flash_attention = cross_attention
            self.checkout.note("flash_attention in cross-attention", "no flash-attn here: SDPA")
        self.checkout.note("text encoder", "11 GB of weights: embeddings from the prompt's hash")
        self.checkout.note("VAE", "weights not here: the first three latent channels")

    def _create(self, module, generator):
        size = self.size
        encoder, vae = TextEncoder(size.text, size.dtype, size.text_len, size.device), Vae()
        cls = getattr(module, self.entry.name)
        wrapper = getattr(module, "WanDiffusionWrapper", None)
        accepts = set(inspect.signature(wrapper.__init__).parameters) if wrapper else set()
        args = _config(self.entry, self.variant, accepts, size, self.channels)
        with weights(self.checkout, size, self.channels):
            if self.entry.kind != "self-built":
                given = {"generator": generator, "text_encoder": encoder, "vae": vae}
                return cls(args, torch.device(size.device), **given)
            made = {"get_text_encoder_wrapper": encoder, "get_vae_wrapper": vae}
            if generator is not None:
                made["get_diffusion_wrapper"] = generator
            saved = {name: getattr(module, name) for name in made}
            for name, thing in made.items():
                setattr(module, name, lambda model_name, thing=thing: lambda: thing)
            try:
                return cls(args, torch.device(size.device))
            finally:
                for name, thing in saved.items():
                    setattr(module, name, thing)

    def _resize(self, new_model):
        """Bring literals of the released size (1560 tokens, 30 layers, 12 x 128) to this size."""
        pipeline, size = self.pipeline, self.size
        note = self.checkout.note
        pipeline.num_transformer_blocks = size.layers
        note(f"num_transformer_blocks set to {size.layers}", "30 is a literal in most pipelines")
        note(
            f"prompts of {size.text_len} tokens, {size.text} channels", "512 and 4096 are slow here"
        )
        if "sampling_steps" in vars(pipeline) and pipeline.sampling_steps != 4:
            pipeline.sampling_steps = 4
            note("sampling_steps set to 4", "50 is a literal in the many-step pipeline")
        if size.frame_tokens != self.literal:
            pipeline.frame_seq_length = size.frame_tokens
            for module in pipeline.generator.model.modules() if new_model else ():
                for name in ("frame_length", "block_length", "max_attention_size"):
                    value = vars(module).get(name, 0)
                    if value and value % self.literal == 0:
                        setattr(module, name, value // self.literal * size.frame_tokens)
            note(
                f"literal {self.literal} tokens a frame, set to {size.frame_tokens}",
                "attributes frame_seq_length, frame_length, block_length, max_attention_size",
            )
        for name in ("_initialize_kv_cache", "_initialize_crossattn_cache"):
            setattr(pipeline, name, self._fitted(getattr(pipeline, name)))

    def _fitted(self, allocate):
        size, literal = self.size, self.literal

        def fitted(*args, **kwargs):
            allocate(*args, **kwargs)
            held = [v for k, v in vars(self.pipeline).items() if "cache" in k]
            for caches in (v for v in held if isinstance(v, list)):
                for cache in caches:
                    for name in ("k", "v"):
                        old = cache[name]
                        rows = old.shape[1]
                        if rows in (21 * 1560, 24 * 1560):
                            rows = rows // literal * size.frame_tokens
                        shape = (old.shape[0], rows, size.heads, size.dim // size.heads)
                        if old.shape != shape:
                            cache[name] = old.new_zeros(shape)
                            self.checkout.note(
                                "shape of the KV caches",
                                "heads, head size and 21 or 24 frames of tokens are literals there",
                            )

        return fitted

    @property
    def frames(self):
        """Latent frames of the video: chunks, the first of them shorter if it is alone."""
        lone = self.variant.first
        count = self.size.chunks * (3 if self.variant.chunk == 1 else 1)
        return lone + (count - bool(lone)) * self.variant.chunk

    def noise(self, seed=0):
        """Return the video's starting noise, [1, F, C, h, w]."""
        shape = (1, self.frames, self.channels, self.size.height, self.size.width)
        made = torch.randn(shape, generator=torch.Generator().manual_seed(1000 + seed))
        return made.to(self.size.device, self.size.dtype)

    def run(self, seed=0, inference_mode=False):
        """Run the checkout's own loop once and return its latents, [1, F, C, h, w]."""
        grad = torch.inference_mode() if inference_mode else torch.no_grad()
        with self.checkout.running(), silence(), grad:
            return self.start(seed)

    def start(self, seed=0):
        """Call the loop as it is, without entering the checkout or silencing it."""
        noise = self.noise(seed)
        torch.manual_seed(seed)
        random.seed(seed)
        loop = getattr(self.pipeline, self.entry.method)
        prompts = {"text_prompts": PROMPTS[:1]}
        if self.entry.kind == "switch":
            # Switches before the window is full, and after.
            at = [2 * self.variant.chunk, 5 * self.variant.chunk]
            prompts = {"text_prompts_list": [[p] for p in PROMPTS], "switch_frame_indices": at}
        if self.entry.kind == "shots":
            lines = [PROMPTS[0]] * self.size.chunks
            lines[min(3, self.size.chunks - 1)] = SCENE_CUT + PROMPTS[1]
            prompts = {"text_prompts": [lines]}
        if self.entry.kind == "self-built" and not torch.cuda.is_available():
            self.checkout.note('literal device="cuda"', "read as the CPU")
            with OnCpu():
                made = loop(noise, return_latents=True, **prompts)
        else:
            made = loop(noise, return_latents=True, **prompts)
        return made[1] if isinstance(made, tuple) else made


def fitting(checkout: Checkout, entry: Entry, size: Size):
    """Return the size, or a released frame in a smaller model where 1560 is inside the forward."""
    with checkout, silence():
        checkout.load(entry.module)
    layers = [m for n, m in checkout.loaded().items() if n.endswith("causal_model")]
    if not any(re.search(r"^ +frame_seqlen = 1560$", inspect.getsource(m), re.M) for m in layers):
        return size
    checkout.note("60x104 latents, 1 layer of 1 head", "1560 tokens is a literal in its forward")
    height, width = FULL_FRAME
    small = dict(height=height, width=width, layers=1, dim=128, heads=1, chunks=min(3, size.chunks))
    return replace(size, **small)
