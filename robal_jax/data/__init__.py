"""TODO data."""

from robal_jax.data.augmentation import AUGMENTATIONS, random_crop_flip, random_resized_crop_flip
from robal_jax.data.dataset import Dataset, Images, TestSet, as_float, check_dataset, check_labels, to_float
from robal_jax.data.long_tail import PROFILES, long_tailed_counts, long_tailed_indices
from robal_jax.data.sampling import SAMPLERS, class_aware_order, epoch_order, uniform_order

__all__ = [
    "AUGMENTATIONS",
    "PROFILES",
    "SAMPLERS",
    "Dataset",
    "Images",
    "TestSet",
    "as_float",
    "check_dataset",
    "check_labels",
    "class_aware_order",
    "epoch_order",
    "long_tailed_counts",
    "long_tailed_indices",
    "random_crop_flip",
    "random_resized_crop_flip",
    "to_float",
    "uniform_order",
]
