"""Which images, and in which order.

- ``dataset``: the train and the test set as arrays or files, their checks, pixels as floats
- ``sources``: the table of data sets that a config can name, and scikit-learn's digits
- ``cifar``: CIFAR-10-LT and CIFAR-100-LT from TFDS or an .npz file
- ``image_folder``: data sets of image files, and reading files ahead of their use
- ``inspection``: images per class, files that are no images, images of both the train and the test set
- ``long_tail``: images per class in a long-tailed subset, and which ones
- ``generated``: a second source of training images, drawn at a fixed share of each batch
- ``augmentation``: random crops, flips and erased boxes, one key per image, and the table of augmentations
- ``policies``: RandAugment and AutoAugment, one key per image
- ``pil``: Pillow's operations, equal to Pillow's in every pixel
- ``cutmix``: boxes exchanged between the images of a batch
- ``corruptions``: the 15 common corruptions of test images, one stream of random numbers per image
- ``sampling``: the order of the train images in an epoch, a balanced part of the test images, held-out images
- ``held_out``: a data set without the images that are held out, and these images like test images
"""

from robal_jax.data.augmentation import (
    AUGMENTATIONS,
    RESIZING,
    cutout,
    random_crop_flip,
    random_erasing,
    random_resized_crop_flip,
)
from robal_jax.data.corruptions import CORRUPTIONS, corrupt
from robal_jax.data.cutmix import MIXINGS, cutmix, draw_cutmix
from robal_jax.data.dataset import Dataset, Images, TestSet, as_float, check_dataset, check_labels, to_float
from robal_jax.data.held_out import part_of, without
from robal_jax.data.long_tail import PROFILES, long_tailed_counts, long_tailed_indices
from robal_jax.data.policies import autoaugment, randaugment
from robal_jax.data.sampling import (
    SAMPLERS,
    balanced_part,
    class_aware_order,
    epoch_order,
    held_out_part,
    uniform_order,
)

__all__ = [
    "AUGMENTATIONS",
    "CORRUPTIONS",
    "MIXINGS",
    "PROFILES",
    "RESIZING",
    "SAMPLERS",
    "Dataset",
    "Images",
    "TestSet",
    "as_float",
    "autoaugment",
    "balanced_part",
    "check_dataset",
    "check_labels",
    "class_aware_order",
    "corrupt",
    "cutmix",
    "cutout",
    "draw_cutmix",
    "epoch_order",
    "held_out_part",
    "long_tailed_counts",
    "long_tailed_indices",
    "part_of",
    "randaugment",
    "random_crop_flip",
    "random_erasing",
    "random_resized_crop_flip",
    "to_float",
    "uniform_order",
    "without",
]
