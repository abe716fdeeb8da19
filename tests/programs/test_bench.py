"""The benchmark as its user meets it: a process, its output, its JSON and its charts.

Figures are not judged here. What must not be lost is that every one was measured: a provider that
raises, answers wrongly or hands the call to stock has to show a dash and a reason.
"""

import io
import json
import os
import shutil
import signal
import subprocess

import pytest
import torch
from rich.console import Console
from support.processes import ROOT, finish, is_png, run

import fused_ce
from bench import program
from bench.against.measure import compare, take_turns
from bench.common import devices, memory, process, style
from bench.common.devices import DEVICES
from bench.common.figures import BOTH, COPY, FORWARD, Figures
from bench.common.measure import Effort
from bench.heads import measure as heads
from bench.heads.cases import QUICK, QUICK_VOCABULARIES
from bench.heads.providers import PROVIDERS as HEAD_PROVIDERS
from bench.loss import cases, charts, measure, providers
from bench.loss.record import LossFigures, Record
from bench.loss.tensors import LossTensors
from bench.losses import measure as losses
from bench.losses import report
from bench.losses.cases import LOSSES
from bench.ownership import measure as steps
from bench.ownership.cases import STEPS, Size
from bench.ownership.run import table_of, verdict
from bench.scaling import measure as scaling
from bench.training import measure as training
from bench.training import report as training_report
from bench.training.cases import CASES as TRAINED
from bench.training.cases import QUICK as QUICKLY_TRAINED
from bench.training.cases import Images, Text
from bench.training.search import largest_that_fits
from fused_ce import ops

UNCOMPILED = ("stock", "fused", "recompute", "inplace", "copy")

# Every way to have no figure, beside a provider that has one. A file, because the processes that
# measure read the program's file again, and so have the same faults.
FAULTY = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import fused_ce
from bench.loss import providers, run

right = fused_ce.cross_entropy

def wrong_in_place(*arguments, inplace=False, **options):
    return right(*arguments, **options) * (1.001 if inplace else 1)

def raises():
    raise NotImplementedError("no such thing")

fused_ce.cross_entropy = wrong_in_place
fused_ce.explain = lambda *arguments, **options: (
    "stock: for a change" if options.get("grad_in_forward") is False else "fused: as it should be"
)
providers.PROVIDERS["compile"] = providers.Provider(raises)
run.COMPILER = ()
if __name__ == "__main__":
    from bench import program

    sys.exit(program.main(sys.argv[1:]))
