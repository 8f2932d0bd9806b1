"""What a training step computes and exchanges on 1 to 256 chips: python experiments/benchmarks/scaling.py.

Prints Markdown. Parameters, operations and reductions are counted in the traced program of RoBal's step;
times follow from the data sheets below and from the shares that are assumed. Nothing is measured.
"""

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
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from ml_collections import ConfigDict

from configs import robal_n
from robal_jax import builder, classifiers, cli, models, objectives, training
from robal_jax.builder import call
from robal_jax.data import long_tailed_counts
from robal_jax.devices import parallel
from robal_jax.training import TrainState

CHIPS = (1, 8, 16, 32, 64, 128, 256)
IMAGES_A_CHIP = 64  # weak scaling: the paper's batch on every chip
PEAK_SHARE = 0.4  # of a chip's peak that a step reaches: assumed
LINK_SHARE = 0.5  # of the links' rate that a reduction reaches: assumed


class Links(NamedTuple):
    """What connects chips, or groups of chips: how many at most, bytes a second one way, seconds a hop."""

    most: int
    rate: float
    hop: float


class Chip(NamedTuple):
    """An accelerator: its peak in operations a second, and its links from the nearest to the farthest."""

    name: str
    peak: float
    products: str  # what config.train.precision=default multiplies in
    links: tuple[Links, ...]
    source: str


# Rates one way, of all links of a chip together. No data sheet states the time of a hop: assumed.
HARDWARE = (
    Chip(
        "TPU v5e", 197e12, "bfloat16", (Links(256, 200e9, 1e-6),),
        "Google Cloud, TPU v5e: 197 TFLOP/s, interconnect 400 GB/s both ways, 256 chips in a 2D torus",
    ),
    Chip(
        "TPU v5p", 459e12, "bfloat16", (Links(8960, 600e9, 1e-6),),
        "Google Cloud, TPU v5p: 459 TFLOP/s, interconnect 1200 GB/s both ways, 3D torus",
    ),
    Chip(
        "H100 SXM", 494.7e12, "TF32", (Links(8, 450e9, 3e-6), Links(32, 50e9, 5e-6)),
        "NVIDIA, H100 and DGX H100: 494.7 TFLOP/s dense TF32 (989.4 in bfloat16), NVLink 900 GB/s both ways "
        "among 8, one 400 Gb/s InfiniBand port a GPU",
    ),
)  # fmt: skip


class Network(NamedTuple):
    """A network, and the config of the run that trains it."""

    name: str
    config: ConfigDict
    image: tuple[int, int, int]
    classes: int


def networks() -> tuple[Network, ...]:
    """The three that are looked at, trained by RoBal-N."""
    small = robal_n.get_config("cifar10_lt")
    small.model = ConfigDict({"name": "resnet18"})
    return (
        Network("WRN-34-10", robal_n.get_config("cifar10_lt"), (32, 32, 3), 10),
        Network("ResNet-18", small, (32, 32, 3), 10),
        Network("ResNet-50", robal_n.get_config("imagenet_lt"), (224, 224, 3), 1000),
    )


def model_of(network: Network, axis_name: str | None = None) -> models.Model:
    """The model with the convolutions of an accelerator, whatever this program runs on."""
    config, counts = network.config, (1,) * network.classes
    backbone = call("model", models.BACKBONES, config.model, axis_name=axis_name)
    head = call("head", classifiers.HEADS, config.head, num_classes=network.classes, class_counts=counts)
    return models.functional(models.Network(backbone(), head()))


def variables_of(network: Network) -> tuple[Any, Any]:
    """Shapes of parameters and statistics."""
    image = jax.ShapeDtypeStruct((1, *network.image), jnp.float32)
    return jax.eval_shape(model_of(network).init, jax.random.key(0), image)


