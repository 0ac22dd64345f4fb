"""Run our causal Wan beside a checkout's, on the same weights and latents, in float32 on the CPU.

    python benchmarks/compare_wan.py PATH/TO/Self-Forcing

The checkout (Self Forcing, LongLive 1, or another whose few-step loop `_entries.py` recognises)
stays as it is: its own model class, cache logic, scheduler and chunk loop run; what cannot run here
is stood in for and listed. Compared are the names and shapes of all weights at released sizes,
single cached forwards (velocity, cached keys and values), and whole rollouts. A figure is
max |ours - theirs| / max |theirs|. For scale: `rounding` is the same between our model in float32
and in float64; `control` is our own rollout with a sink that the checkout's run did not have. In
bfloat16 both models are compared with float64. Exit status 1 if a figure is above 1e-5, if ours is
worse than theirs in bfloat16 by more than half, or if the control stays within the bound.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path

import _here  # noqa: F401
import torch
import torch.nn.functional as F
from _arguments import count, folder
from _build import PROMPTS
from _build import Rollout as TheirRollout
from _checkout import Checkout
from _entries import Size, TextEncoder, Variant, recognise, silence

from lightforcing.models import CausalWan, Rollout, WanConfig, load_wan

BOUND = 1e-5
STEPS = (1000.0, 937.5, 625.0, 0.0)


@dataclass
class Case:
    """A way to look back, and the chunks to run."""

    label: str
    ends: tuple[int, ...]
    window: int | None = None
    sink: int = 0
    batch: int = 1


CASES = [
    Case("no window", (3, 6, 9)),
    Case("no window, batch 2", (3, 6), batch=2),
    Case("lone first frame", (1, 4, 7)),
    Case("window 6", (3, 6, 9, 12, 15), window=6),
    Case("window 6, sink 1", (3, 6, 9, 12, 15), window=6, sink=1),
    Case("window 7, sink 3", (3, 6, 9, 12, 15), window=7, sink=3),
]


def float32_attention(q, k, v):
    """Stand-in for the SDPA path of their `attention`, which rounds to bfloat16."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


def difference(ours, theirs):
    """Largest difference, relative to the largest value."""
    return ((ours.double() - theirs.double()).abs().max() / theirs.abs().max()).item()


