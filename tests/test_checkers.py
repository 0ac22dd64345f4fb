"""The runners of the checks: what did not end, said nothing or could not begin has not passed."""

import importlib.util
import os
import re
import signal
import sys
import threading
import time
import types
from collections import Counter
from pathlib import Path

import conftest
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import child  # noqa: E402
import test_gpu  # noqa: E402


@pytest.fixture(scope="module")
def mutants():
    spec = importlib.util.spec_from_file_location("mutants_run", ROOT / "tests/mutants/run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def test_a_child_is_killed_with_what_it_started(tmp_path):
    # The grandchild holds the pipe, and would keep the reader waiting.
    program = (
        "import subprocess, sys; print('begun', flush=True); "
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    began = time.monotonic()
    status, text = child.run([sys.executable, "-c", program], tmp_path, limit=3)
    assert status is None and "begun" in text and "killed after 3 s" in text
    assert time.monotonic() - began < 30


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX signals")
def test_an_interrupted_run_leaves_no_child(tmp_path):
    program = "import os, time; print(os.getpid(), file=open('pid', 'w')); time.sleep(60)"

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 3)
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            child.run([sys.executable, "-c", program], tmp_path, limit=60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_what_runs_in_other_threads_can_be_stopped(tmp_path):
    program, found = "import time; print('begun', flush=True); time.sleep(60)", []
    thread = threading.Thread(
        target=lambda: found.append(child.run([sys.executable, "-c", program], tmp_path))
    )
    thread.start()
    while not child._running:
        time.sleep(0.01)
    child.stop()
    thread.join(30)
    assert found[0][0] == -signal.SIGKILL and not child._running


def test_a_child_gets_its_folder_and_environment(tmp_path):
    program = "import os, sys; print(os.getcwd(), os.environ['ONE']); sys.exit(3)"
    status, text = child.run([sys.executable, "-c", program], tmp_path, {"ONE": "two"}, 60)
    assert (status, text.split()) == (3, [str(tmp_path), "two"])


CLEAN = dict(passed=3, status=0, reports=0)


@pytest.mark.parametrize(
    ("good", "facts"),
    [
        (True, {}),
        (False, {"reports": None}),  # the tool said no sum
        (False, {"reports": 1}),
        (False, {"status": None}),  # out of time
        (False, {"status": 1}),
        (False, {"failed": 1}),
        (False, {"passed": 0, "skipped": 3}),
        (True, {"planted": True, "reports": 7, "passed": 0, "status": 86}),
        (False, {"planted": True, "reports": 0, "passed": 0}),
        (False, {"planted": True, "reports": None, "passed": 0}),
        (True, {"planted": True, "unseen": True, "reports": 0, "passed": 0}),
        (False, {"planted": True, "unseen": True, "reports": None, "passed": 0}),
    ],
)
def test_what_counts_as_good(good, facts):
    assert test_gpu.Run("memcheck", "x", **(CLEAN | facts)).good == good


def test_plain_tests_have_no_sum_of_reports():
    assert test_gpu.Run("tests", "x", passed=3, status=0).good
    assert not test_gpu.Run("tests", "x", passed=3).good


@pytest.mark.parametrize(
    ("text", "sum_"),
    [
        ("3 passed", None),
        ("========= ERROR SUMMARY: 0 errors", 0),
        ("========= ERROR SUMMARY: 12 errors\n========= ERROR SUMMARY: 2 errors", 2),
        ("========= RACECHECK SUMMARY: 8 hazards displayed (8 errors, 0 warnings)", 8),
    ],
)
def test_the_sum_is_the_last_one(text, sum_):
    assert test_gpu.reports(text) == sum_


def test_a_process_out_of_time_is_not_good(tmp_path):
    run = test_gpu.Run("synccheck", "x")
    command = [sys.executable, "-c", "print('ERROR SUMMARY: 0 errors', flush=True);"
               "import time; time.sleep(60)"]  # fmt: skip
    test_gpu.execute(run, command, tmp_path, time.monotonic() + 2)
    test_gpu.join(["synccheck"], tmp_path)
    assert run.status is None and run.reports == 0 and not run.good
    assert "killed after" in (tmp_path / "synccheck.log").read_text()


def test_a_torn_result_file_is_a_failure_with_a_word(tmp_path):
    run, path = test_gpu.Run("tests", "x", status=-9), tmp_path / "x.xml"
    path.write_text('<testsuites><testsuite><testcase name="a"/><testca')
    test_gpu.counts(path, run)
    assert (run.passed, run.failed, run.good) == (0, 1, False)
    assert "torn results" in str(run) and "NOT GOOD: tests x" in test_gpu.summary({}, [run])


def test_what_cannot_begin_is_not_good(tmp_path, monkeypatch):
    monkeypatch.setattr(test_gpu, "sanitizer", lambda tool: None)
    ((run, why, _),) = test_gpu.sanitizer_jobs("racecheck", [], True)
    assert not test_gpu.execute(run, why, tmp_path, time.monotonic() + 60).good
    assert "compute-sanitizer is not" in (tmp_path / "racecheck-(all).log").read_text()
    monkeypatch.setattr(test_gpu, "sanitizer", lambda tool: [tool])
    jobs = test_gpu.sanitizer_jobs("racecheck", [], True)
    assert jobs and all(isinstance(command, str) for _, command, _ in jobs)


def test_every_sanitizer_row_has_tests_and_every_kernel_a_name():
    # A pattern that fits no test would leave a kernel unchecked.
    ids = test_gpu.collected()
    for tool in test_gpu.SANITIZERS:
        for name, pattern in test_gpu.TABLES[tool].items():
            kernel = name.split()[1] if name.endswith((" sm90", " portable")) else ""
            assert [i for i in ids if re.search(pattern, i) and kernel in i], (tool, name)
    # The sanitizers look at kernels of these names alone.
    source = "".join(p.read_text() for p in (ROOT / "csrc" / "cuda").glob("*.cu*"))
    assert source.count("__global__") == len(test_gpu.KERNEL.findall(source))


@pytest.mark.parametrize(
    ("facts", "hangs", "word", "wrong"),
    [
        (dict(caught="tests/x.py::a"), False, "caught", 0),
        (dict(caught=""), False, "SURVIVED", 1),
        (dict(caught="", ended=False), False, "NO END", 1),
        (dict(caught="", ended=False), True, "caught", 0),
    ],
)
def test_a_fault_is_caught_by_a_test_or_by_an_end_foretold(
    mutants, tmp_path, facts, hangs, word, wrong
):
    mutant = mutants.Mutant(Path("a-fault.patch"), "what", ("tests/x.py",), (), True, hangs)
    table = mutants.Table(tmp_path)
    table.harmed(mutant, mutants.Verdict(3, facts.pop("caught"), 1.0, "raw output", **facts))
    assert table.end() == wrong
    row = (tmp_path / "mutants.txt").read_text().splitlines()[1]
    assert row.startswith(f"a-fault{'':<25} {word}")
    assert "raw output" in (tmp_path / "mutants.log").read_text()


def test_a_tree_without_a_verdict_or_a_pass_fails_the_run(mutants):
    mutant = mutants.Mutant(Path("a-fault.patch"), "what", ("tests/x.py",), (), True)
    table = mutants.Table()
    table.broken(mutant, RuntimeError("no build"))
    assert table.end() == 1
    table = mutants.Table()
    assert not table.unharmed(mutant, mutants.Verdict(0, "", 1.0, "3 skipped"))
    assert table.end() == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--only", "racechek"],
        ["--limit", "0"],
        ["--limit", "soon"],
        ["--out", __file__],
    ],
)
def test_wrong_arguments_end_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        test_gpu.main(arguments)
    assert end.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_patches_apply_to_this_tree(mutants):
    for path in [*mutants.HERE.glob("*.patch"), *mutants.HERE.glob("gpu/*.patch")]:
        mutants.read(path)
        status, text = child.run(["git", "apply", "--check", str(path)], ROOT)
        assert status == 0, f"{path.name}: {text}"


