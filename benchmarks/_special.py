"""What a patch must survive: copies, LoRA, other rollouts and other checkouts in the process."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import threading

import torch
from _build import Rollout
from _case import Checks, originals, restored
from _entries import silence

import lightforcing as lf


class Interleaver:
    """Runs loops in threads that take turns at every forward of a model wrapper.

    One thread runs at a time, each with its own state of torch's generator, so that a loop draws
    the same random numbers as alone.
    """

    def __init__(self, rollouts):
        self.rollouts = rollouts
        self.turn = threading.Condition()
        self.index = threading.local()
        self.now, self.alive = 0, list(range(len(rollouts)))
        self.states = [torch.get_rng_state() for _ in rollouts]
        self.made, self.errors, self.switches = [None] * len(rollouts), [], 0

    def run(self, seeds):
        """Run every rollout once, with its seed; return their latents."""
        wrappers = {id(r.pipeline.generator): r.pipeline.generator for r in self.rollouts}
        hooks = [w.register_forward_pre_hook(self._pass) for w in wrappers.values()]
        threads = [threading.Thread(target=self._job, args=job) for job in enumerate(seeds)]
        with contextlib.ExitStack() as stack:
            for rollout in self.rollouts:
                stack.enter_context(rollout.checkout.running())
            stack.enter_context(silence())
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for hook in hooks:
            hook.remove()
        if self.errors:
            raise self.errors[0]
        return self.made

    def _job(self, index, seed):
        self.index.value = index
        try:
            self._wait(index)
            with torch.no_grad():
                self.made[index] = self.rollouts[index].start(seed)
        except Exception as error:
            self.errors.append(error)
        finally:
            with self.turn:
                self._advance(index)
                self.alive.remove(index)

    def _advance(self, index):
        others = [i for i in self.alive if i != index]
        later = [i for i in others if i > index] or others
        if later:
            self.now, self.switches = later[0], self.switches + 1
        self.turn.notify_all()

    def _wait(self, index):
        with self.turn:
            self.turn.wait_for(lambda: self.now == index)
        torch.set_rng_state(self.states[index])

    def _pass(self, module, args):
        index = self.index.value
        self.states[index] = torch.get_rng_state()
        with self.turn:
            self._advance(index)
        self._wait(index)


def _again(rollout, generator):
    return Rollout(rollout.checkout, rollout.entry, rollout.variant, rollout.size, generator)


def interleaved(rollout, preset="fast"):
    """Two rollouts, with two caches, through one patched model, forward by forward in turn."""
    checks, model = Checks(), rollout.pipeline.generator
    other = _again(rollout, model)
    dense = [rollout.run(1), other.run(2)]
    if not all(map(torch.equal, dense, Interleaver([rollout, other]).run([1, 2]))):
        claim = "two rollouts in turn: nothing to compare, the loop keeps state on its model"
        checks.that(claim, True, "dense and unpatched, they differ from the two alone")
        return checks
    handle = lf.patch(rollout.pipeline, preset, strict=True)
    alone = [rollout.run(1), other.run(2)]
    sparse = handle.stats()["sparse_calls"]
    handle.reset()
    turns = Interleaver([rollout, other])
    together = turns.run([1, 2])
    detail = f"{turns.switches} turns, {handle.stats()['sparse_calls']} sparse calls"
    checks.that("two rollouts in turn: as many sparse calls as one after the other",
                sparse == handle.stats()["sparse_calls"], detail)  # fmt: skip
    checks.same("two rollouts in turn: the first as alone", together[0], alone[0])
    checks.same("two rollouts in turn: the second as alone", together[1], alone[1])
    handle.unpatch()
    checks.same("two rollouts in turn: dense after unpatch", rollout.run(1), dense[0])
    return checks


def pooled_anew(rollout, preset="fast"):
    """Kept means of past keys change nothing: inference tensors have no version, none are kept."""
    checks, model = Checks(), rollout.pipeline.generator
    with lf.patched(rollout.pipeline, preset, strict=True) as handle:
        kept = rollout.run()
        size = handle.stats()["means_bytes"]
        handle.reset()
        anew = _again(rollout, model).run(inference_mode=True)
        none = handle.stats()["means_bytes"]
    checks.that("inference mode: no means are kept", none == 0, f"{none} bytes, else {size}")
    checks.same("inference mode: same latents as with kept means", anew, kept)
    return checks


def copied(rollout, preset="fast"):
    """A deep copy of a patched model is patched, apart from the original."""
    checks, model = Checks(), rollout.pipeline.generator
    before, dense = originals(model), rollout.run()
    handle = lf.patch(rollout.pipeline, preset, strict=True)
    sparse = rollout.run()
    twin = copy.deepcopy(model)
    second = _again(rollout, twin)
    twin_handle = lf.handle_of(twin)
    checks.that("deepcopy: the copy has its own handle", twin_handle not in (None, handle))
    checks.same("deepcopy: the copy runs as the original", second.run(), sparse)
    count = (twin_handle.stats()["sparse_calls"], handle.stats()["sparse_calls"])
    checks.that("deepcopy: each counts its own calls", count[0] == count[1] > 0, str(count))
    handle.unpatch()
    checks.same("deepcopy: the original unpatched is dense", rollout.run(), dense)
    checks.same("deepcopy: the copy is still sparse", second.run(), sparse)
    twin_handle.unpatch()
    checks.same("deepcopy: the copy unpatched is dense", second.run(), dense)
    wrong = restored(model, before) or restored(twin, before)
    checks.that("deepcopy: the original objects are back", not wrong, wrong)
    return checks


def lora(rollout, preset="fast"):
    """Wrap the model with peft's LoRA before and after the patch; None without peft."""
    if importlib.util.find_spec("peft") is None:
        return None
    import peft

    def wrap(one):
        torch.manual_seed(7)
        config = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["q", "k", "v", "o"], init_lora_weights=False
        )
        wrapper = one.pipeline.generator
        wrapper.model = peft.get_peft_model(wrapper.model, config, autocast_adapter_dtype=False)
        wrapper.to(one.size.dtype).eval()

    checks = Checks()
    plain, first, second = (_again(rollout, None) for _ in range(3))
    before = originals(plain.pipeline.generator)
    wrap(plain)
    dense = plain.run()
    wrap(first)
    handles = [lf.patch(first.pipeline, preset, strict=True)]
    sparse = first.run()
    handles.append(lf.patch(second.pipeline, preset, strict=True))
    wrap(second)
    checks.same("LoRA: patch then wrap as wrap then patch", second.run(), sparse)
    counts = [h.stats()["sparse_calls"] for h in handles]
    checks.that("LoRA: as many sparse calls", counts[0] == counts[1] > 0, str(counts))
    checks.that("LoRA: sparse, not dense", not torch.equal(sparse, dense))
    keys = [sorted(r.pipeline.generator.state_dict()) for r in (plain, first, second)]
    checks.that("LoRA: same state-dict keys as unpatched", keys[0] == keys[1] == keys[2])
    for handle in handles:
        handle.unpatch()
    checks.same("LoRA: wrap then patch, unpatched: dense", first.run(), dense)
    checks.same("LoRA: patch then wrap, unpatched: dense", second.run(), dense)
    wrong = "; ".join(restored(r.pipeline.generator, before) for r in (first, second)).strip("; ")
    checks.that("LoRA: unpatched: the original objects are back", not wrong, wrong)
    return checks


def two_checkouts(first, second):
    """Two checkouts with modules of the same names, patched side by side, run in turn."""
    checks, pair = Checks(), (first, second)
    label = f"{first.checkout.name} with {second.checkout.name}"
    models = [r.pipeline.generator for r in pair]
    before, dense = [originals(m) for m in models], [r.run() for r in pair]
    handles = [lf.patch(first.pipeline, "fast"), lf.patch(second.pipeline, "paper")]
    alone = [r.run() for r in pair]
    both = Interleaver(list(pair)).run([0, 0])
    for r, a, b in zip(pair, alone, both, strict=True):
        checks.same(f"{label}: {r.checkout.name} in turn as alone", b, a)
    checks.that(f"{label}: both sparse", all(h.stats()["sparse_calls"] for h in handles))
    handles[0].unpatch()
    checks.same(f"{label}: first unpatched is dense", first.run(), dense[0])
    checks.same(f"{label}: second still sparse", second.run(), alone[1])
    handles[1].unpatch()
    checks.same(f"{label}: second unpatched is dense", second.run(), dense[1])
    wrong = "; ".join(filter(None, (restored(m, b) for m, b in zip(models, before, strict=True))))
    checks.that(f"{label}: the original objects are back", not wrong, wrong)
    return checks