class Pair:
    """Their pipeline at a small size, and our model with the same weights."""

    def __init__(self, checkout, entry, case, size):
        self.case, self.size = case, size
        model = {"local_attn_size": case.window or -1, "sink_size": case.sink}
        lone = case.ends[0] == 1
        self.variant = Variant(
            case.label, model, {"independent_first_frame": lone}, first=int(lone)
        )
        size = dataclasses.replace(size, chunks=len(case.ends))
        self.theirs = TheirRollout(checkout, entry, self.variant, size)
        self.checkout = checkout
        self.generator = self.theirs.pipeline.generator
        config = WanConfig(
            dim=size.dim,
            ffn_dim=2 * size.dim,
            num_heads=size.heads,
            num_layers=size.layers,
            freq_dim=64,
            text_dim=size.text,
            window_frames=case.window,
            sink_frames=case.sink,
        )
        source = CausalWan(config, seed=1)
        self.generator.model.load_state_dict(source.state_dict(), strict=True)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.pt"
            torch.save({"generator": self.generator.state_dict()}, file)
            self.ours = load_wan(file, config)
        for module in self.generator.model.modules():
            scope = getattr(type(module).forward, "__globals__", {})
            if hasattr(module, "max_attention_size") and "attention" in scope:
                scope["attention"] = float32_attention
        checkout.note(
            "attention in self-attention", "its CPU path rounds to bfloat16: float32 SDPA"
        )

    def their_forward(self, model, x, t, text, caches, text_caches, start):
        """One cached forward of their model."""
        tokens = start * self.size.frame_tokens
        with self.checkout, silence(), torch.no_grad():
            return model(
                x,
                t=torch.full((x.shape[0], x.shape[2]), t),
                context=text,
                seq_len=32760,
                kv_cache=caches,
                crossattn_cache=text_caches,
                current_start=tokens,
                cache_start=tokens,
            )

    def their_caches(self, dtype=torch.float32):
        """Empty caches in their layout."""
        size, case = self.size, self.case
        rows = (case.window or case.ends[-1]) * size.frame_tokens
        shape = (case.batch, rows, size.heads, size.dim // size.heads)

        def layer():
            index = {
                n: torch.zeros(1, dtype=torch.long) for n in ("global_end_index", "local_end_index")
            }
            return {n: torch.zeros(shape, dtype=dtype) for n in "kv"} | index

        text = [{"k": None, "v": None, "is_init": False} for _ in range(size.layers)]
        return [layer() for _ in range(size.layers)], text

    def forwards(self):
        """Largest differences of velocities, keys and values over all chunks and steps."""
        case, size = self.case, self.size
        draw = torch.Generator().manual_seed(7)
        text = torch.randn(case.batch, 512, size.text, generator=draw)
        theirs, their_text = self.their_caches()
        precise = CausalWan(self.ours.config, seed=None, dtype=torch.float64)
        precise.load_state_dict(self.ours.state_dict())
        make = dict(
            num_frames=case.ends[-1], height=size.height, width=size.width, batch=case.batch
        )
        cache, precise_cache = self.ours.new_cache(**make), precise.new_cache(**make)
        worst = dict(velocity=0.0, keys=0.0, values=0.0, rounding=0.0)
        start = count = 0
        for end in case.ends:
            for t in STEPS:
                shape = (case.batch, 16, end - start, size.height, size.width)
                x = torch.randn(shape, generator=draw)
                theirs_v = self.their_forward(
                    self.generator.model, x, t, text, theirs, their_text, start
                )
                with torch.no_grad():
                    v = self.ours(x, t, text, cache=cache, start_frame=start)
                    w = precise(
                        x.double(), t, text.double(), cache=precise_cache, start_frame=start
                    )
                seen = {"velocity": difference(v, theirs_v), "rounding": difference(v, w)}
                for name, key in (("keys", "k"), ("values", "v")):
                    rows = [
                        (
                            mine[key][:, : mine["local_end_index"]],
                            other[key][:, : mine["local_end_index"]],
                        )
                        for mine, other in zip(cache.layers, theirs, strict=True)
                    ]
                    seen[name] = max(difference(a, b) for a, b in rows)
                for mine, other in zip(cache.layers, theirs, strict=True):
                    for name in ("global_end_index", "local_end_index"):
                        assert mine[name] == int(other[name]), (name, mine[name], other[name])
                worst = {name: max(worst[name], seen[name]) for name in worst}
                count += 1
            start = end
        return {"forwards": count, **worst}

    def bfloat16(self):
        """Errors of both models in bfloat16 against float64, same rounded weights and inputs."""
        case, size = self.case, self.size
        draw = torch.Generator().manual_seed(9)
        half = dict(dtype=torch.bfloat16)
        text = torch.randn(case.batch, 512, size.text, generator=draw).to(**half)
        kept = {k: v.clone() for k, v in self.generator.model.state_dict().items()}
        their_model = self.generator.model.to(**half)
        ours = load_wan(their_model.state_dict(), self.ours.config, **half)
        precise = load_wan(their_model.state_dict(), self.ours.config, dtype=torch.float64)
        make = dict(num_frames=case.ends[-1], height=size.height, width=size.width)
        caches = [m.new_cache(batch=case.batch, **make) for m in (ours, precise)]
        theirs, their_text = self.their_caches(**half)
        worst = dict(ours=0.0, theirs=0.0)
        start = 0
        for end in case.ends:
            x = torch.randn(case.batch, 16, end - start, size.height, size.width, generator=draw)
            x = x.to(**half)
            v = self.their_forward(their_model, x, 625.0, text, theirs, their_text, start)
            with torch.no_grad():
                a = ours(x, 625.0, text, cache=caches[0], start_frame=start)
                b = precise(x.double(), 625.0, text.double(), cache=caches[1], start_frame=start)
            worst["ours"] = max(worst["ours"], difference(a, b))
            worst["theirs"] = max(worst["theirs"], difference(v, b))
            start = end
        self.generator.model.float().load_state_dict(kept)
        return worst

    def takes_lone_frame(self):
        """Whether their loop can start with a chunk of one frame."""
        loop = getattr(type(self.theirs.pipeline), self.theirs.entry.method)
        return "independent_first_frame" in inspect.unwrap(loop).__code__.co_names

    def our_rollout(self, model):
        """Our latents from the noise that their loop gets and draws."""
        text = TextEncoder(self.size.text, torch.float32)(PROMPTS[:1])["prompt_embeds"]
        sampler = Rollout(model, lone_first_frame=bool(self.variant.first))
        torch.manual_seed(0)
        noise, draw = self.theirs.noise(), torch.default_generator
        return sampler.generate(noise=noise, context=text, seed=draw).latents

    def rollout(self):
        """The difference of the latents of a whole video made by their loop and by ours."""
        theirs, ours = self.theirs.run(), self.our_rollout(self.ours)
        row = {"chunks": len(self.case.ends), "frames": ours.shape[1]}
        row["latents"] = difference(ours, theirs)
        if self.case.window and not self.case.sink:
            other = load_wan(self.ours.state_dict(), self.ours.config, sink_frames=1)
            row["control"] = difference(self.our_rollout(other), theirs)
        return row


def compare_names(generator):
    """Count the weights of released sizes, after checking that all names and shapes agree."""
    found = {}
    for name in ("1.3B", "14B"):
        config = WanConfig.named(name)
        sizes = {k: getattr(config, k) for k in ("dim", "ffn_dim", "num_heads", "num_layers")}
        with torch.device("meta"):
            theirs = type(generator.model)(**sizes).state_dict()
            ours = CausalWan(config, seed=None).state_dict()
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}, (
            name
        )
        weights = sum(v.numel() for v in ours.values())
        found[name] = {"tensors": len(ours), "weights": weights}
    return found