"""


@pytest.fixture
def bench(tmp_path, capsys, monkeypatch):
    """Runs the program in this process, and gives what it prints. The process that is forked for
    each measurement serves all tests, so it is not told what to import for one of them."""
    monkeypatch.setattr(process, "preload", lambda *modules: None)

    def run_here(*options):
        assert program.main(["--quick", "--out", str(tmp_path), *options]) == 0
        return capsys.readouterr().out

    return run_here


def test_two_cases_leave_figures_charts_and_json(tmp_path):
    printed = run(
        *("-m", "bench", "--quick", "--cases", "8x10", "65536x10", "--out", str(tmp_path)),
        *("--providers", *UNCOMPILED),
    )
    assert "8x10" in printed and "recompute" in printed and "\x1b" not in printed
    assert is_png(tmp_path / "speed.png")
    # Logits this small are below what the account of memory resolves.
    assert not (tmp_path / "memory.png").exists()

    data = json.loads((tmp_path / "bench.json").read_text())
    machine = data["machine"]
    assert {"model", "torch", "threads", "huge_pages", "commit"} < machine.keys()
    assert machine["fused_ce"]["instruction_set"]
    assert [case["name"] for case in data["cases"]] == ["65536x10", "8x10"]
    for case in data["cases"]:
        measured = {(result["provider"], result["pass"]) for result in case["results"]}
        assert measured == {
            *((name, FORWARD) for name in ("stock", "fused")),
            *((name, BOTH) for name in ("stock", "fused", "recompute", "inplace")),
            ("copy", COPY),
        }
        for result in case["results"]:
            assert len(result["samples_ms"]) == 2
            assert 0 < result["min_ms"] <= result["median_ms"]
            assert result["gb_per_s"] == pytest.approx(
                result["traffic_bytes"] / result["median_ms"] / 1e6
            )
            assert result["peak_extra_bytes"] is None or result["peak_extra_bytes"] >= 0
            ours = result["provider"] in ("fused", "recompute", "inplace")
            assert result["path"].startswith("fused: ") == ours


def test_what_cannot_be_measured_has_a_reason_and_no_figure(tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY)
    options = ("--quick", "--cases", "8x10", "--out", str(tmp_path))
    printed = run(str(tmp_path / "faulty.py"), *options)
    (case,) = json.loads((tmp_path / "bench.json").read_text())["cases"]
    found = {(result["provider"], result["pass"]): result for result in case["results"]}
    reasons = {
        ("compile", FORWARD): "no such thing",
        ("compile", BOTH): "no such thing",
        ("recompute", BOTH): "stock: for a change",
        ("inplace", BOTH): "the loss is",
    }
    for key, reason in reasons.items():
        assert reason in found[key]["reason"] and reason in printed
        assert found[key]["samples_ms"] == []
        for figure in ("median_ms", "min_ms", "gb_per_s", "ratio_to_stock", "peak_extra_bytes"):
            assert found[key][figure] is None
    for name, which in found.keys() - reasons.keys():
        assert found[name, which]["median_ms"] > 0


def test_a_fresh_process_is_another_each_time_and_says_how_it_failed():
    processes = {process.call(os.getpid) for _ in range(2)} | {os.getpid()}
    assert len(processes) == 3
    torch.set_num_threads(1)
    assert process.call(torch.get_num_threads) == 1
    for function, argument, reason in (
        (int, "seven", "ValueError: invalid literal"),
        (os._exit, 3, "exit code 3"),
        (signal.raise_signal, signal.SIGKILL, "SIGKILL"),
    ):
        with pytest.raises(process.Failed, match=reason):
            process.call(function, argument)


def test_a_case_that_cannot_be_made_has_a_reason_and_no_figure():
    effort, heard = Effort(0, least=1, most=1), []
    for classes, reason in ((0, "RuntimeError"), (10, "")):
        case = cases.Case((8, classes))
        record = measure.measure(case, ["stock"], DEVICES["cpu"], effort, heard.append)
        assert [result.which for result in record.results] == [FORWARD, BOTH]
        for result in record.results:
            assert result.reason.startswith(reason) and bool(result.samples) == (not reason)
    assert len(heard) == measure.notices(case, ["stock"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cases", "8x10", "7x7"], "no case matches '7x7'"),
        (["--providers", "apex"], "invalid choice: 'apex'"),
        (["--threads", "0"], "at least 1"),
        (["--against", "no/such/folder"], "expects a built fused_ce in"),
        (["--against", ".", "--linear"], "name them in --cases"),
        (["--losses", "--cases", "8x10"], "leave the others' options out"),
        (["--training", "--dtype", "bf16"], "--training is float32 on the CPU"),
    ],
)
def test_what_is_not_there_is_named(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.parse(options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_sentence(capsys):
    with pytest.raises(SystemExit):
        program.parse(["--device", "cuda"])
    assert "there is no GPU here that torch" in capsys.readouterr().err.splitlines()[-1]


def test_a_sample_on_cuda_outgrows_the_cache():
    megabyte = 2**20
    assert devices.ring(320, 50 * megabyte) == devices.BURST
    for size, calls in ((megabyte, devices.BURST), (20 * megabyte, 10), (1000 * megabyte, 1)):
        assert devices.ring(size, 50 * megabyte) == calls


def test_peers_are_measured_where_they_are_installed(monkeypatch):
    monkeypatch.setattr(providers, "find_spec", lambda package: package == "quack" or None)
    assert "quack" in providers.usual("cuda") and "liger" not in providers.usual("cuda")
    assert providers.usual("cpu") == [*UNCOMPILED[:1], "compile", *UNCOMPILED[1:]]
    assert set(style.MARKS) == set(style.LABELS) == set(providers.PROVIDERS)


def test_memory_that_a_device_counts_needs_no_process_of_its_own():
    class Counting(type(DEVICES["cpu"])):
        counts_memory = True

        def rise(self, call):
            loss, gradient = call()
            return gradient.nbytes

    effort = Effort(0, least=1, most=1)
    case = cases.Case((8, 10))
    record = measure.measure_here(case, ["inplace"], Counting(), effort, lambda text: None)
    assert [result.peak for result in record.results] == [8 * 10 * 4]


def test_a_run_out_of_time_names_what_it_left(bench):
    printed = bench("--cases", "8x10", "65536x10", "--budget", "0", "--providers", "stock")
    assert "no time left for 65536x10 8x10" in printed


def test_the_driver_is_read_or_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert devices.driver_version() is None
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 580.159.03\necho 580.159.03\n")
    program.chmod(0o755)
    assert devices.driver_version() == "580.159.03"


def test_report_without_a_gpu_is_one_sentence(tmp_path):
    # What Python is asked is answered here, where torch has been loaded.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nprintf %s "$2" > {tmp_path}/asked\nexit 1\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python)}
    command = [ROOT / "bench" / "gpu_report.sh", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    asked = (tmp_path / "asked").read_text()
    finished = finish("-c", asked, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert (finished.returncode, finished.stderr) == (1, "")
    assert done.returncode == 2
    assert "no torch that can use a GPU here" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("broken", ["", "pytest"])
def test_report_goes_on_after_a_failure_and_tells_it(tmp_path, broken):
    # A Python that agrees to everything, but for the module that is broken.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase " $* " in *" -m {broken} "*) exit 1 ;; esac\necho "$*"\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python)}
    command = [ROOT / "bench" / "gpu_report.sh", tmp_path / "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == (1 if broken else 0), done.stdout
    assert ("failed: test_cuda test_parity" in done.stdout) == bool(broken)
    logs = {path.stem for path in (tmp_path / "out").glob("*.log")}
    assert logs == {"machine", "test_cuda", "test_parity", "linear", "losses", "bench"}
    assert "-m bench --device cuda" in (tmp_path / "out" / "bench.log").read_text()


@pytest.mark.parametrize("table", cases.TABLES.values(), ids=cases.TABLES.keys())
def test_names_are_unique(table):
    names = [case.name for case in table]
    assert len(set(names)) == len(names)


def test_names_select():
    assert [case.name for case in cases.select(["8192x1000", "*-fp16"], None)] == [
        "8192x1000",
        "1024x32000-fp16",
    ]
    # The bfloat16 case of this shape and the float32 one made bfloat16 are one case.
    assert [case.name for case in cases.select(["512x50257*"], "bf16")] == ["512x50257-bf16"]


def test_ratios_are_of_medians_and_missing_ones_stay_missing():
    case = cases.Case((8, 10))
    results = [
        LossFigures("stock", BOTH, traffic=1000, samples=[4.0, 6.0, 90.0]),
        LossFigures("fused", BOTH, traffic=1000, samples=[2.0, 1.0, 3.0]),
        LossFigures("inplace", BOTH, traffic=1000, reason="broken"),
        LossFigures("copy", COPY, traffic=1000, samples=[1.0]),
    ]
    record = Record(case, 1, results)
    assert record.ratio("fused", BOTH) == 3 and record.ratio("copy", BOTH) == 6
    assert record.share_of_copy(results[1]) == 0.5
    for missing in (record.ratio("inplace", BOTH), record.ratio("fused", FORWARD)):
        assert missing is None
    assert record.share_of_copy(results[2]) is None


def test_charts_skip_what_was_not_measured(tmp_path):
    case = cases.Case((4096, 1000))
    results = [
        LossFigures("stock", BOTH, samples=[3.0], peak=3 * case.logits_bytes),
        LossFigures("fused", BOTH, samples=[1.0], peak=None),
        LossFigures("inplace", BOTH, reason="broken"),
    ]
    for records in ([Record(case, 1, results)], [Record(case, 1, results[2:])]):
        for draw in (charts.draw_speed, charts.draw_memory):
            draw(records, "a machine", tmp_path / "chart.png")
            assert is_png(tmp_path / "chart.png")
            (tmp_path / "chart.png").unlink()


def test_heads_leave_figures_and_a_chart(tmp_path, bench):
    printed = bench("--linear")
    assert "torch chunks" in printed and "TFLOP/s" in printed
    assert is_png(tmp_path / "linear_memory.png")
    data = json.loads((tmp_path / "linear.json").read_text())
    timed = [found for found in data["cases"] if found["peak_extra_bytes"] is None]
    assert {found["provider"] for found in timed} == {"gemms", "stock", "torch chunks", "fused"}
    for found in timed:
        if found["reason"]:  # torch before 2.13
            assert found["provider"] == "torch chunks" and found["median_ms"] is None
            continue
        assert len(found["samples_ms"]) == 2 and found["median_ms"] > 0
        assert found["tflops"] == pytest.approx(6 * 64 * 16 * 500 / found["median_ms"] / 1e9)
        assert (found["ratio_to_gemms"] == 1) == (found["provider"] == "gemms")
    peaks = {
        (found["provider"], found["head"]["classes"]): found["peak_extra_bytes"]
        for found in data["cases"]
        if found not in timed
    }
    for classes in QUICK_VOCABULARIES:
        assert peaks["stock", classes] > peaks["fused", classes] > 0


def test_heads_that_are_stopped_keep_their_times(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(heads, "measure_peaks", stop)
    with pytest.raises(KeyboardInterrupt):
        program.main(["--linear", "--quick", "--out", str(tmp_path)])
    data = json.loads((tmp_path / "linear.json").read_text())
    assert [found["provider"] for found in data["cases"]] == list(HEAD_PROVIDERS)


def test_head_whose_loss_is_wrong_has_no_figure(monkeypatch):
    monkeypatch.setitem(
        HEAD_PROVIDERS,
        "fused",
        lambda tensors: lambda _: [1.01 * t for t in tensors.reference()],
    )
    effort = Effort(0, least=1, most=1)
    figures = heads.time_here(QUICK[0], DEVICES["cpu"], effort, lambda text: None)
    found = {figure.provider: figure for figure in figures}
    assert "loss is" in found["fused"].reason and found["fused"].samples == []
    assert found["stock"].samples


def test_a_clock_can_read_what_a_head_is_given():
    class Reading(type(DEVICES["cpu"])):  # as events on CUDA do
        def milliseconds(self, call, inputs):
            assert inputs[0].nbytes > 0
            return super().milliseconds(call, inputs)

    figures = heads.time_here(QUICK[0], Reading(), Effort(0, least=1, most=1), lambda text: None)
    assert "fused" in {found.provider for found in figures if found.samples}


def test_a_graph_is_captured_in_the_grad_mode_of_its_pass(monkeypatch):
    captured = []

    def replayed(call, tensors):
        captured.append(torch.is_grad_enabled())
        return call

    monkeypatch.setattr(providers, "replayed", replayed)
    effort, case = Effort(0, least=1, most=1), cases.Case((8, 10), graph=True)
    record = measure.measure_here(case, ["fused"], DEVICES["cpu"], effort, lambda text: None)
    assert captured == [result.which == BOTH for result in record.results] == [False, True]


def other_build(folder, line=""):
    """A copy of the package, with a line more; its folder."""
    shutil.copytree(ROOT / "fused_ce", folder / "fused_ce")
    with open(folder / "fused_ce" / "__init__.py", "a") as file:
        file.write(f"\n{line}\n")
    return folder


def test_two_builds_leave_ratios(tmp_path, bench):
    printed = bench("--against", str(other_build(tmp_path / "other")), "--cases", "8x10")
    assert "new / old" in printed and "middle half" in printed
    data = json.loads((tmp_path / "against.json").read_text())
    measured = {(found["provider"], found["pass"]) for found in data["cases"]}
    names = ("fused", "recompute", "inplace")
    assert measured == {("fused", FORWARD), *((name, BOTH) for name in names)}
    for found in data["cases"]:
        assert found["name"] == "8x10" and found["reasons"] == []
        samples = zip(found["old_samples_ms"], found["new_samples_ms"], strict=True)
        low, high = sorted(new / old for old, new in samples)
        # Two rounds: the median is the mean of both, and samples are rounded to nanoseconds.
        assert found["ratio_new_to_old"] == pytest.approx((low + high) / 2, rel=1e-3)
        assert low * 0.999 < found["middle_half"][0] <= found["middle_half"][1] < high * 1.001


@pytest.mark.parametrize("case", [cases.Case((8, 10)), QUICK[0]], ids=["loss", "head"])
def test_each_process_has_the_build_of_its_folder(tmp_path, case):
    wrong = "cross_entropy = linear_cross_entropy = lambda *tensors, **options: 1 / 0"
    folders = other_build(tmp_path, wrong), ROOT
    effort, device = Effort(0, least=2, most=2), DEVICES["cpu"]
    pairs = compare(case, ["fused"], folders, device, effort, lambda text: None)
    assert pairs
    for pair in pairs:
        assert pair.old.reason == "ZeroDivisionError: division by zero" and not pair.new.reason
        assert pair.ratio is None and pair.as_data()["middle_half"] is None


def test_a_build_that_cannot_be_loaded_has_a_reason(tmp_path):
    folders = ROOT, other_build(tmp_path, "raise ImportError('not for this machine')")
    effort, device = Effort(0, least=2, most=2), DEVICES["cpu"]
    (pair,) = compare(cases.Case((8, 10)), ["fused"], folders, device, effort, lambda text: None)
    assert pair.reasons == ["ImportError: not for this machine"] and pair.ratio is None


def test_builds_take_turns_in_going_first():
    asked = []

    class Process:
        def __init__(self, name):
            self.name = name

        def ask(self, method, *arguments):
            if method == "prepare":
                return [Figures("fused", which) for which in (FORWARD, BOTH)]
            asked.append((*arguments, self.name))
            return 1.0

    effort = Effort(0, least=4, most=4)
    take_turns(cases.Case((8, 10)), [Process("old"), Process("new")], effort, lambda text: None)
    for number in range(2):
        names = [name for subject, name in asked if subject == number]
        assert (
            names == ["old", "new", "new", "old"] * 2 or names == ["new", "old", "old", "new"] * 2
        )
    neighbours = [{asked[place], asked[place + 1]} for place in range(0, len(asked), 2)]
    assert all(len({subject for subject, _ in both}) == 1 for both in neighbours)


def test_scaling_leaves_a_chart(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "QUICK_DOUBLINGS", 1)
    assert program.main(["--scaling", "--quick", "--out", str(tmp_path)]) == 0
    assert is_png(tmp_path / "scaling.png")
    measured = json.loads((tmp_path / "scaling.json").read_text())["cases"]
    sizes = {case["logits_bytes"] for case in measured}
    assert sizes == {1024000, 2048000}
    assert {case["threads"] for case in measured} == {1, torch.get_num_threads()}


def test_traffic_counts_each_tensor_once():
    logits, target = 8 * 10 * 4, 8 * 8
    problem = LossTensors(cases.Case((8, 10)), "cpu")
    assert problem.traffic(FORWARD) == logits + target
    assert problem.traffic(BOTH) == 2 * logits + target
    assert problem.traffic(COPY) == 2 * logits
    weighted = LossTensors(cases.Case((8, 10), weighted=True), "cpu")
    assert weighted.traffic(FORWARD) == logits + target + 10 * 4
    probabilities = LossTensors(cases.Case((8, 10), probabilities=True), "cpu")
    assert probabilities.traffic(BOTH) == 3 * logits


@pytest.mark.rare  # a push measures the loss and the heads
@pytest.mark.slow
def test_the_row_statistics_are_measured_beside_the_composition(tmp_path, bench):
    printed = bench("--statistics")
    assert "log-probability and entropy" in printed
    data = json.loads((tmp_path / "statistics.json").read_text())
    assert data["providers"] == ["stock", "compile", "loss", "fused"]
    assert [case["case"]["name"] for case in data["cases"][::4]] == [
        "64x500-fp32",
        "64x500-head-16-bf16",
    ]
    for case in data["cases"]:
        assert not case["reason"], case
        assert case["median_ms"] > 0 and case["times_as_fast_as_stock"] > 0


@pytest.mark.slow  # twelve processes that start torch
def test_sharded_classes_are_measured_on_ranks(tmp_path, bench):
    printed = bench("--parallel")
    assert "sharded classes" in printed
    data = json.loads((tmp_path / "parallel.json").read_text())
    found = {case["provider"]: case for case in data["cases"]}
    assert list(found) == data["providers"]
    for case in data["cases"]:
        assert not case["reason"], case
        assert case["median_ms"] > 0 and case["times_as_fast_as_loss_parallel"] > 0
    collectives = {name: case["collectives"] for name, case in found.items()}
    ours = dict.fromkeys(("fused", "fresh", "inplace"), 1)
    assert collectives == {"loss_parallel": 3, "three": 3, "unsharded": 0, **ours}


def test_steps_are_measured_with_and_without_their_logits(monkeypatch):
    monkeypatch.delitem(steps.PROVIDERS, "compile")  # which takes a while
    taken, real = [], ops.backward_
    monkeypatch.setattr(ops, "backward_", lambda *call: taken.append(call) or real(*call))
    effort = Effort(0, least=2, most=2)
    figures = steps.time_here(Size(64, 500), effort, lambda text: None)
    assert len(taken) == 6  # two kinds of free steps, thrice
    assert {found.which for found in figures} == set(STEPS)
    for found in figures:
        assert not found.reason and len(found.samples) == 2
    shown = io.StringIO()
    table = table_of("steps", figures, lambda one: f"{one.median}", "auto/fused")
    Console(file=shown, width=200).print(table)
    assert shown.getvalue().count("64x500") == len(STEPS)
    assert verdict(figures) == "auto has no figures"  # before the rounds have been compared
    for found, ratio in zip(figures, range(1, 100), strict=False):
        found.ratios = [float(ratio)]
    assert verdict(figures).startswith("auto's time over the default's is at best 3.00 (64x500, ")


@pytest.mark.rare  # a push measures the loss and the heads
@pytest.mark.slow
def test_steps_leave_tables_and_json(tmp_path, bench):
    printed = bench("--ownership")
    assert "peak memory" in printed and "auto's time over the default's is at best" in printed
    data = json.loads((tmp_path / "ownership.json").read_text())
    assert data["providers"] == ["stock", "compile", "fused", "auto", "inplace"]
    assert len(data["cases"]) == len(STEPS) * len(data["providers"])
    for case in data["cases"]:
        assert not case["reason"] and case["median_ms"] > 0 and case["time_over_default"] > 0


# One of the losses, and a function that there is not; without torch.compile, which takes a while.
TWO_LOSSES = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from bench import program
from bench.losses import cases, providers

del providers.PROVIDERS["compile"]
lines = {{"log_softmax": cases.LOSSES["log_softmax"]}}
lines["none"] = cases.Loss("no_such_loss", cases.F.mse_loss, cases.labels)
cases.LOSSES.clear()
cases.LOSSES.update(lines)
if __name__ == "__main__":
    sys.exit(program.main(sys.argv[1:]))
"""


