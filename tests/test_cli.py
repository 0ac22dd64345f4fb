"""The command line: every command as a user runs it, its JSON, its exit codes, its sentences."""

import json
import subprocess
import sys
import types

import numpy as np
import pytest

import lightforcing as lf
from lightforcing import _core, cli, selftest


def run(*arguments, before=""):
    """One command in its own process; ``before`` is Python that runs first."""
    code = f"{before}\nimport sys\nfrom lightforcing.cli import main\nsys.exit(main(sys.argv[1:]))"
    start = ["-c", code] if before else ["-m", "lightforcing"]
    command = [sys.executable, *start, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def answer(*arguments, code=0):
    """What a command prints with --json, parsed."""
    done = run(*arguments, "--json")
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def test_info_says_what_this_build_is():
    facts = answer("info")
    assert facts["version"] == lf.__version__
    assert facts["isa"] in facts["isas"]
    text = run("info").stdout
    assert f"version       {lf.__version__}" in text


def test_info_does_not_import_torch():
    before = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules))"
    assert run("info", before=before).stdout.splitlines()[-1] == "False"


def test_doctor_is_healthy_here():
    found = answer("doctor")
    assert found["healthy"]
    names = [c["name"] for c in found["checks"]]
    assert names[:6] == ["python", "build", "cpu", "ops", "cuda", "torch"]
    assert run("doctor").stdout.splitlines()[-1] == "healthy"


def test_doctor_fails_when_the_arithmetic_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(lf, "block_sparse_attention", lambda q, k, v: np.zeros_like(q))
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "broken   ops        attention differs from NumPy by" in text
    assert "run `python -m lightforcing selftest`" in text


def test_doctor_names_the_driver_that_is_too_old(monkeypatch, capsys):
    facts = dict(lf.info(), cuda_built=True, cuda_archs=["90a"], cuda_runtime=13000)
    monkeypatch.setattr(lf, "info", lambda: facts)
    monkeypatch.setattr("lightforcing.doctor.installed_driver", lambda: 12040)
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "built for 90a, CUDA 13.0, a driver for CUDA 12.4" in text
    assert "install driver 580 or newer" in text


def test_doctor_tells_how_to_get_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr("lightforcing.doctor.version", lambda package: None)
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "pip install 'lightforcing[models]'" in text
    assert "pip install 'lightforcing[viz]'" in text


@pytest.mark.parametrize(
    "archs, chip, variable, reason, state, said",
    [
        (["80", "90a"], "90", "", None, "ok", "its code is in this build; attention runs on the H"),
        (["80"], "89", "auto", "the Hopper kernel takes compute capability 9.0 only", "ok",
         "an older chip of its family is in this build; attention runs on the portable kernel (the "
         "Hopper kernel takes compute capability 9.0 only)"),
        (["90a"], "100", "", "words", "ok", "no code for it is in this build, the driver compiles"),
        (["80"], "75", "", "words", "missing", "chip 7.5: no code that runs there"),
        (["90a"], "90", "portable", None, "ok", "portable kernel (LIGHTFORCING_KERNEL=portable as"),
        (["80"], "80", "sm90", "words", "broken", "LIGHTFORCING_KERNEL=sm90, but words"),
        (["80"], "80", "best", "words", "broken", "LIGHTFORCING_KERNEL=best, not auto, portable"),
    ],
)  # fmt: skip
def test_doctor_names_every_gpu_and_its_kernel(
    archs, chip, variable, reason, state, said, monkeypatch, capsys
):
    facts = dict(lf.info(), cuda_archs=archs)
    monkeypatch.setattr(lf, "info", lambda: facts)
    monkeypatch.setenv("LIGHTFORCING_KERNEL", variable)
    monkeypatch.setattr("lightforcing.doctor.devices", lambda: [("A", "80"), ("NVIDIA B", chip)])
    asked = []
    core = types.SimpleNamespace(is_disabled=bool, why_portable=lambda i: asked.append(i) or reason)
    monkeypatch.setattr("lightforcing.doctor._core", core)
    assert cli.main(["doctor"]) == (state == "broken")
    line = next(x for x in capsys.readouterr().out.splitlines() if "cuda:1" in x)
    assert line.startswith(state) and f"NVIDIA B, chip {chip[:-1]}.{chip[-1]}" in line
    assert said in line
    assert asked == ([0, 1] if state != "missing" else [0])