def compare(path, size):
    """Run everything and return the record that is printed and stored."""
    checkout = Checkout(path)
    before = checkout.fingerprint()
    entries = [e for e in recognise(checkout)[0] if e.kind == "few-step"]
    if not entries:
        raise SystemExit(f"{checkout.name}: no few-step chunk loop found")
    entry = entries[0]
    record = {
        "checkout": checkout.name,
        "commit": checkout.commit(),
        "loop": str(entry),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "size": {k: str(v) for k, v in vars(size).items()} | {"frame_tokens": size.frame_tokens},
        "bound": BOUND,
        "forward": {},
        "rollout": {},
    }
    for case in CASES:
        pair = Pair(checkout, entry, case, size)
        record.setdefault("names", compare_names(pair.generator))
        record["forward"][case.label] = pair.forwards()
        if case.label == "no window":
            record["bfloat16"] = pair.bfloat16()
        if case.batch == 1 and (case.ends[0] > 1 or pair.takes_lone_frame()):
            record["rollout"][case.label] = pair.rollout()
    after = checkout.fingerprint()
    record["files"] = {
        "count": len(before),
        "changed": sorted(set(before.items()) ^ set(after.items())),
    }
    record["standins"] = checkout.standins
    return record


def figures(record):
    """All figures that the bound holds for."""
    for row in record["forward"].values():
        yield from (row["velocity"], row["keys"], row["values"])
    yield from (row["latents"] for row in record["rollout"].values())


def text(record):
    """The record as a page."""
    size = record["size"]
    lines = [
        f"{record['checkout']} {record['commit'] or ''}: {record['loop']}",
        f"torch {record['torch']}, CPU ({record['machine']}), float32; {size['layers']} layers, "
        f"width {size['dim']}, {size['heads']} heads, {size['frame_tokens']} tokens a frame",
        "",
        "weights: names and shapes agree at "
        + ", ".join(f"{n} ({r['tensors']} tensors)" for n, r in record["names"].items()),
        "",
        f"{'one cached forward':24}{'forwards':>10}{'velocity':>11}{'keys':>11}{'values':>11}"
        f"{'rounding':>11}",
    ]
    for label, row in record["forward"].items():
        lines.append(
            f"{label:24}{row['forwards']:10}"
            + "".join(f"{row[n]:11.1e}" for n in ("velocity", "keys", "values", "rounding"))
        )
    lines += ["", f"{'whole rollout':24}{'chunks':>10}{'frames':>11}{'latents':>11}{'control':>11}"]
    for label, row in record["rollout"].items():
        control = f"{row['control']:11.1e}" if "control" in row else ""
        lines.append(
            f"{label:24}{row['chunks']:10}{row['frames']:11}{row['latents']:11.1e}{control}"
        )
    half = {name: f"{error:.1e}" for name, error in record["bfloat16"].items()}
    lines += [
        "",
        f"bfloat16 velocity against float64: ours {half['ours']}, theirs {half['theirs']}",
    ]
    worst = max(figures(record))
    verdict = "within" if worst <= record["bound"] else "ABOVE"
    lines += ["", f"largest figure {worst:.1e}, {verdict} the bound {record['bound']:.0e}", ""]
    lines += ["stood in for:"] + [f"  {k}: {v}" for k, v in record["standins"].items()]
    files = record["files"]
    lines.append(f"checkout files: {files['count']}, changed {len(files['changed'])}")
    return "\n".join(lines)


def main():
    """Compare, print, store, and say by the exit status whether all figures are within bounds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=folder, help="folder with the code base")
    parser.add_argument("--out", help="stem of the .txt and .json files to write")
    parser.add_argument("--layers", type=count, default=3)
    parser.add_argument("--dim", type=count, default=256)
    parser.add_argument("--heads", type=count, default=2)
    parser.add_argument("--height", type=count, default=12, help="rows of a latent frame")
    parser.add_argument("--width", type=count, default=16, help="columns of a latent frame")
    given = parser.parse_args()
    size = Size(
        given.layers, given.dim, given.heads, given.height, given.width, dtype=torch.float32
    )
    record = compare(given.checkout, size)
    page = text(record)
    print(page)
    if given.out:
        Path(f"{given.out}.txt").write_text(page + "\n")
        Path(f"{given.out}.json").write_text(json.dumps(record, indent=1) + "\n")
    half = record["bfloat16"]
    sound = (
        max(figures(record)) <= BOUND
        and half["ours"] <= 1.5 * half["theirs"]
        and all(row.get("control", 1) > BOUND for row in record["rollout"].values())
        and not record["files"]["changed"]
    )
    return 0 if sound else 1


if __name__ == "__main__":
    raise SystemExit(main())
