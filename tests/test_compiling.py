"""Costs read from a compiled program's text, and the command that compiles for devices that are not there."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT

from robal_jax import cli
from robal_jax.compiling import estimates, programs
from robal_jax.compiling.cost import Cost, Operation, cost_of
from robal_jax.compiling.hlo import Program
from robal_jax.compiling.text import described
from robal_jax.devices import chips, targets
from robal_jax.errors import InputError

# ruff: noqa: E501
# In the form of the TPU's compiler: the bound of the inner loop comes from outside of the outer one, whose
# own bound is an argument. %inner multiplies in fast memory, S(1).
TEXT = """HloModule jit_f, is_scheduled=true

FileNames
1 "/home/user/robal_jax/training/step.py"
2 "/home/user/jax/lax.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=9 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}


%less (p: (s32[], bf16[8,8], s32[])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, bf16[8,8]{1,0:T(8,128)S(1)}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n.1 = s32[] get-tuple-element(%p.1), index=2
  ROOT %lt.1 = pred[] compare(%i.1, %n.1), direction=LT
}

%fused (a: bf16[8,8], b: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  %b = bf16[8,8]{1,0} parameter(1)
  ROOT %dot.1 = bf16[8,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%inner (p: (s32[], bf16[8,8], s32[])) -> (s32[], bf16[8,8], s32[]) {
  %p.2 = (s32[], bf16[8,8]{1,0:T(8,128)S(1)}, s32[]) parameter(0)
  %x.2 = bf16[8,8]{1,0:T(8,128)S(1)} get-tuple-element(%p.2), index=1
  %f.2 = bf16[8,8]{1,0:T(8,128)S(1)} fusion(%x.2, %x.2), kind=kOutput, calls=%fused, metadata={op_name="jit(f)/while/body/jvp(Net)/conv1/dot_general" stack_frame_id=2}, backend_config={"estimated_cycles":"100"}
  ROOT %t.2 = (s32[], bf16[8,8]{1,0}, s32[]) tuple(%p.2, %f.2, %p.2)
}

%any (p: (s32[], s32[], s32[], bf16[8,8])) -> pred[] {
  %p.3 = (s32[], s32[], s32[], bf16[8,8]) parameter(0)
  %i.3 = s32[] get-tuple-element(%p.3), index=0
  %n.3 = s32[] get-tuple-element(%p.3), index=1
  ROOT %lt.3 = pred[] compare(%i.3, %n.3), direction=LT
}

%outer (p: (s32[], s32[], s32[], bf16[8,8])) -> (s32[], s32[], s32[], bf16[8,8]) {
  %p.4 = (s32[], s32[], s32[], bf16[8,8]) parameter(0)
  %n.4 = s32[] get-tuple-element(%p.4), index=2
  %x.4 = bf16[8,8]{1,0} get-tuple-element(%p.4), index=3
  %zero = s32[] constant(0)
  %t.4 = (s32[], bf16[8,8], s32[]) tuple(%zero, %x.4, %n.4)
  %while.1 = (s32[], bf16[8,8], s32[]) while(%t.4), condition=%less, body=%inner
  %all-reduce.1 = bf16[8,8]{1,0} all-reduce(%x.4), channel_id=1, to_apply=%fused, backend_config={"estimated_cycles":"7"}
  ROOT %r.4 = (s32[], s32[], s32[], bf16[8,8]) tuple(%p.4, %p.4, %p.4, %all-reduce.1)
}

ENTRY %main (n: s32[], x: bf16[8,8]) -> (s32[], s32[], s32[], bf16[8,8]) {
  %n.5 = s32[] parameter(0)
  %x.5 = bf16[8,8]{1,0} parameter(1)
  %first = s32[] constant(0)
  %five = s32[] constant(5)
  %copy.5 = s32[] copy(%five)
  %y.5 = bf16[8,8]{1,0} copy(%x.5), backend_config={"estimated_cycles":"30"}
  %t.5 = (s32[], s32[], s32[], bf16[8,8]) tuple(%first, %n.5, %copy.5, %y.5)
  ROOT %while.2 = (s32[], s32[], s32[], bf16[8,8]) while(%t.5), condition=%any, body=%outer
}
"""


def test_loops_of_a_program():
    program = Program(TEXT)
    assert program.trips("while.1", "outer") == 5
    assert program.trips("while.2", "main") is None
    assert program.endless() == "outer"


def test_cost_of_a_step_and_of_a_dispatch():
    program = Program(TEXT)
    step = cost_of(program, "outer")
    assert step.total("flops") == 5 * 2 * 8**3
    assert step.unknown_loops == 0
    assert cost_of(program, "main").unknown_loops == 1
    assert step.total("cycles") == 5 * 100 + 7
    assert step.total("bytes") == 2 * 128  # the transfer's; the loop's operands are in fast memory
    assert step.transfers == {"all-reduce": (1, 128)}
    product = next(each for each in step.operations if each.kind == "convolution")
    assert (product.name, product.place, product.times) == ("conv1/dot_general", "training/step.py:7", 5)
    assert cost_of(program, "main", loops=False).total("cycles") == 30


@pytest.mark.usefixtures("optimised")
def test_products_of_a_real_program():
    """A convolution with stride 2 and both its gradients, in a loop, as formulas count them."""

    def loss(kernel, images):
        out = jax.lax.conv_general_dilated(
            images, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(out**2)

    def f(kernel, images):
        def step(_, carry):
            gradients = jax.grad(loss, (0, 1))(*carry)
            return jax.tree.map(lambda x, g: x - 1e-3 * g, carry, gradients)

        return jax.lax.fori_loop(0, 7, step, (kernel, images))

    shapes = (3, 3, 4, 6), (2, 8, 8, 4)
    compiled = jax.jit(f).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()
    program = Program(compiled.as_text())
    assert cost_of(program, program.entry).total("flops") == 7 * 3 * 2 * (2 * 4 * 4 * 6) * (3 * 3 * 4)


def test_chips_are_known_or_refused():
    for name, chip in chips.CHIPS.items():
        assert 0.9e9 < chip.clock < 2e9, name
    with pytest.raises(InputError, match=r"unknown chip 'v5x' .* use v5"):
        chips.chip_of("v5x:2x4")
    with pytest.raises(InputError, match="number of GPUs"):
        targets.devices_of("h100:many")


def test_time_is_that_of_the_slower_of_products_and_memory():
    chip = chips.CHIPS["h100"]
    work = Operation("convolution", "", "", "", 1, 0, int(chip.peak), int(chip.bandwidth / 2), in_loop=False)
    assert estimates.seconds_of(work, chip) == pytest.approx(1.0)
    assert estimates.seconds_of(work._replace(bytes=int(3 * chip.bandwidth)), chip) == pytest.approx(3.0)
    cycles = work._replace(cycles=3000)
    assert estimates.seconds_of(cycles, chips.CHIPS["v5e"]) == pytest.approx(3000 / chips.CHIPS["v5e"].clock)


def test_largest_batch_follows_from_two_sizes():
    gib, chip = 2**30, chips.CHIPS["v5e"]  # 16 GiB
    memory = estimates.Memory(arguments=2 * gib, in_place=gib, outputs=gib, temporaries=2 * gib)
    doubled = memory._replace(temporaries=3 * gib)
    found = estimates.Estimate("train", 64, 1.0, memory, None, larger=(128, doubled))
    assert estimates.largest_batch(found, chip) == 64 + 64 * (16 - 4)
    capped = found._replace(larger=(80, doubled))  # a test set of 80 images
    assert estimates.largest_batch(capped, chip) == 64 + 16 * (16 - 4)
    assert estimates.largest_batch(found._replace(larger=None), chip) is None


COPY = Operation("copy", "", "", "", 1, 0, 1, 1, in_loop=False)


def test_a_program_must_fit_into_the_share_of_a_gpu_that_jax_takes():
    chip, cost = chips.CHIPS["h100"], Cost({}, [COPY], 0)
    memory = estimates.Memory(arguments=0, in_place=0, outputs=0, temporaries=int(0.8 * chip.memory))
    values = estimates.as_values(estimates.Estimate("train", 64, 1.0, memory, cost), chip)
    assert values["fits"] is False
    said = "107% of 63.7 GB (JAX's default share, 75% of 84.9 GB; XLA_PYTHON_CLIENT_MEM_FRACTION changes it)"
    assert described(values, chip).endswith(said)
    quarter, half = (memory._replace(temporaries=chip.memory // parts) for parts in (4, 2))
    found = estimates.Estimate("train", 64, 1.0, quarter, cost, larger=(128, half))
    assert estimates.largest_batch(found, chip) == 3 * 64
    assert chips.CHIPS["v5e"].available == chips.CHIPS["v5e"].memory


@pytest.mark.parametrize(("size", "known"), [(64, True), (256, False)])
def test_twice_the_images_may_be_more_than_an_epoch_has(monkeypatch, size, known):
    def estimate(name, images, lowered):
        cost = Cost({}, [COPY], 0)
        return estimates.Estimate(name, images, 1.0, estimates.Memory(0, 0, 0, images), cost)

    seen = []
    monkeypatch.setattr(programs, "training_chunk", lambda job, devices: seen.append(job.settings))
    monkeypatch.setattr(estimates, "_estimate", estimate)
    config, twice = (
        cli.apply_overrides(cli.load_config("at:digits_lt"), [f"--config.train.batch_size={count}"])
        for count in (size, 2 * size)
    )
    (found,) = estimates.estimates(config, jax.devices()[:1], ["train"], doubled=twice)
    assert found.memory.total == size
    assert found.larger == ((2 * size, estimates.Memory(0, 0, 0, 2 * size)) if known else None)
    assert [each.batch_size for each in seen] == [size, 2 * size][: 1 + known]
    assert len({each.steps_per_dispatch for each in seen}) == 1
    text = described(estimates.as_values(found, None), None)
    said = "largest     not known: with twice the images, config.train.batch_size is 512, but an epoch has"
    assert (said in text) != known


def test_twice_the_images_of_an_evaluation_are_what_it_would_take(monkeypatch):
    """A CPU takes at most 512 digits at once."""

    def estimate(name, images, lowered):
        return estimates.Estimate(name, images, 1.0, estimates.Memory(0, 0, 0, images), Cost({}, [COPY], 0))

    monkeypatch.setattr(estimates, "_estimate", estimate)
    monkeypatch.setattr(programs, "evaluation_step", lambda job, name, devices: None)
    config, twice = (
        cli.apply_overrides(cli.load_config("at:digits_lt"), [f"--config.evaluation.batch_size={count}"])
        for count in (500, 1000)
    )
    (found,) = estimates.estimates(config, jax.devices()[:1], ["conditions"], doubled=twice)
    assert (found.images, found.larger[0]) == (500, 512)


def test_settings_for_a_target():
    environment = {"XLA_FLAGS": "--a=b", "JAX_PLATFORMS": "cuda"}
    chips.prepare("h100:8", environment)
    assert environment == {
        "XLA_FLAGS": "--a=b --xla_gpu_autotune_level=0",
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the compiler is installed")
def test_missing_compiler_is_named():
    with pytest.raises(InputError, match=r"pip install 'robal_jax\[tpu-compile\]'"):
        targets.devices_of("v5e:2x4")


def compiled(tmp_path, *flags):
    """Runs robal-jax compile for RoBal-N on the digits; returns what it writes and prints."""
    path = tmp_path / "figures.json"
    command = [sys.executable, ROOT / "experiments/compile.py", "--config=robal_n:digits_lt"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [*command, f"--json={path}", *flags], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


@pytest.mark.long
@pytest.mark.slow
def test_command_on_the_devices_present(tmp_path):
    found, text = compiled(tmp_path, "--programs=train")
    (program,) = found["programs"]
    assert program["program"] == "train"
    assert program["memory_bytes"]["temporaries"] > 0
    assert "nothing is measured" in text
    steps = 7  # of the attack, the only loop whose length is known
    assert program["operations"]["in_loops"]["convolution"]["times"] % steps == 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs robal_jax[tpu-compile]")
def test_command_for_a_tpu(tmp_path):
    found, _ = compiled(tmp_path, "--topology=v5e:2x4", "--config.train.batch_size=64", "--programs=train")
    (program,) = found["programs"]
    assert program["fits"]
    assert program["transfers"]["all-reduce"]["count"] > 0
    assert program["estimated_cycles"]["all"] > program["estimated_cycles"]["in_loops"] > 0