def test_the_reason_of_the_core_is_a_sentence():
    reason = _core.why_portable(0)
    if lf.info()["cuda_devices"] == 0:
        none = "the Hopper kernel takes compute capability 9.0 only"
        assert reason == (none if lf.info()["cuda_built"] else "this build has no CUDA half")
    for wrong, error in ((-1, ValueError), ("0", TypeError)):
        with pytest.raises(error, match="device: expected"):
            _core.why_portable(wrong)


def test_selftest_tries_every_operator_on_every_instruction_set():
    found = answer("selftest", "--seconds", 2)
    assert found["ok"]
    tried = {(r["isa"], r["check"]) for r in found["checks"]}
    expected = {(i, c) for i in lf.info()["isas"] for c in selftest.CHECKS}
    if found["cuda_untested"] is None:
        expected |= {("cuda", c) for c in selftest.CUDA_CHECKS}
        kernels = selftest.cuda_kernels()
        expected |= {(kernel, c) for kernel in kernels for c in selftest.KERNEL_CHECKS}
    assert tried == expected
    assert all(r["cases"] >= 1 for r in found["checks"])


def test_selftest_fails_when_an_operator_is_wrong(monkeypatch, capsys):
    right = lf.compress
    monkeypatch.setattr(lf, "compress", lambda *a, **k: right(*a, **k) * 1.00001)
    assert cli.main(["selftest", "--seconds", "1"]) == 1
    failed = [x for x in capsys.readouterr().out.splitlines() if "FAILED" in x]
    assert len(failed) == len(lf.info()["isas"])
    assert all("compress" in x and "case 1: " in x for x in failed)


def test_selftest_says_why_no_gpu_is_tried(monkeypatch, capsys):
    monkeypatch.setattr(selftest, "CHECKS", {"compress": selftest.compress_cases})
    monkeypatch.setattr(selftest, "why_not_cuda", lambda: "the GPU is out")
    assert cli.main(["selftest", "--seconds", "0.01"]) == 0
    assert capsys.readouterr().out.splitlines()[-2] == "CUDA: not tested, the GPU is out"


def test_selftest_tries_a_gpu_with_each_kernel(monkeypatch, capsys):
    """The checks of the device, on torch tensors of the CPU; a wrong operator fails them."""
    forced = []
    monkeypatch.setattr(selftest, "CHECKS", {"compress": selftest.compress_cases})
    monkeypatch.setattr(selftest, "DEVICE", "cpu:0")
    monkeypatch.setattr(selftest, "why_not_cuda", lambda: None)
    monkeypatch.setattr(selftest, "cuda_kernels", lambda: ["portable", "sm90"])
    monkeypatch.setattr(_core, "force_kernel", forced.append)
    assert cli.main(["selftest", "--seconds", "1"]) == 0
    assert forced == ["portable", "sm90", "auto"]
    text = capsys.readouterr().out
    assert "CUDA: not tested" not in text and f"{7 + len(lf.info()['isas'])} checks" in text
    right = lf.block_sparse_attention

    def wrong(*a, **k):
        out, lse = right(*a, **k)
        return out * 1.1, lse

    monkeypatch.setattr(lf, "block_sparse_attention", wrong)
    assert cli.main(["selftest", "--seconds", "1"]) == 1
    failed = [x.split()[0] for x in capsys.readouterr().out.splitlines() if "FAILED" in x]
    assert failed == ["portable", "portable", "sm90", "sm90"]


def test_selftest_leaves_the_best_instruction_set_on():
    before = lf.info()["isa"]
    selftest.run(seconds=0)
    assert lf.info()["isa"] == before


