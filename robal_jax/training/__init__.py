"""TODO training."""

from robal_jax.training.loop import LONG_DISPATCH, chunks, positions, step_ids, train
from robal_jax.training.state import TrainState, fine_tuned_state, initial_state
from robal_jax.training.step import Examples, compiled_chunk, train_chunk, train_step

__all__ = [
    "LONG_DISPATCH",
    "Examples",
    "TrainState",
    "chunks",
    "compiled_chunk",
    "fine_tuned_state",
    "initial_state",
    "positions",
    "step_ids",
    "train",
    "train_chunk",
    "train_step",
]
