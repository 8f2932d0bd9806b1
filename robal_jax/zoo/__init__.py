"""The zoo: trained models that ship with the library, each as weights with a card.

``experiments/zoo/DATA/`` has three files per model: ``NAME.safetensors`` (float32 weights under PyTorch's
names, with the config in the metadata), ``NAME.json`` (the card, see ``cards``) and
``NAME.robustbench.json`` (the same figures under RobustBench's names).

- ``cards``: what a card says, as pure functions
- ``models``: models by name, as functions from images to logits, and as runs
- ``publishing``: from a run and its evaluations to the three files
"""

from robal_jax.zoo.models import Model, config_of, load_model, make_run, names, read_card
from robal_jax.zoo.publishing import publish

__all__ = ["Model", "config_of", "load_model", "make_run", "names", "publish", "read_card"]