def test_the_other_losses_are_measured_beside_stock_and_a_copy(tmp_path):
    (tmp_path / "two_losses.py").write_text(TWO_LOSSES)
    printed = run(str(tmp_path / "two_losses.py"), "--losses", "--quick", "--out", str(tmp_path))
    assert "losses, forward+backward" in printed and is_png(tmp_path / "losses.png")
    data = json.loads((tmp_path / "losses.json").read_text())
    assert data["providers"] == ["stock", "fused", "copy"]
    names = ["log_softmax"] * 3 + ["none"] * 3
    assert [result["case"]["loss"] for result in data["cases"]] == names
    for result in data["cases"]:
        if (result["provider"], result["case"]["loss"]) == ("fused", "none"):
            assert "no_such_loss" in result["reason"] and "no_such_loss" in printed
            assert result["median_ms"] is None and result["samples_ms"] == []
            continue
        assert not result["reason"] and result["median_ms"] > 0, result
        assert result["path"].startswith("stock: ") == (result["provider"] == "fused")


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_that_is_measured_is_stocks(name):
    for dtype in ("fp32", "bf16"):
        case = losses.Case(name, 8, 10, dtype)
        for subject in losses.make_subjects(case, ["stock", "fused", "copy"], DEVICES["cpu"]):
            subject.prepare()


