"""What the benchmarks under experiments/benchmarks/ compute beside times."""

import ast
import json
import os
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import kernels, measure, memory, mutations, overhead, roofline, startup, step

FIRST, SECOND, THIRD = 8 * 8 * 9 * 1 * 16, 4 * 4 * 9 * 16 * 32, 2 * 2 * 9 * 32 * 64  # of the small CNN
DENSE, HEAD = 2 * 2 * 64 * 64, 64 * 10


def test_ways_are_called_in_turn_and_once_more_than_timed():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in ("ours", "theirs", "third")}
    times = measure.interleaved(ways, 4)
    assert calls == ["ours", "theirs", "third"] * 5
    assert list(times) == ["ours", "theirs", "third"]


def test_the_first_call_is_not_timed_and_the_median_is_the_middle(monkeypatch):
    clock = iter([0.0, 3.0, 10.0, 11.0, 20.0, 22.0])  # three timed calls: 3, 1 and 2 seconds
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    times = measure.interleaved({"ours": lambda: None}, 3)
    assert times == {"ours": measure.Times(2.0, 1.0, 3.0)}
    assert next(clock, None) is None


def test_times_are_shown_in_milliseconds():
    times = measure.Times(median=0.8123, low=0.8034, high=0.8401)
    assert f"{times:.0f}" == "812 (803-840)"
    assert f"{times}" == "812 (803-840)"
    assert f"{times:.1f} ms" == "812.3 (803.4-840.1) ms"


def test_a_record_says_what_was_measured_on_what(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["step.py", "--batch=16,64", "--json=record.json"])
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=true")
    measure.record(str(tmp_path / "new" / "record.json"), [{"way": "ours", "median": 0.5}])
    found = json.loads((tmp_path / "new" / "record.json").read_text())
    assert found["rows"] == [{"way": "ours", "median": 0.5}]
    assert found["command"] == "python step.py --batch=16,64"
    assert found["versions"]["jax"] == jax.__version__
    assert found["XLA_FLAGS"] == "--xla_cpu_multi_thread_eigen=true"
    assert found["device"] == measure.device()
    assert found["date"][:2] == "20" and "T" in found["date"]


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measure.record("", [{}])
    assert not list(tmp_path.iterdir())


def test_the_share_in_which_the_device_waits():
    # 20 ms of work a step, and 5 ms of the host's for each dispatch.
    shares = {k: overhead.waiting_share(0.020 + 0.005 / k, 0.020) for k in (1, 5, 20)}
    assert shares[1] == pytest.approx(0.2)
    assert shares[5] == pytest.approx(1 / 21)
    assert shares[20] == pytest.approx(0.25 / 20.25)
    assert overhead.waiting_share(0.020, 0.020) == 0.0


@pytest.mark.slow
def test_operations_by_hand():
    forward = 2 * (FIRST + SECOND + THIRD + DENSE + HEAD)
    for method, passes, training_passes in (("robal_n", 16, 2), ("at", 13, 1)):
        of = roofline.traced("digits_cnn", method)
        assert roofline.forward_flops(of) == forward
        counted = roofline.step_flops(of)
        assert counted == pytest.approx(passes * forward - training_passes * 2 * FIRST, rel=1e-4)


def test_forward_operations_of_a_wide_resnet():
    """From the definition of WRN-34-10 alone."""
    products, before = 32 * 32 * 9 * 3 * 16, 16
    for size, width in ((32, 160), (16, 320), (8, 640)):
        products += size**2 * (9 * before * width + before * width)  # first convolution and shortcut
        products += size**2 * 9 * width**2 * 9
        before = width
    products += before * 10
    assert roofline.forward_flops(roofline.traced("wrn_34_10", "robal_n")) == 2 * products


@pytest.mark.slow
def test_xla_analyses_what_the_formula_counts():
    # XLA leaves out the products with zeros of the padding: of the 3 n of a row 2, or 1 where it is halved.
    found = roofline.operations("digits_cnn", "robal_n", 8, "default")
    inside = FIRST * (22 / 24) ** 2 + SECOND * (11 / 12) ** 2 + THIRD * (5 / 6) ** 2 + DENSE + HEAD
    products = 16 * 2 * inside - 2 * 2 * FIRST * (22 / 24) ** 2
    # All that is no product (normalisation, ReLU, softmax, signs, clipping) comes on top.
    assert products < found.analysed < 1.1 * products
    assert found.forward == 2 * (FIRST + SECOND + THIRD + DENSE + HEAD)