@pytest.mark.parametrize("name", ["bench", "quality", "cpu", "tuning", "attention_share"])
def test_a_benchmark_finds_its_checkout_or_says_what_is_missing(name, tmp_path):
    program = str(ROOT / "benchmarks" / f"{name}.py")
    elsewhere = {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    status, text = child.run([sys.executable, program, "--help"], tmp_path, elsewhere, 120)
    assert status == 0 and text.startswith(f"usage: {name}.py")
    # Without site-packages there is no torch.
    status, text = child.run([sys.executable, "-S", program], tmp_path, elsewhere, 120)
    assert status == 2 and "Traceback" not in text
    assert re.search(rf"^{name}.py: expected the package torch, .*`make build`", text, re.M)


@pytest.mark.parametrize(
    ("counted", "full", "fails"),
    [
        ((1200, 900), (True, True), False),
        ((1200, 700), (True, True), True),
        ((1200, 700), (True, False), False),  # part of the suite: the count means nothing
    ],
)
def test_the_generated_cases_of_all_workers_count(counted, full, fails, monkeypatch):
    monkeypatch.setattr(conftest.cases, "RAN", Counter())
    monkeypatch.setattr(conftest, "_workers", [])
    monkeypatch.setattr(conftest.cases, "ENOUGH", 2000)
    for n, whole in zip(counted, full, strict=True):
        told = {"cases": {"test_any_list": n}, "full": whole}
        conftest.pytest_testnodedown(types.SimpleNamespace(workeroutput=told), None)
    session = types.SimpleNamespace(config=None, exitstatus=pytest.ExitCode.OK)
    conftest.pytest_sessionfinish(session, session.exitstatus)
    assert (session.exitstatus == pytest.ExitCode.TESTS_FAILED) == fails