def test_a_wrong_loss_gets_no_figure(monkeypatch):
    right = fused_ce.log_softmax
    monkeypatch.setattr(fused_ce, "log_softmax", lambda x, **options: right(x, **options) * 1.001)
    monkeypatch.setattr(fused_ce, "explain_call", lambda *arguments, **options: "fused: so it says")
    case = losses.Case("log_softmax", 8, 10)
    (subject,) = losses.make_subjects(case, ["fused"], DEVICES["cpu"])
    subject.attempt(subject.prepare)
    assert subject.figures.reason.startswith("ArithmeticError: the loss is")


def test_the_picture_of_the_losses_holds_all_that_was_measured():
    case = losses.Case("log_softmax", 512, 32000)
    figures = [
        losses.LossesFigures(
            name, case=case, samples=[time], peak=None if peak is None else peak * case.input_bytes
        )
        for name, time, peak in (("stock", 8.0, 9), ("fused", 1.0, 2), ("copy", 0.5, None))
    ]
    speed, memory = report.picture(figures, "a machine").axes
    drawn = [
        {tuple(map(float, c.get_offsets()[0])) for c in panel.collections}
        for panel in (speed, memory)
    ]
    assert drawn == [{(8.0, 0.0), (16.0, 0.0)}, {(9.0, 0.0), (2.0, 0.0)}]
    assert memory.get_xlim()[0] == 0 and memory.get_xlim()[1] > 9 and speed.get_xlim()[1] > 16