def test_why_loops_are_not_analysed():
    def looped(x, rounds):
        return jax.lax.fori_loop(0, rounds, lambda _, x: x @ x, x)

    square = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    two, twenty = (roofline.analysed(lambda x, n=n: looped(x, n), (square,)) for n in (2, 20))
    assert twenty == pytest.approx(two, rel=0.01)
    assert roofline.analysed(lambda x: x @ x, (square,)) == pytest.approx(2 * 64**3, rel=0.01)


def test_shares_of_the_peak():
    def of(seconds):
        return measure.Times(seconds, seconds, seconds)

    times = {"small": of(1e-3), "large": of(4e-3), "ours": of(0.5), "PyTorch": of(1.0)}
    sizes = {"small": 100, "large": 200}  # 2e9 and 4e9 operations a second
    row = roofline.row_of(times, sizes, roofline.Operations(1e6, 1e7, 0.0), 64)
    assert row["peak"] == pytest.approx(4e9)
    assert row["ours"] == pytest.approx(64 * 1e7 / 0.5 / 4e9)
    assert row["ratio"] == pytest.approx(2.0)
    assert "ours 32.0%, PyTorch 16.0%, ratio 2.00" in roofline.text_of({"network": "net", **row}, times)


def test_unknown_memory_is_a_dash():
    mine = {"arguments": 5_000_000, "results": 4_000_000, "in_place": 3_000_000, "temporaries": 2_000_000}
    assert memory.line(mine, {}).split() == ["5.0", "4.0", "3.0", "2.0", "-", "-", "-"]
    peaks = memory.line({**mine, "peak": 60_000_000}, {"peak": 30_000_000})
    assert peaks.split() == ["5.0", "4.0", "3.0", "2.0", "60.0", "30.0", "2.00"]


def test_compilations_and_those_from_the_cache_are_counted():
    counts, new = startup.counted_compilations(), time.time() % 1  # in no program that was compiled before
    jax.jit(lambda x: x * new + 1.5)(1.0)
    assert counts == {"asked": 1, "from_cache": 0}
    jax.jit(lambda x: x * new + 1.5)(1.0)
    assert counts == {"asked": 2, "from_cache": 1}


@pytest.mark.slow
def test_a_whole_chunk_lowers_from_shapes_alone():
    """What memory.py compiles: the state goes in and comes out in place."""
    job = step.job_of("digits_cnn", "at", 4, 1)
    shapes = memory.shapes_of(job)
    lowered = startup.whole_chunk(job).lower(*shapes)
    state, sums = lowered.out_info
    assert jax.tree.map(lambda x: x.shape, state) == jax.tree.map(lambda x: x.shape, shapes[0])
    assert set(sums) >= {"loss", "grad_norm"}
    donated = [info.donated for info in jax.tree.leaves(lowered.args_info[0][0])]
    assert all(donated) and not any(x.donated for x in jax.tree.leaves(lowered.args_info[0][1]))


@pytest.mark.slow
def test_fresh_processes_return_json():
    assert startup.in_fresh_process("step", "shape", "digits_cnn") == [8, 1]


@pytest.mark.slow
def test_a_way_in_its_own_process():
    pid = measure.in_own_process(process_number)
    assert pid() == pid() != os.getpid()
    with pytest.raises(RuntimeError, match=r"process_number\(1,\) failed"):
        measure.in_own_process(process_number, 1)


def process_number(*wrong):
    if wrong:
        raise SystemExit(3)
    return os.getpid


def event(pid, tid, name, dur):
    return {"ph": "X", "pid": pid, "tid": tid, "name": name, "dur": dur, "ts": 0}


def row(kind, pid, name, tid=None):
    return {"ph": "M", "pid": pid, "name": kind, "args": {"name": name}} | (
        {} if tid is None else {"tid": tid}
    )


def test_kernels_are_those_of_the_device_s_streams():
    device = [
        row("process_name", 1, "/device:GPU:0"),
        row("thread_name", 1, "Stream #13(Compute)", 13),
        row("thread_name", 1, "XLA Ops", 14),
        {"ph": "M", "pid": 1, "name": "process_sort_index", "args": {"sort_index": 1}},
        event(1, 13, "loop_add_fusion_1", 1000.0),
        event(1, 13, "loop_add_fusion_22", 500.0),
        event(1, 13, "sm90_gemm", 4000.0),
        event(1, 14, "loop_add_fusion_1", 9000.0),
    ]
    host = [
        row("process_name", 7, "/host:CPU"),
        row("thread_name", 7, "tf_XLAEigen/1", 1),
        event(7, 1, "dot.3", 2000.0),
        event(7, 1, "end: dot.3", 2.0),
        event(7, 1, "ThreadpoolListener::Record", 3.0),
    ]
    found = kernels.kernels({"traceEvents": device + host})
    assert found == [("sm90_gemm", 4.0, 1), ("loop_add_fusion", 1.5, 2)]
    assert kernels.kernels({"traceEvents": host}) == [("dot", 2.0, 1)]