def size_of(tree: Any) -> int:
    """Number of values in all arrays of a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def forward_program(network: Network) -> Any:
    """The traced prediction of one image."""
    params, stats = variables_of(network)
    image = jax.ShapeDtypeStruct((1, *network.image), jnp.float32)
    return jax.make_jaxpr(model_of(network).predict)(params, stats, image).jaxpr


BATCH_NORM = "batch_norm"  # a mapped axis of its own, so that its reductions can be told from the others


def step_program(network: Network) -> Any:
    """The traced training step of one of two devices, with one image each."""
    config, devices = network.config, 2
    optimizer, _ = builder.optimizer(config, steps_per_epoch=1)
    step = partial(
        training.train_step,
        model=model_of(network, BATCH_NORM),
        objective=builder.objective(config, np.ones(network.classes, int), parallel.AXIS),
        optimizer=optimizer,
        axis_name=parallel.AXIS,
    )

    def inputs() -> tuple[TrainState, objectives.Batch]:
        params, stats = model_of(network).init(jax.random.key(0), jnp.zeros((1, *network.image)))
        state = TrainState(jnp.int32(0), params, stats, optimizer.init(params))
        images, labels = jnp.zeros((devices, *network.image)), jnp.zeros(devices, jnp.int32)
        return state, objectives.Batch(
            images, labels, jax.random.split(jax.random.key(0), devices), jnp.int32(1)
        )

    whole, part = PartitionSpec(), PartitionSpec(parallel.AXIS)
    on_devices = jax.shard_map(
        step,
        mesh=AbstractMesh((devices, 1), (parallel.AXIS, BATCH_NORM), axis_types=(AxisType.Auto,) * 2),
        in_specs=(whole, objectives.Batch(part, part, part, whole)),
        out_specs=whole,
        check_vma=False,
    )
    return jax.make_jaxpr(on_devices)(*jax.eval_shape(inputs)).jaxpr


def operations(program: Any, trips: int, times: int = 1) -> Iterator[tuple[int, Any]]:
    """All primitive operations of a program, and how often each runs; a while loop makes ``trips`` rounds."""
    for operation in program.eqns:
        yield times, operation
        rounds = {"while": trips, "scan": operation.params.get("length")}.get(operation.primitive.name, 1)
        for parameter in jax.tree.leaves(list(operation.params.values())):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from operations(inner, trips, times * rounds)


def flops(program: Any, trips: int = 1) -> float:
    """Operations of the convolutions and matrix products, two for each multiplication with addition.

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

    return sum(times * of(operation) for times, operation in operations(program, trips))


def reductions(program: Any, axis_name: str) -> tuple[int, ...]:
    """Bytes of every array that is summed over a mapped axis."""
    summed = (x for _, x in operations(program, 1) if x.primitive.name == "psum")
    return tuple(
        array.aval.size * array.aval.dtype.itemsize
        for operation in summed
        if axis_name in operation.params["axes"]
        for array in operation.invars
    )


class Work(NamedTuple):
    """A step: operations an image, bytes of the gradients' reduction, and those of each of batch norm's."""

    flops: float
    gradients: int
    batch_norm: tuple[int, ...]


def work_of(network: Network) -> Work:
    """Counts a step. The gradients and moments are taken for one reduction, as XLA combines them."""
    program = step_program(network)
    return Work(
        flops=flops(program, network.config.attack.steps),
        gradients=sum(reductions(program, parallel.AXIS)),
        batch_norm=reductions(program, BATCH_NORM),
    )


def all_reduce_seconds(links: tuple[Links, ...], chips: int, size: float) -> float:
    """Time in which all chips get the sum of ``size`` bytes of each.

    ``2 (n - 1) / n * size / rate + 2 log2(n) * hop`` for the ``n`` chips of a group; then between the groups,
    where each chip carries ``1 / n`` of the bytes.

    Args:
      links: from the nearest to the farthest.
      chips: how many.
      size: bytes.

    Returns:
      Seconds.
    """
    seconds, left = 0.0, chips
    for link in links:
        n = min(left, link.most)
        seconds += 2 * (n - 1) / n * size / (LINK_SHARE * link.rate) + 2 * math.log2(n) * link.hop
        left, size = left // n, size / n
    return seconds


def step_seconds(chip: Chip, work: Work, chips: int, images: float) -> tuple[float, float]:
    """Time of a step that computes, and that communicates; ``images`` are those of one chip."""
    reduce = partial(all_reduce_seconds, chip.links, chips)
    communication = reduce(work.gradients) + sum(reduce(size) for size in work.batch_norm)
    return images * work.flops / (PEAK_SHARE * chip.peak), communication


def efficiency(computing: float, communicating: float) -> float:
    """Share of the time in which chips compute, if they never do both at once."""
    return computing / (computing + communicating)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


Found = list[tuple[Network, Work]]