ROOM_FOR = {"stock": 3, "patch": 5, "head": 9}
REFUSED = "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory"
SMALL_TRAINED = (
    Text(50, batch=2, length=8, width=16, layers=1),
    Images(5, batch=2, size=16, width=4),
)


@pytest.fixture
def trained_here(monkeypatch):
    """Every process but this one is left out, and with it the limit: each provider has a largest
    batch that is written down above."""

    def step_within(limit, case, name, count):
        if count > ROOM_FOR[name]:
            raise process.Failed(REFUSED)

    def call(function, *arguments, notice=None):
        return function(*arguments, *([notice] if notice else []))

    monkeypatch.setattr(memory, "keep_nothing_freed", lambda: None)
    monkeypatch.setattr(training, "step_within", step_within)
    monkeypatch.setattr(process, "call", call)


def test_training_leaves_figures_and_a_picture(tmp_path, bench, trained_here):
    printed = bench("--training")
    assert "language model, 2x64 tokens, 2000 classes" in printed
    assert is_png(tmp_path / "training.png")
    data = json.loads((tmp_path / "training.json").read_text())
    found = {result["provider"]: result for result in data["cases"]}
    assert list(found) == list(ROOM_FOR)
    for name, result in found.items():
        assert not result["reason"] and len(result["samples_ms"]) == 2, result
        assert 0 < result["min_ms"] <= result["median_ms"]
        assert result["path"].startswith("fused: ") == (name != "stock")
        assert result["peak_extra_bytes"] >= 0
        tried, largest = result["tried_batches"], result["largest_batch"]
        assert largest == ROOM_FOR[name] and f"{largest} sequences" in printed
        assert tried[str(largest)] and not tried[str(largest + 1)]


