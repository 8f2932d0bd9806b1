"""Every field, its unit and source; the data sets (the ImageNets take CIFAR-100's constants: our choice).

A method's config is a file of its own beside this one: it calls ``get_config(data)`` and states differences
only. ``data`` is the argument behind the colon of ``--config=configs/at.py:cifar10_lt``.

A section with a ``name`` (data, model, head, loss, ...) is a function of the library and
its keyword arguments: the other keys of the section are passed to it. A name of the form
``module:function`` is imported, so a function of yours can stand there.
"""

from ml_collections import ConfigDict

RATIOS = {
    "digits_lt": 0.05,
    "cifar10_lt": 0.02,
    "cifar100_lt": 0.1,
    "tiny_imagenet_lt": 0.1,
    "imagenet_lt": 1.0,  # nothing is left out: its list of training images is long-tailed
}


def get_config(data: str) -> ConfigDict:
    """Plain adversarial training (AT) of a linear head on one of the data sets of ``RATIOS``."""
    if data not in RATIOS:
        raise ValueError(f"unknown data set {data!r}; known: {', '.join(RATIOS)}")
    config = ConfigDict()
    config.method = "AT"  # what tables and reports call it
    config.seed = 0  # initial weights, example order, augmentation, attack noise

    # Which images. RoBal section 5.1: exponential profile, n_min / n_max = 0.02 (CIFAR-10), 0.1 (CIFAR-100).
    config.data = ConfigDict({"name": data})
    config.data.ratio = RATIOS[data]  # n_min / n_max, in (0, 1]
    config.data.profile = "exp"  # 'exp' or 'step'
    config.data.seed = 0  # of the subset; 0 is the paper's, whatever the training seed
    if data != "digits_lt":
        config.data.path = ""  # a TFDS folder or an .npz file; '' is TFDS's default folder

    # WideResNet-34-10, RoBal section 5.1.
    config.model = ConfigDict({"name": "wide_resnet", "depth": 34, "widen": 10})
    config.head = ConfigDict({"name": "linear"})
    config.loss = ConfigDict({"name": "cross_entropy"})
    config.objective = ConfigDict({"name": "pgd_at"})

    # L-infinity ball around images in [0, 1]: 0.031 and 0.0078, not 8/255 and 2/255 (released code).
    config.threat = ConfigDict({"epsilon": 0.031, "norm": "linf"})  # or 'l2'
    config.attack = ConfigDict()  # inside of training
    config.attack.loss = ConfigDict({"name": "cross_entropy"})  # what it maximises, on the head's own logits
    config.attack.steps = 5
    config.attack.step_size = 0.0078
    config.attack.start = "one_sided"  # released: x + epsilon * U[0, 1); also 'uniform', 'gaussian', 'clean'

    config.optimizer = ConfigDict({"name": "sgd", "momentum": 0.9, "weight_decay": 2e-4})
    config.optimizer.clip_norm = 0.0  # largest global norm of the gradient; 0: no clipping
    config.optimizer.trainable = ""  # how the names of the trained parameters begin ('classifier'); '': all
    config.schedule = ConfigDict()
    config.schedule.name = "released"  # compounds the decay in every epoch after a milestone; or 'paper'
    config.schedule.lr = 0.1
    config.schedule.milestones = (60, 75)  # epochs, counted from 1
    config.schedule.decay = 0.1
    config.schedule.warmup = 0  # epochs

    config.train = ConfigDict()
    config.train.epochs = 80
    config.train.max_steps = 0  # end after so many steps, for a trial; 0: no such limit
    config.train.batch_size = 64  # on all devices; the last incomplete batch of an epoch is dropped
    # Parts of a batch that a device takes one after the other, to need less memory; batch norm takes its
    # statistics from a part then, and from each device's part of it without sync_batch_norm. So runs agree
    # that cut their batches into the same number of parts, on whatever devices.
    config.train.accumulation_steps = 1
    config.train.sync_batch_norm = True  # statistics of all devices' images, whatever their number
    config.train.sampler = "uniform"  # or 'class_aware' (RoBal's re-sampling), or 'mixed': both in turn
    config.train.start_from = ""  # fine-tune a run's newest checkpoint, or one checkpoint; '': random weights
    # 'crop_flip' (random crop from a zero border of 4, horizontal flip), 'resized_crop_flip', 'none'
    config.train.augmentation = "crop_flip"
    config.train.reading_threads = 16  # read images that are not in memory; no more than a host has cores
    # Steps that the devices make between two looks from the host; a signal to stop waits for them.
    config.train.steps_per_dispatch = 20
    config.train.checkpoint_epochs = 5  # a checkpoint every so many epochs, and at the end
    config.train.keep_checkpoints = 3  # the newest ones
    config.train.layout = "jit"  # how the devices are used: 'jit' over a mesh, or 'pmap'; the same numbers
    # Of matrix products: 'default' (TF32 on a GPU), 'high' or 'highest'; or 'bfloat16': the backbone computes
    # in it, while parameters, batch-norm statistics, head, softmax and the attack's images stay float32.
    config.train.precision = "default"

    config.evaluation = _evaluation(config.threat)
    if data in _DIFFERENCES:
        _DIFFERENCES[data](config)
    return config