def counted(found: Found) -> str:
    """The table of what was counted."""
    header = ["", "parameters", "forward, GFLOP an image", "step, GFLOP an image", "step / forward"]
    header += ["gradients and moments, MB", "batch-norm reductions", "their MB"]
    rows = []
    for network, work in found:
        forward = flops(forward_program(network))
        operations = [f"{forward / 1e9:.2f}", f"{work.flops / 1e9:.1f}", f"{work.flops / forward:.1f}"]
        batch_norm = [str(len(work.batch_norm)), f"{sum(work.batch_norm) / 1e6:.2f}"]
        parameters = f"{size_of(variables_of(network)[0]):,}"
        rows.append([network.name, parameters, *operations, f"{work.gradients / 1e6:.1f}", *batch_norm])
    return table(header, rows)


def assumed() -> str:
    """The table of the hardware."""
    rows = []
    for chip in HARDWARE:
        rates = ", then ".join(f"{link.rate / 1e9:g} GB/s" for link in chip.links)
        hops = ", then ".join(f"{link.hop * 1e6:g} µs" for link in chip.links)
        rows.append([chip.name, f"{chip.peak / 1e12:g} TFLOP/s, {chip.products}", rates, hops, chip.source])
    return table(["", "peak", "links, one way", "a hop", "source"], rows)