SOURCE = '''"""A docstring: 1 + 1."""
def f(x: dict[int, 3], n=2.5) -> list[7]:
    if not (x  # 0 < ε
            < -n) and n != 0 or f"{n + 1}":
        return "ε" + x[n] * max(x[:n], True)
    return x.argmin(0)
'''.encode()


def test_mutations_of_a_source():
    found = mutations.mutations("f.py", SOURCE)
    assert [(m.line, m.before, m.after) for m in found] == [
        (2, "2.5", "5.0"),
        (3, "not", ""),
        (4, "<", "<="),
        (4, "-", ""),
        (4, "and", "or"),
        (4, "!=", "=="),
        (4, "0", "1"),
        (4, "or", "and"),
        (5, "+", "-"),
        (5, "", " + 1"),
        (5, "*", "/"),
        (5, "max", "min"),
        (5, "", " + 1"),
        (5, "True", "False"),
        (6, "argmin", "argmax"),
        (6, "0", "1"),
    ]
    trees = {ast.dump(ast.parse(mutation.apply(SOURCE))) for mutation in found}
    assert len(trees - {ast.dump(ast.parse(SOURCE))}) == len(found)


@pytest.mark.slow
def test_every_mutation_of_the_library_is_another_program():
    drawn = mutations.draw(seed=1, count=80)
    assert len(set(drawn)) == 80
    assert {part for part, _ in drawn[: len(mutations.PARTS)]} == set(mutations.PARTS)
    for _, mutation in drawn:
        source = (mutations.ROOT / mutation.file).read_bytes()
        assert ast.dump(ast.parse(mutation.apply(source))) != ast.dump(ast.parse(source))
        assert mutations.tests_of(mutation.file)[0] == mutation.file


@pytest.mark.slow
def test_mutations_of_a_lower_count_come_first():
    assert mutations.draw(seed=0, count=24)[:9] == mutations.draw(seed=0, count=9)
    assert mutations.draw(seed=0, count=8) != mutations.draw(seed=1, count=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "outcome"),
    [("pass", "survived"), ("assert 0", "killed"), ("syntax error", "killed"), ("while 1: pass", "timeout")],
)
def test_outcome_of_a_mutation(tmp_path, body, outcome):
    (tmp_path / "test_it.py").write_text(f"def test_it():\n    {body}\n")
    found = mutations.run_tests(["test_it.py"], tmp_path, timeout=3 if outcome == "timeout" else 60)
    assert found["outcome"] == outcome


@pytest.mark.slow
def test_mutations_resume_after_a_line_that_was_cut_off(tmp_path, monkeypatch):
    runs = []

    def run_tests(files, folder, timeout):
        runs.append(timeout)
        return {"outcome": "survived" if timeout is None else "killed", "seconds": 2.0, "by": []}

    monkeypatch.setattr(mutations, "run_tests", run_tests)
    out, said = tmp_path / "out.jsonl", []
    drawn = mutations.draw(seed=0, count=10)
    mutations.run(drawn[:3], out, said.append)
    out.write_text(out.read_text()[:-5])
    mutations.run(drawn, out, said.append)
    assert [(part, mutation) for part, mutation, _ in mutations.read(out)] == drawn
    assert len(said) == 3 + 8
    assert runs[:4] == [None, 66, None, 66]  # without a mutation; three times as long and a minute more
    assert "| all | 10 | 10 | 0 | 0 |" in mutations.table(mutations.read(out))


def test_survivors_are_listed():
    (part, first), (other, second) = mutations.draw(seed=0, count=2)
    shown = mutations.table([(part, first, "survived"), (other, second, "timeout")])
    assert f"| {part} | 1 | 0 | 0 | 1 |" in shown
    assert "| all | 2 | 0 | 1 | 1 |" in shown
    assert shown.endswith(f"Survivors:\n- {mutations.shown(first)}")
