"""The handle of a patched model: puts the hooks on and takes them off, and answers its user."""

import threading
import weakref

from . import hook, report
from .calls import Calls
from .config import Config


class Handle(Calls):
    """What :func:`lightforcing.patch` returns: one per model, also a context manager.

    ``print(handle)`` is the report. Leaving the ``with`` block unpatches.
    """

    def __init__(self, config, adapter):
        """Made by :func:`lightforcing.patch`."""
        super().__init__(config, adapter)
        self._hooks = []  # weak: a hook and its layer never outlive the model
        self._lock = threading.RLock()

    def __getstate__(self):
        """A copy keeps the settings; hooks register again, counts and caches start afresh."""
        kept = ("config", "adapter", "depth", "frames_per_chunk", "facts")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state):
        """Start afresh."""
        self.__init__(state["config"], state["adapter"])
        self.__dict__.update(state)

    # ---- patching ---------------------------------------------------------------------

    @property
    def hooks(self):
        """The hooks of this handle that are alive, first layer first."""
        hooks = [h for h in (ref() for ref in self._hooks) if h is not None and h.handle is self]
        return sorted(hooks, key=lambda h: h.layer)

    @property
    def active(self):
        """Is anything patched?"""
        return bool(self.hooks)

    def adopt(self, hooked):
        """A hook, new or copied, belongs to this handle from now on."""
        with self._lock:
            self._hooks = [r for r in self._hooks if r() not in (None, hooked)]
            self._hooks.append(weakref.ref(hooked))

    def take(self, layers, modules):
        """Patch ``layers``; those that another handle patched change over to this one."""
        before = [hook.hook_of(layer) for layer in layers]
        owners = [None if h is None else h.handle for h in before]
        new = any(owner is not self for owner in owners)
        if new:
            self.depth = len(layers)
        for index, layer in enumerate(layers):
            hooked = hook.attach(layer, self, index if new else before[index].layer)
            self.adopt(hooked)
            self.adapter.install(layer, self)
            hooked.intercepted = True
        for layer, owner in zip(layers, owners, strict=True):
            if owner not in (None, self) and not owner.active:
                owner.adapter.remove(layer, owner)
        tellers = [m for m in modules if hasattr(m, "num_frame_per_block")]
        self._tellers = [weakref.ref(m) for m in tellers]
        self._read_chunk()
        self.facts["layer"] = type(layers[0]).__name__

    def update(self, config):
        """New settings; counts, caches and schedules start afresh."""
        if not isinstance(config, Config):
            raise TypeError(f"config: expected a Config, got {config!r}")
        missing = [
            i for i in config.dense_layers if self.depth and not -self.depth <= i < self.depth
        ]
        if missing:
            raise ValueError(
                f"dense_layers: expected layers of the {self.depth} patched ones, got {missing}"
            )
        layers = config.budget and len(config.budget.shares)
        if layers and self.depth and layers != self.depth:
            raise ValueError(
                f"budget: expected shares for {self.depth} layers, the patched ones, got {layers}"
            )
        for hooked in self.hooks if layers else ():
            heads, given = self.adapter.heads(hooked.module), len(config.budget.shares[0])
            if heads not in (None, given):
                raise ValueError(
                    f"budget: expected shares for {heads} heads, as layer {hooked.layer} has, "
                    f"got {given}"
                )
        self.config = config
        self.reset()

    def unpatch(self):
        """Put every original object back. Harmless the second time."""
        for hooked in self.hooks:
            hook.detach(hooked)
            self.adapter.remove(hooked.module, self)
        self._sparse.forget()

    def __enter__(self):
        """The handle itself."""
        return self

    def __exit__(self, *error):
        """Unpatch."""
        self.unpatch()

    def reset(self):
        """Forget statistics, cached means, step counts, warnings and solved schedules."""
        with self._lock:
            self._clear()

    # ---- what the user reads -------------------------------------------------------------

    @property
    def means_bytes(self):
        """Bytes of cached block means."""
        return self._sparse.nbytes

    def stats(self):
        """Counts in plain Python values, JSON-ready.

        Returns:
            A dict: the sums over all calls (``calls``, ``sparse_calls``, ``density``, ``dense``
            by reason, ``ms``, ``recall``), ``attention_share`` of a step with timing on,
            ``chunks``, a list of the same sums by chunk (chunk 1 is the first; None where the
            place was not known), and ``layers``, by layer and chunk.
        """
        return report.stats(self)

    def explain(self, **facts):
        """The plan chunk by chunk and the gain it predicts, as a :class:`report.Plan`.

        Facts that no call has told yet are assumed, and the text says so; ``num_frames``,
        ``frames_per_chunk``, ``frame_tokens`` and ``attention_share`` may be given here.
        """
        return report.explain(self, **facts)

    def report(self):
        """What ran sparse, how sparse, and what stayed dense and why, as text."""
        return report.text(self)

    def to_dict(self):
        """Settings, plan and statistics, JSON-ready."""
        return {
            "config": self.config.to_dict(),
            "layers": len(self.hooks),
            "plan": self.explain().to_dict(),
            "stats": self.stats(),
        }

    def __str__(self):
        """The report."""
        return self.report()

    def __repr__(self):
        """One line."""
        return f"<lightforcing.Handle of {len(self.hooks)} layers, sparsity {self.config.sparsity}>"

    def _repr_html_(self):
        return report.html(self)
