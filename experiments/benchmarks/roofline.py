"""Share of the device's matrix peak: python experiments/benchmarks/roofline.py [--networks=resnet18].

Operations of a step by formula, two for each multiplication with addition of a convolution or matrix product
(2 k k C_in C_out H_out W_out per image, including products with the zeros of the padding):

    RoBal-N  5 attack steps of 2 F, two training passes of 3 F:  16 F - 2 F1
    AT       5 attack steps of 2 F, one training pass of 3 F:    13 F - F1

F is a forward pass; a gradient by images or by parameters costs as much. F1 is the first convolution; no
training pass needs its gradient by the images. They are counted in the traced program. XLA's own count, of
the compiled program, leaves out the padding and includes all other operations. It counts the body of a loop
once, so the attack's step and the training passes are compiled separately, for as many images as a CPU takes
without a loop.

The peak is the best median of square matrix products of several sizes, in the arithmetic of --precision.
Step, peak and PyTorch's step (channels_last) are timed in turn; PyTorch needs as many operations. Needs
PyTorch.
"""

import importlib
import math
import pathlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from experiments.benchmarks import measure, step
from robal_jax import builder, classifiers, cli, losses, models, objectives, training
from robal_jax.devices import parallel
from robal_jax.devices.cpu import cpu_piece

CLASSES = 10


class Operations(NamedTuple):
    """Operations per image: forward pass and step by formula, step by XLA's analysis."""

    forward: float
    step: float
    analysed: float


class Traced(NamedTuple):
    """A network as an accelerator computes it, and the config of its training."""

    config: ConfigDict
    model: models.Model
    image: tuple[int, int, int]


def traced(network: str, method: str) -> Traced:
    """Returns one of ``step.NETWORKS``, with the convolutions of an accelerator, and a method's config."""
    config = importlib.import_module(f"configs.{method}").get_config("cifar10_lt")
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model = ConfigDict(step.NETWORKS[network])
    backbone = builder.call("model", models.BACKBONES, config.model)
    about = {"num_classes": CLASSES, "class_counts": (1,) * CLASSES}
    head = builder.call("head", classifiers.HEADS, config.head, **about)
    pixels, channels = step.shape(network)
    model = models.functional(models.Network(backbone(), head()))
    return Traced(config, model, (pixels, pixels, channels))


def primitives(program: Any, trips: int, times: int = 1) -> Iterator[tuple[int, Any]]:
    """Yields all operations of a traced program with the number of times that each runs.

    Args:
      program: of :func:`jax.make_jaxpr`.
      trips: rounds of every while loop.
      times: that the program itself runs.
    """
    for operation in program.eqns:
        yield times, operation
        rounds = {"while": trips, "scan": operation.params.get("length")}.get(operation.primitive.name, 1)
        for parameter in jax.tree.leaves(list(operation.params.values())):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from primitives(inner, trips, times * rounds)


def flops(program: Any, trips: int = 1) -> float:
    """Counts the operations of convolutions and matrix products, two for each multiplication with addition.

    Products with the zeros of the padding count, those with the zeros of a strided convolution's gradient do
    not.
    """

    def of(operation: Any) -> float:
        name, parameters = operation.primitive.name, operation.params
        if name not in ("conv_general_dilated", "dot_general"):
            return 0
        (left, right), out = (x.aval for x in operation.invars), operation.outvars[0].aval
        if name == "dot_general":
            return 2 * out.size * math.prod(left.shape[i] for i in parameters["dimension_numbers"][0][0])
        features = right.shape[parameters["dimension_numbers"].rhs_spec[0]]
        return 2 * out.size * right.size / features / math.prod(parameters["lhs_dilation"])

    return sum(times * of(operation) for times, operation in primitives(program, trips))


def forward_flops(of: Traced) -> float:
    """Counts the prediction of one image."""
    image = jax.ShapeDtypeStruct((1, *of.image), jnp.float32)
    variables = jax.eval_shape(of.model.init, jax.random.key(0), image)
    return flops(jax.make_jaxpr(of.model.predict)(*variables, image).jaxpr)


def step_flops(of: Traced) -> float:
    """Counts a training step for one image."""
    optimizer, _ = builder.optimizer(of.config, steps_per_epoch=1)
    objective = builder.objective(of.config, np.ones(CLASSES, int))
    step_fn = partial(training.train_step, model=of.model, objective=objective, optimizer=optimizer)

    def inputs() -> tuple[training.TrainState, objectives.Batch]:
        image, label = jnp.zeros((1, *of.image)), jnp.zeros(1, jnp.int32)
        params, stats = of.model.init(jax.random.key(0), image)
        state = training.TrainState(jnp.int32(0), params, stats, optimizer.init(params))
        return state, objectives.Batch(image, label, jax.random.split(jax.random.key(0), 1), jnp.int32(1))

    return flops(jax.make_jaxpr(step_fn)(*jax.eval_shape(inputs)).jaxpr, of.config.attack.steps)