def test_a_batch_that_the_system_has_no_memory_for_does_not_fit():
    (case,) = QUICKLY_TRAINED
    found = training.TrainingFigures("stock", case=case, limit=1_000_000_000)
    # Its logits alone are twice the limit; the batch of 1 that goes before them fits.
    assert not training.fits(found, lambda text: None, 4000)
    assert found.tried == {4000: False}


def test_what_fails_for_another_reason_than_memory_is_no_largest_batch(trained_here, monkeypatch):
    def broken(limit, case, name, count):
        raise process.Failed("its process ended: SIGSEGV")

    monkeypatch.setattr(training, "step_within", broken)
    found = training.TrainingFigures("stock", case=QUICKLY_TRAINED[0])
    training.measure_memory(found, lambda text: None)
    assert found.reason == "largest batch: its process ended: SIGSEGV"
    assert found.largest is None and found.tried == {}


@pytest.mark.parametrize("guess", [-3, 0, 1, 7, 8, 30])
@pytest.mark.parametrize("largest", [0, 1, 7, 8, 9, 23])
def test_the_largest_that_fits_is_found_from_any_guess(largest, guess):
    tried = []

    def fits(count):
        assert count > 0 and count not in tried
        tried.append(count)
        return count <= largest

    assert largest_that_fits(fits, guess) == largest
    assert largest + 1 in tried and (largest == 0 or largest in tried)
    if guess == largest > 0:
        assert tried == [largest + 1, largest]  # one step that is taken, and it takes long


