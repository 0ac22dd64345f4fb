"""Training in two stages, by the clock, in one command that may be cut and goes on.

The clock of a stage runs while the command runs, compiling included, and stands in the checkpoint:
a command cut after 300 s and started again on another machine needs the rest of the time only (and
compiles again). Learning rates follow that clock.
"""

from __future__ import annotations

import copy
import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..models import CausalWan, load_wan, save_wan
from . import checkpoint
from .data import CHUNK, clips
from .folded import Folded
from .layout import Layout
from .metrics import means, score
from .model import TOKEN, new_model, rollout, weights_of
from .muon import Muon
from .recipe import RECIPES, Stage

WARM_UP, DECAY = 50, 0.4  # steps, share of the clock
SAVE_EVERY, PROBE_EVERY, LOG_EVERY = 30.0, 60.0, 20  # seconds, seconds, steps
STOCK = 8  # steps


class Trainer:
    """A run of training; everything that must survive a kill is in its checkpoint."""

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        model: str = "narrow",
        recipe: tuple[Stage, ...] | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        piece: int | None = None,
        began: float | None = None,
    ) -> None:
        """Begins, or goes on where the checkpoint in ``folder`` stands.

        Args:
            folder: of ``checkpoint.pt``, ``log.jsonl`` and, at the end, ``ema.safetensors``.
            model: a name of :data:`lightforcing.world.model.MODELS`.
            recipe: the stages; None takes those of the model.
            seed: of the weights, the clips and the noise.
            device: None takes the GPU if there is one.
            piece: most bytes of a checkpoint's file; None writes one file.
            began: :func:`time.perf_counter` when the command began.
        """
        gpu = torch.cuda.is_available()
        self.device = torch.device(device or ("cuda" if gpu else "cpu"))
        self.gpu = self.device.type == "cuda"
        self.folder, self.piece, self.seed = Path(folder), piece, seed
        self.folder.mkdir(parents=True, exist_ok=True)
        self.name, self.recipe = model, recipe or RECIPES[model]
        self.began = time.perf_counter() if began is None else began
        self.model = new_model(model, seed=seed, device=self.device)
        self.ema = copy.deepcopy(self.model)
        self.model.requires_grad_(True)
        self.draw = torch.Generator(self.device).manual_seed(1000 + seed)
        # stage, its steps, its seconds, all seconds, clips made, steps of all stages
        self.at = dict(stage=0, step=0, seconds=0.0, wall=0.0, clips=0, total=0)
        self.layouts, self.folded = {}, None
        self.stock, self.slow = {}, 0.5  # clips made ahead; phase of the slow sweeps
        self.plain = not self.gpu  # no compiler, no flex-attention
        self._optimisers()
        state = checkpoint.load(self.folder / "checkpoint.pt", self.device)
        if state is not None:
            self._check_run()
            self._resume(state)
        self.before = self.at["wall"]
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.log(
            event="start" if state is None else "resume",
            device=torch.cuda.get_device_name() if self.gpu else "cpu",
            torch=torch.__version__,
            model=model,
            weights=weights_of(self.model),
            recipe=[asdict(stage) for stage in self.recipe],
            seed=seed,
            at=dict(self.at),
        )

    # ---- state ---------------------------------------------------------------------------

    @property
    def stage(self) -> Stage:
        """The current one."""
        return self.recipe[self.at["stage"]]

    @property
    def done(self) -> float:
        """Share of the stage that is over, by the clock or by steps."""
        return max(self.at["seconds"] / self.stage.seconds, self.at["step"] / self.stage.steps)

    @property
    def finished(self) -> bool:
        """All stages are over."""
        return self.at["stage"] >= len(self.recipe)

    def _optimisers(self):
        matrices = [
            layer.weight
            for block in self.model.blocks
            for layer in (
                *(getattr(block.self_attn, n) for n in "qkvo"),
                block.ffn[0],
                block.ffn[2],
            )
        ]
        ids = {id(w) for w in matrices}
        rest = [w for w in self.model.parameters() if id(w) not in ids]
        self.muon = Muon(matrices, 0.0)
        self.adam = torch.optim.AdamW(
            rest, lr=0.0, betas=(0.9, 0.95), weight_decay=0.01, fused=self.gpu
        )

    def save(self) -> None:
        """Writes the checkpoint."""
        state = dict(
            at=dict(self.at),
            model=self.model.state_dict(),
            ema={k: v.bfloat16() for k, v in self.ema.state_dict().items()},
            muon=self.muon.state(),
            adam=self.adam.state_dict(),
            draw=self.draw.get_state(),
        )
        checkpoint.save(state, self.folder / "checkpoint.pt", self.piece)

    def _check_run(self):
        """Raises where the checkpoint is of another model or seed, as its log tells."""
        path = self.folder / "log.jsonl"
        first = json.loads(path.read_text().partition("\n")[0]) if path.exists() else {}
        for name, wanted in (("model", self.name), ("seed", self.seed)):
            if first.get(name, wanted) != wanted:
                raise ValueError(
                    f"{name}: expected {first[name]!r}, that of the run in {self.folder}, "
                    f"got {wanted!r}"
                )

    def _resume(self, state):
        self.at.update(state["at"])
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.muon.load(state["muon"])
        self.adam.load_state_dict(state["adam"])
        draw = state["draw"].cpu()
        if draw.numel() == self.draw.get_state().numel():
            self.draw.set_state(draw)
        else:  # a GPU's state means nothing to a CPU, and the other way round
            self.draw.manual_seed(1000 + self.seed + self.at["total"])

    def log(self, **facts) -> None:
        """A line of the log; where nobody watches a bar, events and probes are printed too."""
        for name, value in facts.items():
            if isinstance(value, float):
                facts[name] = None if math.isnan(value) else round(value, 5)
        line = json.dumps(facts)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(line + "\n")
        if "loss" not in facts and not sys.stderr.isatty():
            print(line[:240], flush=True)

    # ---- the forward ---------------------------------------------------------------------

    def _layout(self, view, short):
        key = view, short
        if key not in self.layouts:
            self.layouts[key] = Layout(3, 3, self.device) if short else Layout(7, 1, self.device)
        return self.layouts[key]

    def _attention(self, view, count, layout):
        """Blocks to run and attention under the layout's mask, for ``count`` sequences."""
        tokens = (view // TOKEN) ** 2
        if self.plain:
            return dict(attend=layout.split(tokens))
        if self.folded is None:
            rows = min(stage.batch for stage in self.recipe)
            least = min(stage.view for stage in self.recipe)
            self.folded = Folded(self.model, rows, (least // TOKEN) ** 2)
        self.folded.use(layout, tokens, count)
        return dict(attend=self.folded.attend, blocks=self.folded.blocks)

    def _clips(self, view, size, chunks):
        """The next ``size`` clips; made for STOCK steps at once: 600 small launches cost 24 ms."""
        stock = self.stock.get((view, chunks), ())
        if len(stock) < size:
            first = 1 + self.seed * (1 << 32) + self.at["clips"]
            count = size * (STOCK if self.gpu else 1)
            self.at["clips"] += count
            self.slow = (self.slow + self.stage.slow) % 1
            stock = clips(
                range(first, first + count),
                view=view,
                frames=chunks * CHUNK,
                sweep="slow" if self.slow < self.stage.slow else "quick",
                exam=False,
                device=self.device,
            )
        self.stock[view, chunks] = stock[size:]
        return stock[:size]

    def _loss(self, view, count, short):
        layout = self._layout(view, short)
        clip = self._clips(view, count * layout.pack, layout.chunks)
        x, t, told, target = layout.batch(clip, self.draw)
        how = self._attention(view, count, layout)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.gpu):
            v = self.model.forward_frames(x, t, positions=layout.positions, **how, **told)
        return F.mse_loss(v[:, :, layout.noisy_frames].float(), target)

    def _backward(self, *what):
        """Loss and gradients; a GPU that cannot compile goes on without, once."""
        try:
            loss = self._loss(*what)
            loss.backward()
        except Exception as error:
            if self.plain or self.at["step"] > 5:
                raise
            self.log(event="not compiled", error=f"{type(error).__name__}: {error}"[:600])
            self.plain = True
            self.model.zero_grad(set_to_none=True)
            loss = self._loss(*what)
            loss.backward()
        return loss

    def step(self) -> torch.Tensor:
        """One step; its loss, on the device."""
        stage, step = self.stage, self.at["step"]
        view, count = stage.view, stage.batch
        if stage.mixed and step % stage.mixed == stage.mixed - 1:
            view, count = self.recipe[0].view, self.recipe[0].batch
        rate = min(1.0, (step + 1) / WARM_UP) * min(1.0, (1 - self.done) / DECAY)
        self.muon.lr = stage.rate * rate
        for group in self.adam.param_groups:
            group["lr"] = stage.rate * rate / 20
        loss = self._backward(view, count, self.done < stage.short)
        self.norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.muon.step()
        self.adam.step()
        self.model.zero_grad(set_to_none=True)
        keep = min(stage.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.ema.parameters()), list(self.model.parameters()), 1 - keep
            )
        self.at["step"] += 1
        self.at["total"] += 1
        return loss.detach()

    # ---- the run -------------------------------------------------------------------------

    def run(self, seconds: float = math.inf) -> bool:
        """Trains until all stages are over, or for ``seconds``; whether all are over."""
        losses, tick, saved, probed = [], self.began, self.began, self.began
        shown = sum(s.seconds for s in self.recipe)
        bar = tqdm(total=round(shown), unit="s", disable=None, bar_format=BAR)
        facts = {}
        while not self.finished:
            now = time.perf_counter()
            self.at["seconds"] += now - tick
            self.at["wall"] = self.before + now - self.began
            tick = now
            bar.n = min(round(self.at["wall"]), bar.total)
            if self.done >= 1:
                facts |= self.probe()
                self._next_stage()
                tick = time.perf_counter()  # the probe and the save are counted as all seconds
                continue
            if now - self.began > seconds:
                self.save()
                self.log(event="cut", at=dict(self.at))
                bar.close()
                return False
            losses.append(self.step())
            if self.at["step"] % LOG_EVERY == 0 or self.at["step"] == 3:
                facts |= self._report(torch.stack(losses).mean().item())
                bar.set_postfix(facts)
                losses.clear()
            if now - probed > PROBE_EVERY and self.at["step"] > 3:
                facts |= self.probe()
                probed = time.perf_counter()
            if now - saved > SAVE_EVERY:
                self.save()
                saved = time.perf_counter()
        bar.close()
        save_wan(self.ema, self.folder / "ema.safetensors")
        memory = torch.cuda.max_memory_allocated() / 2**30 if self.gpu else 0.0
        self.save()
        self.log(event="trained", at=dict(self.at), memory_gb=memory)
        return True

    def _next_stage(self):
        """The next stage begins with the averaged weights and fresh optimisers."""
        self.log(event="stage over", at=dict(self.at))
        self.at.update(stage=self.at["stage"] + 1, step=0, seconds=0.0)
        self.model.load_state_dict(self.ema.state_dict())
        self._optimisers()
        self.save()

    def _report(self, loss):
        if not math.isfinite(loss):
            raise RuntimeError(f"loss: expected a finite number, got {loss} at {self.at}")
        at, stage = self.at, self.stage
        self.log(
            stage=at["stage"],
            step=at["step"],
            seconds=at["seconds"],
            wall=self.before + time.perf_counter() - self.began,
            loss=loss,
            norm=self.norm.item(),
            rate=self.muon.lr / stage.rate,
            clips=at["clips"],
        )
        return {"stage": at["stage"] + 1, "step": at["step"], "loss": f"{loss:.4f}"}

    def probe(self) -> dict:
        """A quick dense rollout of the averaged weights on examination clips; also logged."""
        view = self.stage.view
        count = max(2, (64 if self.gpu else 2) * 64 * 64 // view**2)
        model = copy.deepcopy(self.ema).to(torch.float16 if self.gpu else torch.float32)
        clip = clips(count, view=view, frames=21 if self.gpu else 9, device=self.device)
        found = means(score(rollout(model, clip), clip))
        self.log(probe=self.at["total"], view=view, seconds=self.at["wall"],
                 **{k: round(v, 3) for k, v in found.items()})  # fmt: skip
        return {"psnr": f"{found['all']:.1f}", "glyphs":
                f"{found['glyph_easy']:.0%} {found['glyph_hard']:.0%}"}  # fmt: skip


BAR = "{n}/{total} s |{bar}| {postfix} [{elapsed}<{remaining}]"


def trained(folder: str | os.PathLike) -> tuple[CausalWan, dict]:
    """The averaged weights of a run on the CPU, and its counters: finished, or as last saved.

    Raises:
        FileNotFoundError: there is no run in the folder.
    """
    folder = Path(folder)
    state = checkpoint.load(folder / "checkpoint.pt")
    if state is None:
        raise FileNotFoundError(f"folder: no checkpoint in {folder}")
    if (folder / "ema.safetensors").exists():  # not rounded to bfloat16
        return load_wan(folder / "ema.safetensors"), state["at"]
    with (folder / "log.jsonl").open() as file:
        model = new_model(json.loads(file.readline())["model"])
    model.load_state_dict(state["ema"])
    return model, state["at"]
