"""What stands in the way of a call: one layer's ``forward``, and the dense attention inside it.

A :class:`Hook` is the instance attribute ``forward`` of one attention layer. It reads the
arguments, makes a :class:`Visit` current in this thread and calls the original forward. The
dense attention call in there reaches :func:`route`, which asks the visit's handle what to do.
Without a current visit :func:`route` calls the original: other models of the same file,
unpatched layers and cross-attention are never touched.
"""

import functools
import inspect
import sys
import threading
import weakref

import torch


class _Local(threading.local):
    visit = None  # the Visit of the forward that runs in this thread
    dense = 0  # depth of lightforcing.dense()


local = _Local()
_lock = threading.RLock()

# ---- torch.compile ---------------------------------------------------------------------------
#
# The bookkeeping of a handle stays out of its sight, a graph break each: addresses, versions and
# counts are no graph, and tracing them took 40 s for four chunks of a one-layer model.

_watcher = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", None)
apart = None  # apart(function, *arguments): the call, unseen; see keep_apart()


def is_watched():
    """Does torch.compile trace this line, or look at the frames of this thread?"""
    if torch.compiler.is_compiling():
        return True
    return bool(_watcher()) if _watcher is not None else "torch._dynamo" in sys.modules


def keep_apart():
    """Make :data:`apart`, which loads dynamo: seconds, where nobody compiles."""
    global apart
    apart = torch.compiler.disable(lambda function, *arguments: function(*arguments))


keep_apart._torchdynamo_disable = True  # what torch.compiler.disable sets, without loading it


class Visit:
    """One forward of one layer, from entry to exit; lives on the stack only."""

    __slots__ = ("hook", "call", "reason", "frame_tokens", "first_frame", "window", "step",
                 "shared", "calls", "keys", "version", "address", "capture", "seen",
                 "entry")  # fmt: skip

    def __init__(self, hook):
        """A forward of ``hook``'s layer begins."""
        self.hook = hook
        self.call = None  # adapters.Call, or None with a reason
        self.reason = None  # why the forward stays dense, known before the attention call
        self.frame_tokens = None
        self.first_frame = None  # of the query, counted over the video
        self.window = None  # most resident frames
        self.step = 0  # forwards of this layer for this first frame of this cache before
        self.shared = False  # does step_share apply?
        self.calls = 0  # attention calls made
        self.keys = None  # the layer's key cache, if versions of it are tracked
        self.version = None  # its version on entry
        self.address = 0  # of the keys of the last attention call, if they lie in `keys`
        self.capture = 0  # the CUDA graph that its stream is captured for, 0 if none
        self.seen = None  # and at the last attention call
        self.entry = None  # the cached means that this forward used or filled


class Hook:
    """The instance attribute ``forward`` of a patched layer.

    An object of a module-level class with the layer as an attribute, so that a deep copy or a
    pickle of the layer brings its own hook, bound to the copy.
    """

    def __init__(self, module, handle, layer, before):
        """For ``module``, which :func:`attach` puts it on."""
        self.module = module
        self.handle = handle  # None: a pass-through, somebody wrapped us before we left
        self.layer = layer
        self.before = before  # the instance-level forward that was there, or None
        self.intercepted = False

    def __call__(self, *args, **kwargs):
        """The original forward, with a visit current while it runs."""
        handle = self.handle
        if handle is None:
            return self.__wrapped__(*args, **kwargs)
        watched = is_watched()
        if watched and apart is None:
            keep_apart()
        visit = (
            apart(handle.enter, self, args, kwargs) if watched else handle.enter(self, args, kwargs)
        )
        forward = self.before
        if forward is None:  # as in __wrapped__, without its two frames
            forward = type(self.module).forward.__get__(self.module)
        outer, local.visit = local.visit, visit
        try:
            result = forward(*args, **kwargs)
        finally:
            local.visit = outer
        if watched:
            apart(handle.leave, visit)
        else:
            handle.leave(visit)
        return result

    @property
    def __wrapped__(self):
        """The original forward, bound to the layer."""
        return self.before if self.before is not None else _bound_forward(self.module)

    @property
    def __signature__(self):
        """The original's."""
        return inspect.signature(self.__wrapped__)

    def __getstate__(self):
        """A copy may live in a process whose globals nobody has replaced yet."""
        return self.__dict__ | {"intercepted": False}

    def __setstate__(self, state):
        """Register the copy with its handle, which was copied along."""
        self.__dict__.update(state)
        if self.handle is not None:
            self.handle.adopt(self)

    def __repr__(self):
        """Name what it wraps."""
        return f"<lightforcing hook of layer {self.layer} around {self.__wrapped__!r}>"