@pytest.mark.parametrize("case", SMALL_TRAINED, ids=lambda case: type(case).__name__)
def test_every_way_to_train_is_judged_and_is_stocks(case):
    subjects = training.make_subjects(case, case.providers, DEVICES["cpu"])
    for subject in subjects:
        subject.prepare()
        assert subject.figures.path.startswith("fused: ") == (subject.figures.provider != "stock")
    assert {type(trained) for trained in TRAINED} == {type(case) for case in SMALL_TRAINED}


def test_a_step_is_weighed_beyond_parameters_and_optimizers_state():
    class Weighing(type(DEVICES["cpu"])):
        def rise(self, call):
            assert all(parameter.grad is None for parameter in parameters())
            assert len(subject.tensors.optimizer.state) == len(parameters())
            call()
            return sum(parameter.grad.nbytes for parameter in parameters())

    def parameters():
        return list(subject.tensors.model.parameters())

    (subject,) = training.make_subjects(SMALL_TRAINED[0], ["head"], Weighing())
    subject.warm_up()
    subject.weigh()
    assert subject.figures.peak == sum(parameter.nbytes for parameter in parameters())


def test_the_guess_is_the_batch_that_a_straight_line_gives():
    # 100 of memory for each of a batch, beside 1000 for any: 4600 - 600 - 1000 hold 30.
    footprint = training.Footprint(rest=600, half=1200, whole=1400)
    assert footprint.guess(batch=4, limit=4600) == 30
    assert footprint.guess(batch=4, limit=4599) == 29


