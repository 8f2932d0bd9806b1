"""Memory of a training step: python experiments/benchmarks/memory.py [--networks=resnet18] [--batch=64,512].

Prints what XLA allocates for a compiled chunk of one step: arguments (state, images), results (in place of
the old state), and temporaries, which include the activations. If the device reports its memory (a GPU or TPU
does), it also prints the peak after one real chunk, on a GPU beside PyTorch's (channels_last). Every line is
measured in its own process, because a peak belongs to a process.
"""

import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.benchmarks import startup
from robal_jax import cli


def shapes_of(job: Any) -> tuple[Any, Any, Any]:
    """Returns the shapes of a chunk's arguments: state, images with labels, key."""
    import jax

    from robal_jax import training
    from robal_jax.training import initial_state

    arrays = (job.data.train_images, job.data.train_labels)
    state, key = jax.eval_shape(lambda: (initial_state(job), jax.random.key(0)))
    return state, training.Examples(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)), key


def ours(network: str, method: str, batch: int, precision: str) -> dict[str, int]:
    """Returns the bytes of a compiled chunk of one step, and the device's peak after it if reported."""
    import jax

    from experiments.benchmarks import step

    job = step.job_of(network, method, batch, 1, precision)
    compiled = startup.whole_chunk(job).lower(*shapes_of(job)).compile()
    found = compiled.memory_analysis()
    kinds = {"arguments": "argument", "results": "output", "in_place": "alias", "temporaries": "temp"}
    sizes = {name: getattr(found, f"{kind}_size_in_bytes") for name, kind in kinds.items()}
    if jax.local_devices()[0].memory_stats():
        jax.device_get(compiled(*startup.inputs(job))[1])
        sizes["peak"] = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    return sizes


def theirs(network: str, method: str, batch: int, bfloat16: bool) -> dict[str, int]:
    """Returns the peak of PyTorch's step; nothing without a GPU."""
    import torch

    from experiments.benchmarks import step, torch_step

    if not torch.cuda.is_available():
        return {}
    variant = torch_step.Variant("channels_last", channels_last=True, bfloat16=bfloat16)
    step.theirs(network, method, batch, 1, variant)()
    return {"peak": torch.cuda.max_memory_allocated()}


def line(mine: dict[str, int], peer: dict[str, int]) -> str:
    """Formats the MB of each kind, the peaks and their ratio; '-' if not known."""
    cells = [f"{mine[name] / 1e6:12,.1f}" for name in ("arguments", "results", "in_place", "temporaries")]
    cells += [f"{found['peak'] / 1e6:10,.1f}" if "peak" in found else f"{'-':>10s}" for found in (mine, peer)]
    return "".join(cells) + (
        f"{mine['peak'] / peer['peak']:8.2f}" if mine.keys() & peer.keys() else f"{'-':>8s}"
    )


def main(arguments: list[str]) -> None:
    """Compiles everything and prints a table."""
    texts = {
        "networks": "some of step.NETWORKS, resnet18",
        "method": "robal_n or at; robal_n",
        "batch": "sizes, 64,128,256,512",
        "precision": "ours, as config.train.precision; default and bfloat16 if not given",
        "json": "file for the record",
    }
    values = cli.parse(arguments, texts, __doc__)
    from experiments.benchmarks import measure
    from robal_jax import builder

    method = values["method"] or "robal_n"
    sizes = [int(size) for size in (values["batch"] or "64,128,256,512").split(",")]
    _, accepted = builder.RANGES["train.precision"]
    known = ",".join(filter(accepted, ("default", "bfloat16")))
    print(measure.heading())
    print(f"MB, {method}; peaks are measured on a GPU or TPU, PyTorch's on a GPU; '-': not measured\n")
    names = "".join(f"{name:>12s}" for name in ("arguments", "results", "in place", "temporaries"))
    print(f"{'':27s}{names}{'peak':>10s}{'PyTorch':>10s}{'ratio':>8s}")
    rows: list[dict[str, Any]] = []
    for network in (values["networks"] or "resnet18").split(","):
        for precision in (values["precision"] or known).split(","):
            for batch in sizes:
                given = (network, method, batch)
                mine = startup.in_fresh_process("memory", "ours", *given, precision)
                peer = startup.in_fresh_process("memory", "theirs", *given, precision == "bfloat16")
                print(f"{network:10s} {precision:10s} {batch:4d} {line(mine, peer)}", flush=True)
                row = {"network": network, "method": method, "precision": precision, "batch": batch}
                rows.append({**row, **mine, "peak_of_pytorch": peer.get("peak")})
    measure.record(values["json"], rows)


if __name__ == "__main__":
    cli.run(main)
