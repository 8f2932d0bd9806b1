"""Functions of the user's own, named ``module:function``: importing them, and messages about them."""

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

from robal_jax import checks
from robal_jax.errors import InputError, one_line, place_in, shown

CONTRACTS = {
    "data set": "return a robal_jax.data.Dataset",
    "model": "be a flax.linen module without dropout, from (images [B, H, W, C], train) to floats [B, D]",
    "head": "be a flax.linen module without dropout, from (features [B, D], train) to floats [B, K]",
    "loss": "take (logits [B, K], labels [B]) and return one float per example, [B]",
    "objective": "take (model, params, stats, batch) and return (loss, Outcome(moments, metrics))",
    "perturbation": "return a robal_jax.perturbations.Perturbation whose params are like the params",
    "budget": "return one radius per class, [K] numbers > 0",
    "class statistics": "return robal_jax.class_statistics.ClassStatistics of floats that keep their shapes",
    "average": "return a robal_jax.averages.Average of params, and perhaps stats, that are like the weights",
    "schedule": "take epochs and return one finite learning rate >= 0 per epoch; or take steps_per_epoch, "
    "too, and return one per step",
    "augmentation": "take (keys [B], uint8 images [B, H, W, C], size) and return uint8 images [B, *size, C]",
    "attack": "take (logits_fn, keys [B], images [B, H, W, C], labels [B], *, threat) and return images of "
    "the same shape and type",
    "optimizer": "return an optax.GradientTransformation whose updates are like the parameters",
}
"""The contract of each kind of function, in words that continue 'it must'."""


def imported(kind: str, name: str) -> Callable[..., Any]:
    """Imports a user's function; whatever the file raises, its error becomes one line."""
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise InputError(
            f"cannot import the {kind} {name!r} ({one_line(error)}); correct the name, or add its folder to "
            "PYTHONPATH"
        ) from error
    if not callable(function):
        raise broken(kind, name, f"is {described(function)}, not a function")
    return function


def name_of(kind: str, function: Callable[..., Any]) -> str:
    """Returns the name by which :func:`imported` finds a function.

    Raises:
      InputError: it has none: it is made inside of another function, or without a name.
    """
    module, name = (getattr(function, key, "") for key in ("__module__", "__qualname__"))
    if getattr(sys.modules.get(module), name, None) is not function:
        raise InputError(
            f"{kind} {shown(function)} cannot be imported by its name; define it at the top of a module, and "
            "pass 'module:name'"
        )
    return f"{module}:{name}"


def signature_of(kind: str, name: str, function: Callable[..., Any]) -> inspect.Signature:
    """Returns the signature of a function; some functions written in C have none, and are refused.

    Annotations that are strings are evaluated, each by itself: some are for type checkers alone.
    """
    try:
        signature = inspect.signature(function)
    except ValueError as error:
        raise broken(kind, name, "does not tell its parameters") from error
    names = vars(sys.modules.get(getattr(function, "__module__", ""), contextlib))

    def evaluated(annotation: Any) -> Any:
        if isinstance(annotation, str):
            with contextlib.suppress(Exception):
                return eval(annotation, dict(names))
        return annotation

    parameters = signature.parameters.values()
    return signature.replace(parameters=[p.replace(annotation=evaluated(p.annotation)) for p in parameters])


def broken(kind: str, name: str, what: str) -> InputError:
    """Returns the error of a function that breaks the contract of its kind."""
    return InputError(f"{kind} {name!r} {what}; it must {CONTRACTS[kind]}")


@contextlib.contextmanager
def calling(kind: str, name: str) -> Iterator[None]:
    """Turns an error of a function into one line that names the function and the place.

    Of the library's own functions only a ``ValueError`` is the user's doing; others are left alone.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if ":" in name:
            place = _place(name, error)
            if isinstance(error, checks.UNTRACEABLE):
                raise InputError(f"{kind} {name!r} {checks.NEEDS_VALUES}{place}") from error
            raise broken(kind, name, f"fails with {one_line(error)}{place}") from error
        if isinstance(error, ValueError):
            raise InputError(
                f"{kind} {name!r} cannot be used here: {' '.join(str(error).split())}"
            ) from error
        raise


def _place(name: str, error: Exception) -> str:
    """Returns the line of the function's own file where an error arose, ' (my.py:12)', if it is known."""
    return place_in(getattr(sys.modules.get(name.partition(":")[0]), "__file__", None), error)


def described(found: Any) -> str:
    """Says what a function returned: shape and type of an array, the kind of anything else."""
    if hasattr(found, "shape") and hasattr(found, "dtype"):
        return f"{found.dtype}{list(found.shape)}"
    if isinstance(found, tuple | list) and not hasattr(found, "_fields"):
        return f"a {type(found).__name__} ({', '.join(map(described, found))})"
    return "None" if found is None else f"a {type(found).__name__}"
