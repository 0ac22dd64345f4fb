"""Import somebody's checkout of a video code base, unmodified, beside others in one process.

These repositories are folders of scripts: `wan`, `pipeline`, `utils` sit at the top of each, under
the same names with different contents. A `Checkout` therefore owns a private set of modules: inside
`with checkout:` its folder leads `sys.path` and its modules are in `sys.modules`, outside neither
is. What cannot be imported is replaced by stand-ins, each noted in `checkout.standins` with its
reason, and no file is written: byte code is off, and `fingerprint()` hashes every file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import inspect
import re
import subprocess
import sys
import types
from pathlib import Path

import torch

# Imports that the checkouts themselves guard with try/except and do without.
OPTIONAL = {
    "flash_attn",
    "flash_attn_interface",
    "sageattention",
    "spas_sage_attn",
    "xfuser",
    "triton",
    "transformer_engine",
    "fouroversix",
    "longlive_kv_dequant_cuda",
    "scipy",
}


class Settings(dict):
    """A dict whose keys are attributes too, like the config objects these code bases pass round."""

    def __getattr__(self, name):
        """Read a key as an attribute, so that `getattr(settings, name, default)` works."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    __setattr__ = dict.__setitem__


class _Anything(type):
    """Metaclass of placeholders: any attribute of a placeholder class is another placeholder."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return placeholder(name)


def placeholder(name):
    """Return a class that can be imported, subclassed and named, but not created."""

    def refuse(self, *args, **kwargs):
        raise NotImplementedError(f"{name}: a stand-in for something that cannot be imported here")

    return _Anything(name, (), {"__init__": refuse})


def register_to_config(init):
    """Keep what a constructor was called with in `self.config`, as diffusers' decorator does."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        values = dict(bound.arguments)
        values.pop("self", None)
        values.update(values.pop("kwargs", {}))
        object.__setattr__(self, "config", Settings(values))
        init(self, *args, **kwargs)

    return wrapped


class ConfigMixin:
    """Stand-in for diffusers' mixin: only the part that constructors use."""

    def register_to_config(self, **values):
        """Overwrite entries of `self.config`."""
        self.config.update(values)


class ModelMixin(torch.nn.Module):
    """Stand-in for diffusers' mixin: a plain module; weights are made by the benchmark."""


# What has to behave, not merely exist.
BEHAVING = {
    "ConfigMixin": ConfigMixin,
    "ModelMixin": ModelMixin,
    "SchedulerMixin": type("SchedulerMixin", (), {}),
    "SchedulerOutput": functools.partial(types.SimpleNamespace),
    "KarrasDiffusionSchedulers": (),
    "register_to_config": register_to_config,
    "EasyDict": Settings,
    "is_scipy_available": lambda: False,
    "load_dotenv": lambda *args, **kwargs: False,
    "lru_cache": functools.lru_cache,
}


class _StandinModule(types.ModuleType):
    """A module that answers every name: from `BEHAVING`, else with a placeholder."""

    __path__: list = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = BEHAVING.get(name) if name in BEHAVING else placeholder(name)
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Last on `sys.meta_path`: stands in for what a checkout's own file imports and nobody has."""

    def __init__(self, checkout):
        self.checkout = checkout

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        local = (self.checkout.root / top).exists() or (self.checkout.root / f"{top}.py").exists()
        if top in OPTIONAL or local or not self._asked_by_checkout():
            return None
        self.checkout.note(f"package {top}", "not installed")
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def _asked_by_checkout(self):
        frame = sys._getframe(2)
        while frame and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        return frame is not None and self.checkout.holds(frame.f_code.co_filename)

    def create_module(self, spec):
        return _StandinModule(spec.name)

    def exec_module(self, module):
        """Nothing to run: names appear when they are asked for."""