def scaled(found: Found, images_of: Callable[[Network, int], float]) -> str:
    """A table of efficiencies for each network, given the images of a chip."""
    parts = []
    for network, work in found:
        rows = []
        for chips in CHIPS:
            images = images_of(network, chips)
            times = [step_seconds(chip, work, chips, images) for chip in HARDWARE]
            cells = [f"{efficiency(*pair):.0%} ({pair[0] * 1e3:.2f} + {pair[1] * 1e3:.2f})" for pair in times]
            rows += [[str(chips), f"{images:g}", *cells]] if images >= 1 else []
        header = ["chips", "images a chip", *(chip.name for chip in HARDWARE)]
        parts.append(f"{network.name}\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def without_sync(found: Found) -> str:
    """The table of efficiencies with and without batch norm's reductions, on the config's batch."""
    rows = []
    for network, work in found:
        for chips in (8, 64):
            seconds = partial(step_seconds, chips=chips, images=network.config.train.batch_size / chips)
            alone = work._replace(batch_norm=())
            pairs = [(efficiency(*seconds(c, work)), efficiency(*seconds(c, alone))) for c in HARDWARE]
            rows.append([network.name, str(chips), *(f"{with_:.0%}, {none:.0%}" for with_, none in pairs)])
    return table(["", "chips", *(chip.name for chip in HARDWARE)], rows)


def batches(config: ConfigDict, counts: np.ndarray) -> str:
    """The table of what a larger batch means for CIFAR-10-LT."""
    rows = []
    for factor in (1, 2, 4, 8, 16, 64, 256):
        batch = factor * config.train.batch_size
        steps = int(counts.sum()) // batch
        updates, rate = f"{steps * config.train.epochs:,}", f"{factor * config.schedule.lr:g}"
        tail = f"{batch * counts[-1] / counts.sum():.1f}"
        rows.append([f"{batch:,}", str(batch // IMAGES_A_CHIP), str(steps), updates, rate, tail])
    header = ["global batch", f"chips of {IMAGES_A_CHIP} images", "updates an epoch"]
    header += [f"updates in {config.train.epochs} epochs", "rate by the linear rule", "tail images a batch"]
    return table(header, rows)


PAGE = """# One to 256 chips: what a step computes and exchanges

Arithmetic, printed by `python experiments/benchmarks/scaling.py`; every machine prints the same. **No time
here is measured.**

## What was counted

The training step of RoBal-N (ResNet-18 in its CIFAR form; ResNet-50 on 224x224) was traced as it runs on
each of several accelerators, and its convolutions, matrix products and sums over devices were added up.

{counted}

- An operation is a multiplication or an addition. Only convolutions and matrix products count; products with
  the zeros of the padding do.
- A forward pass counts once, the gradient by the images once more, the gradient by the parameters once more.
  A step of RoBal has {steps} attack steps of 2 and two training passes (adversarial, natural) of 3: 16, less
  the gradient by the images in the first layer of the training passes.
- At the end of a step the gradients, in float32, and the batch-norm moments are averaged; taken here for one
  reduction, as XLA joins them.
- Synchronised batch norm adds {reductions} small reductions on {first}: in each of its {layers} layers and in
  both training passes a mean and then a variance, and as many on the way back. The attack uses the running
  statistics and communicates nothing.

## What is assumed

{assumed}

- A step reaches {peak_share:.0%} of the peak and a reduction {link_share:.0%} of the links' rate. Both are
  guesses; the first is generous where a chip has few images. The peak is that of the products which
  `config.train.precision=default` makes.
- The time of a hop is a guess as well; no data sheet states it.
- A reduction of s bytes over n chips takes 2 (n - 1) / n · s / rate + 2 log2(n) hops: on H100 first among the
  8 of a machine, then between machines, where each GPU carries an eighth of the bytes.
- Nothing overlaps: efficiency = computing / (computing + communicating), under these assumptions a lower
  bound. XLA can overlap the reduction of the gradients, and join the small ones of the two passes.

## The same batch on more chips

The global batch, and so the result, stays that of the config. Each cell has the efficiency and, in
milliseconds a step, computing + communicating. A batch of {batch} can use {batch} chips.

{strong}

Efficiency with synchronised batch norm, and without. Without it (`config.train.sync_batch_norm=False`) each
chip takes the statistics of its own images: another method, and a poor one where these are few.

{without_sync}

## {images_a_chip} images on every chip

The global batch grows with the chips, from {images_a_chip} to {largest:,}.

{weak}

## Which batch the recipe bears

The paper trains with {batch}. By the assumptions above its {epochs} epochs of {first} on CIFAR-10-LT
({images:,} images) take {hours}.
For a table of many rows and seeds, give each run its own chip: that changes no result, and no chip waits for
another.

A larger batch is another recipe. What it means on CIFAR-10-LT, whose smallest class has {tail} images (where
an epoch has no update left, training is refused):

{batches}

- **Rate.** The linear rule (Goyal et al., 2017): rate × k for a batch × k, reached over 5 epochs of warm-up;
  `--config.schedule.lr=... --config.schedule.warmup=5 --config.schedule.name=paper`. The schedule `released`
  compounds, so that a warm-up never reaches the rate. Their rule held up to a batch of 8192 on 1.28 million
  images, {their_share:.1%} of an epoch; {batch} images are {our_share:.1%} of CIFAR-10-LT, so 128 is already
  a larger share than they tried.
- **Weight decay** stays: rate × weight decay × updates an epoch is the same under the linear rule.
- **Milestones** are epochs and stay.
- **The tail.** A batch of {batch} holds less than one image of the smallest class on average. A larger batch
  averages more of them at once, but shows none more often, and makes fewer updates. Compare the tail's robust
  accuracy, not only the mean.
- **Batch norm.** With {images_a_chip} images a chip, `config.train.sync_batch_norm=False` keeps the paper's
  number of images a statistic, as Goyal et al. kept theirs.
- **Updates.** Where an epoch has few, more epochs are needed and the gain is lost. We would take no batch
  beyond 256 on CIFAR-10-LT, and none but {batch} without several seeds of both beside each other.

Not measured: robust accuracy at any batch but the paper's, the share of the peak on any accelerator,
communication between accelerators, and how far long-tailed adversarial training follows the linear rule.
"""


def page(found: Found) -> str:
    """The page with its numbers."""
    (first, work), *_ = found
    config = first.config
    counts = long_tailed_counts(5000, 10, config.data.ratio)
    images, batch, epochs = int(counts.sum()), config.train.batch_size, config.train.epochs
    updates = epochs * (images // batch)
    hours = [updates * sum(step_seconds(chip, work, 1, batch)) / 3600 for chip in HARDWARE]
    return PAGE.format(
        first=first.name,
        steps=config.attack.steps,
        reductions=len(work.batch_norm),
        layers=len(work.batch_norm) // 8,  # of a layer: mean, variance; two passes; forward, backward
        counted=counted(found),
        assumed=assumed(),
        peak_share=PEAK_SHARE,
        link_share=LINK_SHARE,
        strong=scaled(found, lambda network, chips: network.config.train.batch_size / chips),
        without_sync=without_sync(found),
        images_a_chip=IMAGES_A_CHIP,
        largest=IMAGES_A_CHIP * CHIPS[-1],
        weak=scaled(found, lambda network, chips: IMAGES_A_CHIP),
        batch=batch,
        epochs=epochs,
        images=images,
        tail=counts[-1],
        hours=", ".join(f"{h:.1f} h on one {chip.name}" for h, chip in zip(hours, HARDWARE, strict=True)),
        batches=batches(config, counts),
        their_share=8192 / 1281167,
        our_share=batch / images,
    )


def main(arguments: list[str]) -> None:
    """Prints the page."""
    cli.parse(arguments, {}, __doc__)
    print(page([(network, work_of(network)) for network in networks()]), end="")


if __name__ == "__main__":
    cli.run(main)
