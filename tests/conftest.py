"""Hypothesis profiles, the processor's instruction sets, and the count of generated cases."""

import gc
import os
from pathlib import Path

# Thousands of tiny calls: threads that spin for each other cost twenty times the work on a
# busy machine. Read when NumPy and OpenMP load, so before any import of them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import cases  # noqa: E402
import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from lightforcing import _core  # noqa: E402

torch.set_num_threads(1)

# `ci` is the same on every machine and every run; `explore` (--hypothesis-profile=explore)
# looks for new cases.
common = dict(deadline=None, database=None, print_blob=True)
hypothesis.settings.register_profile("ci", derandomize=True, **common)
hypothesis.settings.register_profile("explore", derandomize=False, **common)
hypothesis.settings.load_profile("ci")


def _available(names):
    default = _core.isa()
    try:
        for name in names:
            try:
                _core.force_isa(name)
            except (ValueError, NotImplementedError):
                continue
            yield name
    finally:
        _core.force_isa(default)


ISAS = list(_available(["scalar", "vector", "avx2", "avx512"]))


@pytest.fixture(params=ISAS)
def isa(request):
    """Run the test once for each instruction set that this machine has."""
    default = _core.isa()
    _core.force_isa(request.param)
    yield request.param
    _core.force_isa(default)


@pytest.fixture
def each_isa():
    """Yield the name of each instruction set with it in force."""

    def switch():
        for name in ISAS:
            _core.force_isa(name)
            yield name

    default = _core.isa()
    yield switch
    _core.force_isa(default)


@pytest.fixture
def each_thread_count():
    """Yield 1, 2, 3 and 7 threads in turn: results must not depend on it."""

    def switch():
        for count in 1, 2, 3, 7:
            _core.set_threads(count)
            yield count

    yield switch
    _core.set_threads(0)


@pytest.fixture(scope="module")
def young_garbage():
    """Collections look at what the module's tests make, not at all of torch's: 0.3 s each."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# ---- a full run must have generated enough cases --------------------------------------

_partial = False  # deselected tests (-k, -m): the count means nothing


def pytest_deselected(items):
    global _partial
    _partial = _partial or bool(items)


def _is_full(session):
    here = Path(__file__).parent
    names = {p.name for p in here.glob("test_*.py") if "@generated(" in p.read_text()}
    collected = {item.path.name for item in session.items}
    single = any("::" in argument for argument in session.config.args)
    return names <= collected and not (_partial or single or session.shouldstop)


_workers = []  # of pytest-xdist: did each collect a full run?


def pytest_sessionfinish(session, exitstatus):
    if hasattr(session.config, "workeroutput"):  # of a worker, which ran some tests of all
        session.config.workeroutput.update(cases=dict(cases.RAN), full=_is_full(session))
        return
    full = all(_workers) if _workers else _is_full(session)
    if exitstatus == pytest.ExitCode.OK and full and sum(cases.RAN.values()) < cases.ENOUGH:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Adds what a worker counted; one that crashed has failed a test already."""
    told = getattr(node, "workeroutput", {})
    cases.RAN.update(told.get("cases", {}))
    _workers.append(told.get("full", False))


def pytest_terminal_summary(terminalreporter, config):
    total = sum(cases.RAN.values())
    if total:
        terminalreporter.write_line(f"hypothesis cases: {total} (a full run needs {cases.ENOUGH})")
