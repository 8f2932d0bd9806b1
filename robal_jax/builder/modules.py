"""Contracts of backbones and heads, checked before any long work starts; see ``contracts``."""

from typing import Any

import flax.linen as nn
import jax
from jax.interpreters import partial_eval

from robal_jax import models
from robal_jax.builder.contracts import is_float, names, traced, unlike
from robal_jax.errors import InputError
from robal_jax.own_functions import broken, described


def check_module(
    kind: str, name: str, module: Any, inputs: Any, width: int | None = None, *, trained: bool
) -> Any:
    """Refuses a backbone or a head that is not what the attacks and a training pass need.

    Args:
      kind: 'model' or 'head'.
      name: in the config.
      module: the flax module.
      inputs: shape of what it receives in a step, ``[devices, B, ...]``.
      width: number of features or logits, if it is known.
      trained: whether there are training passes.

    Returns:
      The shape of its output, ``[devices, B, D]``.
    """
    if not isinstance(module, nn.Module):
        raise broken(kind, name, f"returns {described(module)}")
    devices, batch = inputs.shape[:2]

    def checked(found: Any) -> Any:
        if not is_float(found, (batch, width)):
            what = {"model": "images", "head": "features"}[kind]
            raise broken(kind, name, f"returns {described(found)} for {what} {list(inputs.shape[1:])}")
        return found

    def predict(variables: Any, x: Any) -> Any:
        return module.apply(variables, x, False)

    def train(params: Any, stats: Any, x: Any) -> Any:
        return module.apply({"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"])

    def init(key: Any, x: Any) -> Any:
        return module.init_with_output(key, x, False)

    key = jax.eval_shape(jax.random.key, 0)
    _, (found, variables) = traced(kind, name, init, (None, 0), key, inputs)
    checked(found)
    others = sorted(set(variables) - {"params", "batch_stats"})
    if others:
        raise InputError(
            f"{kind} {name!r} has variables in {others[0]!r}; use the collections 'params' and 'batch_stats'"
        )
    params, stats = variables.get("params", {}), variables.get("batch_stats", {})
    if ":" in name:  # the library's modules draw nothing at random
        checked(traced(kind, name, predict, (None, 0), variables, inputs)[1])
        single = inputs.update(shape=(devices, 1, *inputs.shape[2:]))  # any number of examples will do
        traced(kind, name, predict, (None, 0), variables, single)
    output = jax.ShapeDtypeStruct((devices, *found.shape), found.dtype)
    if not trained:
        return output
    program, (found, moments) = traced(kind, name, train, (None, None, 0), params, stats, inputs)
    checked(found)
    moments = moments.get("batch_stats", {})
    problem = unlike(moments, stats)
    if problem:
        raise InputError(
            f"{kind} {name!r} leaves {problem} in 'batch_stats'; leave one moment per running value"
        )
    _check_no_running_values(kind, name, program.jaxpr, params, stats)
    return output


def _check_no_running_values(kind: str, name: str, program: Any, params: Any, stats: Any) -> None:
    """Refuses a training pass whose moment depends on the running value into which it will be folded.

    A moment that *is* its running value keeps that value as it is, and is allowed.

    Args:
      kind: 'model' or 'head'.
      name: in the config.
      program: jaxpr of ``(params, stats, x) -> (output, moments)``.
      params: of the module.
      stats: its running values.
    """
    first = len(jax.tree.leaves(params))
    running = dict(zip(names(stats), program.invars[first:], strict=False))
    moments = dict(zip(running, program.outvars[1:], strict=True))
    made = {out: eqn for eqn in program.eqns for out in eqn.outvars}
    folded = [
        path
        for path in running
        if models.FOLDS.get(path.rpartition("/")[2], (0.0, 0.0))[1]
        and not _is_copy(made, moments[path], running)
    ]

    def used(paths: list[str]) -> list[str]:
        kept = {moments[path] for path in paths}
        _, needed = partial_eval.dce_jaxpr(program, [out in kept for out in program.outvars])
        read = {var for var, need in zip(program.invars, needed, strict=True) if need}
        return [path for path in paths if running[path] in read]

    for path in used(folded):  # a moment may depend on other running values
        if used([path]):
            raise InputError(
                f"{kind} {name!r} stores a running value in {path!r}, where a training pass must leave the "
                "moment of its batch; use robal_jax.models.BatchNorm in place of flax's nn.BatchNorm"
            )


def _is_copy(made: Any, moment: Any, running: Any) -> bool:
    """Returns whether a moment is a running value, repeated on every device."""
    eqn = made.get(moment)
    copied = eqn.invars[0] if eqn is not None and eqn.primitive.name == "broadcast_in_dim" else moment
    return any(copied is value for value in running.values())