def _bound_forward(module):
    return type(module).forward.__get__(module)


def attach(module, handle, layer):
    """Put a hook on ``module``, or hand the hook it has to ``handle``."""
    hook = hook_of(module)
    if hook is None:
        hook = Hook(module, handle, layer, vars(module).get("forward"))
        module.forward = hook
    hook.handle, hook.layer = handle, layer
    return hook


def detach(hook):
    """Put back what was there, or become a pass-through if somebody wrapped the hook."""
    hook.handle = None
    if vars(hook.module).get("forward") is hook:
        if hook.before is None:
            del hook.module.forward
        else:
            hook.module.forward = hook.before


def hook_of(module):
    """The hook on ``module``, also under wrappers that keep ``__wrapped__`` or the old forward."""
    attributes = vars(module)
    chain = attributes.get("forward")
    while chain is not None and not isinstance(chain, Hook):
        chain = getattr(chain, "__wrapped__", None)
    return chain or next((v for v in attributes.values() if isinstance(v, Hook)), None)


def route(original, args, kwargs):
    """The dense call ``original(*args, **kwargs)``, or what the current visit makes of it."""
    visit = local.visit
    if visit is None:
        return original(*args, **kwargs)
    # No visit while it runs: an original that ends in another shim must not be counted twice.
    local.visit = None
    try:
        if is_watched():
            if apart is None:
                keep_apart()
            return apart(visit.hook.handle.attend, visit, original, args, kwargs)
        return visit.hook.handle.attend(visit, original, args, kwargs)
    finally:
        local.visit = visit


class Shim:
    """Stands for one global function, in the namespace that a layer's forward looks it up in."""

    def __init__(self, namespace, name):
        """For the function that ``namespace[name]`` is now."""
        self.original = namespace[name]
        functools.update_wrapper(self, self.original)
        self.namespace, self.name = namespace, name
        self.users = weakref.WeakSet()

    def __call__(self, *args, **kwargs):
        """The original, or what the current visit makes of the call."""
        return route(self.original, args, kwargs)

    def withdraw(self):
        """Put the original back, unless somebody else has replaced us meanwhile."""
        if self.namespace.get(self.name) is self:
            self.namespace[self.name] = self.original


_shims = {}  # (id of the namespace, name) -> Shim; the shim keeps its namespace alive


def intercept(namespace, name, user):
    """Replace ``namespace[name]`` by a shim for as long as ``user`` lives or until released."""
    with _lock:
        _sweep()
        shim = _shims.get((id(namespace), name))
        if shim is None or not _leads_to(namespace.get(name), shim):
            fresh = Shim(namespace, name)
            if shim is not None:
                fresh.users |= shim.users
            shim = namespace[name] = _shims[id(namespace), name] = fresh
        shim.users.add(user)


def release(namespace, name, user):
    """The end of ``user``'s interest; the last user's release restores the original."""
    with _lock:
        shim = _shims.get((id(namespace), name))
        if shim is not None:
            shim.users.discard(user)
        _sweep()


def _sweep():
    for key, shim in list(_shims.items()):
        if not shim.users:
            shim.withdraw()
            del _shims[key]


def _leads_to(function, shim):
    while function is not None and function is not shim:
        function = getattr(function, "__wrapped__", None)
    return function is shim