def gradient_changed(loss):
    """Of the same value, with another gradient."""
    return loss + 0.01 * (loss - loss.detach())


@pytest.mark.parametrize(
    ("fault", "path", "reason"),
    [
        (lambda loss: loss * 1.001, "fused: so it says", "ArithmeticError: the loss is"),
        (gradient_changed, "fused: so it says", "ArithmeticError: the gradient of tokens.weight"),
        (lambda loss: loss, "stock: for a change", "NotFused: stock: for a change"),
    ],
    ids=["loss", "gradient", "stock"],
)
def test_training_on_a_wrong_loss_has_no_figure(monkeypatch, fault, path, reason):
    right = fused_ce.linear_cross_entropy
    wrong = lambda *arguments, **options: fault(right(*arguments, **options))  # noqa: E731
    monkeypatch.setattr(fused_ce, "linear_cross_entropy", wrong)
    monkeypatch.setattr(fused_ce, "explain_call", lambda *arguments, **options: path)
    effort = Effort(0, least=1, most=1)
    case = SMALL_TRAINED[0]
    monkeypatch.setattr(Text, "providers", ("stock", "head"))
    stock, head = training.time_here(case, DEVICES["cpu"], effort, lambda text: None)
    assert head.reason.startswith(reason) and head.samples == []
    assert stock.samples and not stock.reason


def test_the_picture_of_training_holds_all_that_was_measured():
    case = TRAINED[1]
    stock, head, missing = (
        training.TrainingFigures(name, case=case, limit=case.limit)
        for name in ("stock", "head", "patch")
    )
    stock.samples, stock.peak, stock.largest = [8000.0], 2_000_000_000, 6
    head.samples, head.peak, head.largest = [4000.0], 500_000_000, 60
    panels = training_report.picture([stock, head, missing], "a machine").axes
    drawn = [[bar.get_width() for bars in axes.containers for bar in bars] for axes in panels]
    written = [[text.get_text() for text in axes.texts] for axes in panels]
    assert written == [["8.00 s", "4.00 s"], ["2.00 GB", "0.50 GB"], ["6", "60"]]
    assert drawn == [[1.0, 0.5], [1.0, 0.25], [1.0, 10.0]]
    assert panels[2].get_title() == "largest batch in 4 GB"
