"""Training from a config to the last checkpoint.

- ``loop``: the run: chunks of steps, metrics, checkpoints, stopping and resuming
- ``step``: one update as a pure function, and the compiled loop over a chunk of steps
- ``judging``: accuracy on held-out images during the training, and the best checkpoint
- ``state``: the arrays of a run, at its start or from another run's weights
"""

from robal_jax.training.loop import LONG_DISPATCH, check_spread, chunks, positions, step_ids, train
from robal_jax.training.state import TrainState, fine_tuned_state, initial_state
from robal_jax.training.step import Examples, chunk_of, compiled_chunk, train_chunk, train_step

__all__ = [
    "LONG_DISPATCH",
    "Examples",
    "TrainState",
    "check_spread",
    "chunk_of",
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