def passes(job: Any, batch: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Returns the loop-free parts of a job's step, each with the shapes of its arguments."""
    model, shape = job.model, job.data.test_images.shape[1:]
    images, labels = (
        jax.ShapeDtypeStruct((batch, *shape), jnp.float32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )
    params, stats = jax.eval_shape(model.init, jax.random.key(0), images)

    def attack(params: Any, stats: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.grad(lambda x: losses.cross_entropy(model.predict(params, stats, x), y).sum())(x)

    def outer(params: Any, stats: Any, x: jax.Array, adversarial: jax.Array, y: jax.Array) -> Any:
        batch = objectives.Batch(x, y, jax.random.key(0), jnp.int32(1))  # no attack, so the key is not used
        known = objectives.Known(adversarial=adversarial)
        return jax.grad(lambda params: job.objective(model, params, stats, batch, known)[0])(params)

    mesh, whole = Mesh(jax.devices()[:1], (parallel.AXIS,)), PartitionSpec()
    alone = partial(jax.shard_map, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    return {
        "attack": (alone(attack), (params, stats, images, labels)),
        "outer": (alone(outer), (params, stats, images, images, labels)),
    }


def analysed(function: Callable[..., Any], shapes: tuple[Any, ...]) -> float:
    """Returns XLA's count of the operations of a compiled function."""
    found = jax.jit(function).lower(*shapes).compile().cost_analysis() or {}
    return found["flops"]


def operations(network: str, method: str, batch: int, precision: str) -> Operations:
    """Counts the operations of a step in both ways."""
    of = traced(network, method)
    pixels, _ = step.shape(network)
    few = min(batch, cpu_piece() // pixels**2)
    parts = passes(step.job_of(network, method, few, 1, precision), few)
    found = {name: analysed(*part) / few for name, part in parts.items()}
    return Operations(
        forward=forward_flops(of),
        step=step_flops(of),
        analysed=of.config.attack.steps * found["attack"] + found["outer"],
    )


def product(size: int, precision: str) -> Callable[[], Any]:
    """Returns a product of two square matrices in the arithmetic of ``config.train.precision``."""
    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    exact = precision if precision in ("high", "highest") else None
    left, right = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    multiply = jax.jit(partial(jnp.matmul, precision=exact))

    def run() -> None:
        multiply(left, right).block_until_ready()

    return run


def peak_of(times: dict[str, measure.Times], sizes: dict[str, int]) -> float:
    """Returns the operations per second of the best product: ``max 2 n^3 / median``."""
    return max(2 * n**3 / times[name].median for name, n in sizes.items())


def row_of(
    times: dict[str, measure.Times], sizes: dict[str, int], found: Operations, images: int
) -> dict[str, Any]:
    """Returns the shares of the peak that our step and PyTorch's reach, and the underlying figures."""
    peak = peak_of(times, sizes)
    shares = {name: images * found.step / times[name].median / peak for name in ("ours", "PyTorch")}
    seconds = {f"{name} seconds": times[name]._asdict() for name in shares}
    ratio = shares["ours"] / shares["PyTorch"]
    return {**found._asdict(), "peak": peak, "images": images, **seconds, **shares, "ratio": ratio}


def text_of(row: dict[str, Any], times: dict[str, measure.Times]) -> str:
    """Formats a row as three lines."""
    forward, all_, by_xla = (row[name] / 1e9 for name in Operations._fields)
    return (
        f"{row['network']}: {forward:.4g} GFLOP per image forward, {all_:.4g} per step"
        f" ({all_ / forward:.2f} F), "
        f"{by_xla:.4g} by XLA's analysis ({by_xla / all_:.2f} of it)\n"
        f"    peak {row['peak'] / 1e12:.4g} TFLOP/s; ours {times['ours']:.4g} ms, "
        f"PyTorch {times['PyTorch']:.4g} ms for {row['images']} images\n"
        f"    share of the peak: ours {row['ours']:.1%}, PyTorch {row['PyTorch']:.1%}, "
        f"ratio {row['ratio']:.2f}"
    )


def main(arguments: list[str]) -> None:
    """Times everything and prints a table."""
    texts = {
        "networks": "some of step.NETWORKS, resnet18",
        "method": "robal_n or at; robal_n",
        "batch": "images, 64",
        "steps": "of a timed call; 4 on a CPU, else 20",
        "repeats": "timed calls of each, 5",
        "precision": "as config.train.precision; default",
        "sizes": "of the matrices; 2048 on a CPU, else 8192,16384",
        "json": "file for the record",
    }
    values = cli.parse(arguments, texts, __doc__)
    from experiments.benchmarks import torch_step

    method, precision = values["method"] or "robal_n", values["precision"] or "default"
    least, matrices = (4, "2048") if jax.default_backend() == "cpu" else (20, "8192,16384")
    batch, repeats = int(values["batch"] or 64), int(values["repeats"] or 5)
    steps = int(values["steps"] or least)
    sizes = {f"matmul {size}": int(size) for size in (values["sizes"] or matrices).split(",")}
    variant = torch_step.Variant("channels_last", channels_last=True, bfloat16=precision == "bfloat16")
    print(measure.heading())
    print(f"{method}, batch {batch}, {precision}; medians of {repeats}, in turn\n")
    rows = []
    for network in (values["networks"] or "resnet18").split(","):
        found = operations(network, method, batch, precision)
        ways = {name: measure.in_own_process(product, size, precision) for name, size in sizes.items()}
        given = (network, method, batch, steps)
        ways["ours"] = measure.in_own_process(step.ours, *given, precision)
        ways["PyTorch"] = measure.in_own_process(step.theirs, *given, variant)
        times = measure.interleaved(ways, repeats)
        row = row_of(times, sizes, found, batch * steps)
        row = {"network": network, "method": method, "precision": precision, **row}
        print(text_of(row, times), flush=True)
        rows.append(row)
    measure.record(values["json"], rows)


if __name__ == "__main__":
    cli.run(main)