def _evaluation(threat: ConfigDict) -> ConfigDict:
    """The section evaluation: the protocol, and what a method does at inference."""
    config = ConfigDict()
    config.batch_size = 500  # images a device and call; a CPU takes fewer: build.at_once
    config.seed = 0  # of the attacks' random starts
    config.epsilon = threat.get_oneway_ref("epsilon")
    config.step_size = 0.0078
    config.logit_scale = 1.0  # the model's logits are multiplied by it ...
    config.tau_p = 0.0  # ... and tau_p * log prior is subtracted (logit adjustment after training)
    config.head = ConfigDict({"name": ""})  # stands in for the trained head; '': that one itself
    config.head_classes = 0  # number of classes called head; 0: a third of them
    config.tail_classes = 0
    # 'robal_aa' (RoBal's pair APGD-CE and APGD-T), 'standard' (AutoAttack), 'plus', 'rand', 'none', or a
    # list: 'apgd_ce,square'.
    config.autoattack = "robal_aa"
    config.audit = ConfigDict({"examples": 200})  # test images that it looks at; 0: no audit
    config.audit.surrogate = ""  # another run on the same data, to attack by transfer; '': none
    config.precision = "highest"  # robust accuracy is only believed in full float32
    return config


def constants_of(data: str) -> str:
    """The data set whose constants a method takes that has a table of them.

    No published ones for the two ImageNets are at hand; those of CIFAR-100, the other data set of many
    classes, are our choice.
    """
    return "cifar100_lt" if data in ("tiny_imagenet_lt", "imagenet_lt") else data


def fine_tuned(data: str, sampler: str, trainable: str) -> ConfigDict:
    """One epoch from the weights of plain AT on, at the first rate; ten on the digits, of five steps each."""
    config = get_config(data)
    config.train.start_from = f"runs/{data}/at"
    config.train.sampler = sampler
    config.train.epochs = 10 if data == "digits_lt" else 1
    config.optimizer.trainable = trainable
    config.schedule.milestones = ()
    config.schedule.warmup = 0
    return config


def _digits(config: ConfigDict) -> None:
    """8x8 digits: a problem for two CPU cores in which the tail is as fragile as in the large ones.

    Different digits are at least 0.4375 apart in L-infinity, so epsilon = 0.1 leaves every label true.
    """
    config.data.head = 104  # images of the largest class
    config.data.test_per_class = 70
    config.data.seed = config.get_oneway_ref(
        "seed"
    )  # which digit is the head class, and which images are taken
    config.model = ConfigDict({"name": "small_cnn"})
    config.threat.epsilon = 0.1
    config.attack.steps = 7
    config.attack.step_size = 0.025  # epsilon / 4
    config.attack.start = "uniform"
    config.optimizer.weight_decay = 5e-4
    config.optimizer.clip_norm = 1.0
    config.schedule.name = "paper"
    config.schedule.lr = 0.05
    config.schedule.milestones = (45, 55)
    config.schedule.warmup = 3
    config.train.epochs = 60
    config.train.augmentation = "none"
    config.train.checkpoint_epochs = 10
    config.evaluation.batch_size = 120
    config.evaluation.autoattack = "standard"
    config.evaluation.audit.examples = 350
    config.evaluation.step_size = 0.0125  # epsilon / 8


def _image_folder(config: ConfigDict, image_size: int, resize: int, epsilon: float) -> None:
    """Images in folders; ``--config.data.path`` must be given. PGD from a uniform start: Madry et al."""
    config.data.name = "image_folder"
    config.data.train = "train"  # folder in config.data.path that holds one for each class ...
    config.data.test = "val"
    config.data.train_list = ""  # ... or a list of images in config.data.path, which replaces it
    config.data.test_list = ""
    config.data.resize = resize  # pixels of an image's shorter side, and of the training images' sides
    config.data.image_size = image_size  # pixels of the test images' sides, cut from the middle
    config.threat.epsilon = epsilon
    config.attack.step_size = epsilon / 4
    config.attack.start = "uniform"
    config.schedule.name = "paper"
    config.evaluation.batch_size = 100  # our choice: ResNet-50 needs more memory an image
    config.evaluation.step_size = epsilon / 4


def _tiny_imagenet(config: ConfigDict) -> None:
    """200 classes of up to 500 images of 64x64 pixels.

    Ratio, epsilon, steps and schedule are those of AT-BSL's released code (Yue et al., CVPR 2024), which
    augments with RandAugment too and starts the attack at 0.001 N(0, 1).
    """
    _image_folder(config, image_size=64, resize=64, epsilon=8 / 255)
    # Our choice, as on ImageNet-LT; follow-up work takes a ResNet-18: --config.model.name=resnet18
    config.model = ConfigDict({"name": "resnet50", "stem": "small"})
    config.attack.steps = 10
    config.optimizer.weight_decay = 5e-4
    config.schedule.milestones = (75, 90)
    config.train.epochs = 100
    config.train.batch_size = 128


def _imagenet(config: ConfigDict) -> None:
    """1000 classes of 5 to 1280 images, by the lists of Liu et al. (CVPR 2019).

    ResNet-50 as in table S8 of RoBal's supplement; batch, rate, schedule and weight decay of Goyal et al.
    (2017). Epsilon and the number of steps, base's, are our choice: 4/255 is the usual radius on ImageNet.
    """
    _image_folder(config, image_size=224, resize=256, epsilon=4 / 255)
    config.data.train_list = "ImageNet_LT_train.txt"
    config.data.test_list = "ImageNet_LT_test.txt"
    config.model = ConfigDict({"name": "resnet50", "stem": "imagenet"})
    config.optimizer.weight_decay = 1e-4
    config.schedule.milestones = (30, 60, 80)
    config.train.epochs = 90
    config.train.batch_size = 256
    config.train.steps_per_dispatch = 4  # whose images wait in memory, and those of as many more
    config.train.checkpoint_epochs = 1  # hours lie between two of them
    config.train.augmentation = "resized_crop_flip"


_DIFFERENCES = {"digits_lt": _digits, "tiny_imagenet_lt": _tiny_imagenet, "imagenet_lt": _imagenet}