class Checkout:
    """A folder with somebody's code, its private modules, and the stand-ins it needed.

    Args:
        path: folder that holds the code base's top-level packages.
    """

    def __init__(self, path):
        self.root = Path(path).resolve()
        if not self.root.is_dir():
            raise ValueError(f"path: expected a folder with a checkout, got {path}")
        self.name = self.root.name
        self.standins: dict[str, str] = {}
        self.modules: dict[str, types.ModuleType] = {}
        self._shadowed: dict[str, types.ModuleType] = {}
        self._finder = _Finder(self)
        self._depth = 0

    def note(self, what, reason):
        """Remember a stand-in or setting, once, with why it is needed."""
        self.standins.setdefault(what, reason)

    def holds(self, filename):
        """Say whether a file lies in this checkout."""
        return str(filename or "").startswith(f"{self.root}/")

    def _own(self, module):
        return self.holds(getattr(module, "__file__", None)) or (
            isinstance(module, _StandinModule) and module.__spec__.loader is self._finder
        )

    def __enter__(self):
        """Make this checkout's modules the ones that `import` finds."""
        self._depth += 1
        if self._depth > 1:
            return self
        sys.dont_write_bytecode, self._bytecode = True, sys.dont_write_bytecode
        tops = {p.stem for p in self.root.iterdir() if p.is_dir() or p.suffix == ".py"}
        self._shadowed = {n: m for n, m in sys.modules.items() if n.partition(".")[0] in tops}
        for name in self._shadowed:
            del sys.modules[name]
        sys.modules.update(self.modules)
        sys.path.insert(0, str(self.root))
        sys.meta_path.append(self._finder)
        self._device = torch.cuda.current_device
        if not torch.cuda.is_available():
            torch.cuda.current_device = lambda: 0
            self.note("torch.cuda.current_device", "called at import time, and there is no GPU")
        return self

    def __exit__(self, *exc):
        """Take them out again; the objects made from them live on."""
        self._depth -= 1
        if self._depth:
            return
        torch.cuda.current_device = self._device
        self.modules = {n: m for n, m in list(sys.modules.items()) if self._own(m)}
        for name in self.modules:
            del sys.modules[name]
        sys.modules.update(self._shadowed)
        sys.path.remove(str(self.root))
        sys.meta_path.remove(self._finder)
        sys.dont_write_bytecode = self._bytecode

    @contextlib.contextmanager
    def running(self):
        """Be inside the checkout, with the current device a CPU: some models ask for it anew."""
        with self:
            importing = torch.cuda.current_device
            if not torch.cuda.is_available():
                torch.cuda.current_device = lambda: torch.device("cpu")
            try:
                yield self
            finally:
                torch.cuda.current_device = importing

    def load(self, module):
        """Import one of the checkout's modules by its dotted name.

        A name that an installed package no longer has (transformers 5 dropped some) gets a
        placeholder, and the import starts again.
        """
        with self:
            while True:
                try:
                    return importlib.import_module(module)
                except ImportError as error:
                    lost = re.match(r"cannot import name '(\w+)' from '([\w.]+)'", str(error))
                    package = lost and sys.modules.get(lost[2])
                    if not package or self._own(package) or hasattr(package, lost[1]):
                        raise
                    setattr(package, lost[1], placeholder(lost[1]))
                    self.note(f"{lost[2]}.{lost[1]}", "not in the installed version")

    def loaded(self):
        """Return the checkout's own modules that have been imported, with their names."""
        known = {**self.modules, **{n: m for n, m in list(sys.modules.items()) if self._own(m)}}
        return {n: m for n, m in known.items() if not isinstance(m, _StandinModule)}

    def fingerprint(self):
        """Return {relative path: SHA-256} of every file, so that new files show as well."""
        files = sorted(p for p in self.root.rglob("*") if p.is_file() and ".git" not in p.parts)
        return {
            str(p.relative_to(self.root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
        }

    def commit(self):
        """Return the commit, short, of a git checkout or from a file NAME.commit; None: unknown."""
        note = self.root.with_name(f"{self.name}.commit")
        if note.is_file():
            return note.read_text().strip()[:7]
        if not (self.root / ".git").exists():
            return None
        command = ["git", "-C", str(self.root), "rev-parse", "--short=7", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True)
        return found.stdout.strip() or None