def test_explain_gives_the_schedule_of_the_preset():
    page = answer("explain", "--preset", "paper")
    assert [r["kept"] for r in page["rows"]] == [75, 25, 32, 38, 43, 48, 53]
    given = [r["sparsity"] for r in page["rows"]]
    np.testing.assert_allclose(given, lf.cag_schedule(sparsity=0.88, base=0.98))
    long = answer("explain", "--preset", "paper-long", "--num-frames", 63)
    assert [r["kept"] for r in long["rows"]][1:5] == [39, 50, 60, 55]


def test_explain_predicts_the_step_from_a_measured_share():
    page = answer("explain", "--sparsity", 0.5, "--attention-share", 0.5)
    gain = page["attention_gain"]
    assert page["step_gain"] == pytest.approx(1 / (0.5 + 0.5 / gain))


def test_explain_draws(tmp_path):
    picture = tmp_path / "schedule.png"
    assert run("explain", "--plot", picture).returncode == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_refuses_a_part_of_a_chunk(tmp_path, capsys):
    assert cli.main(["demo", "--frames", "10", "--out", str(tmp_path)]) == 2
    assert "frames: expected a multiple of 3 of at least 9, got 10" in capsys.readouterr().err


def test_bench_times_dense_and_sparse():
    result = answer("bench", "--seconds", 0.01, "--frame-tokens", 64, "--preset", "fast")
    names = [r["what"] for r in result["rows"]]
    assert names[0] == "lightforcing dense" and "torch" in names[-1]
    assert all(r["samples"] >= 1 and r["median_ms"] > 0 for r in result["rows"])
    assert result["kept"] < result["blocks"]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["explain", "--preset", "best"], "preset: expected one of paper, paper-long, quality"),
        (["explain", "--sparsity", "1.5"], "sparsity: expected a number in [0, 1), got 1.5"),
        (["explain", "--num-frames", "0"], "expected an integer from 1 to 1000000, got 0"),
        (["explain", "--frames", "20"], "unrecognized arguments: --frames 20"),
        (["explain", "--attention-share", "2"], "attention_share: expected a number in [0, 1]"),
        (["explain", "--plot", "s.xyz"], "--plot: expected a file ending in one of"),
        (["demo", "--clip", "-1"], "expected an integer from 0 to 1000000, got -1"),
        (["demo", "--sparsity", "1"], "expected a number above 0 and below 1, got 1"),
        (["demo", "--seed", "-1"], "expected an integer from 0 to 1000000, got -1"),
        (["demo", "--out", __file__], "--out: expected a folder that is there or can be made, got"),
        (["demo", "--out", __file__ + "/x"], "--out: expected a folder that is there or can be"),
        (["selftest", "--seed", "-1"], "expected an integer from 0 to 1000000, got -1"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_wrong_arguments_get_a_sentence_and_exit_code_2(arguments, sentence, tmp_path, capsys):
    if arguments[0] == "demo":
        arguments = ["demo", "--out", str(tmp_path), *arguments[1:]]
    try:
        code = cli.main(arguments)
    except SystemExit as end:  # argparse's way out
        code = end.code
    error = capsys.readouterr().err
    assert code == 2 and sentence in error and "Traceback" not in error


@pytest.mark.parametrize(
    "module, arguments, sentence",
    [
        ("torch", ["demo"], "demo needs torch: pip install 'lightforcing[models]'"),
        ("safetensors", ["demo"], "demo needs safetensors: pip install 'lightforcing[models]'"),
        ("imageio", ["demo"], "demo needs imageio: pip install 'lightforcing[viz]'"),
        ("tqdm", ["demo"], "demo needs tqdm: pip install 'lightforcing[viz]'"),
        ("matplotlib", ["explain", "--plot", "x.png"], "--plot needs matplotlib: pip install"),
    ],
)
def test_a_missing_package_is_named_with_its_command(module, arguments, sentence):
    done = run(*arguments, before=f"import sys; sys.modules[{module!r}] = None")
    assert done.returncode == 2 and sentence in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["info", "doctor", "selftest --seconds 0.01", "explain"])
def test_works_without_torch(command):
    done = run(*command.split(), before="import sys; sys.modules['torch'] = None")
    assert done.returncode == 0, done.stderr
