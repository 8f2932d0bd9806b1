"""Every field of a config, with its unit and source; the data sets; what all methods share.

A method's config is a file of its own beside this one: it calls ``get_config(data)`` and states differences
only. ``data`` is the argument behind the colon of ``--config=configs/at.py:cifar10_lt``.

A section with a ``name`` (data, model, head, loss, ...) is a function of the library and
its keyword arguments: the other keys of the section are passed to it. A name of the form
``module:function`` is imported, so a function of yours can stand there.
"""

from ml_collections import ConfigDict

RATIOS = {"digits_lt": 0.05, "cifar10_lt": 0.02, "cifar100_lt": 0.1}


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
    config.train.batch_size = 64  # the last incomplete batch of an epoch is dropped
    config.train.sampler = "uniform"  # or 'class_aware' (RoBal's re-sampling), or 'mixed': both in turn
    config.train.start_from = ""  # fine-tune a run's newest checkpoint, or one checkpoint; '': random weights
    config.train.crop_flip = True  # random crop from a zero border of 4, horizontal flip
    config.train.steps_per_dispatch = 100  # steps that run on the device between two looks from the host
    config.train.checkpoint_epochs = 5  # a checkpoint every so many epochs, and at the end
    config.train.keep_checkpoints = 3  # the newest ones
    config.train.layout = "jit"  # how several devices are used: 'jit' or 'pmap'; the numbers are the same
    config.train.precision = "default"  # of matrix products: on a GPU 'default' may be TF32

    config.evaluation = ConfigDict()
    config.evaluation.batch_size = 500  # images a device and call
    config.evaluation.seed = 0  # of the attacks' random starts
    config.evaluation.epsilon = config.threat.get_oneway_ref("epsilon")
    config.evaluation.step_size = 0.0078
    config.evaluation.logit_scale = 1.0  # the model's logits are multiplied by it ...
    config.evaluation.tau_p = 0.0  # ... and tau_p * log prior is subtracted (logit adjustment after training)
    config.evaluation.head = ConfigDict({"name": ""})  # stands in for the trained head; '': that one itself
    config.evaluation.head_classes = 0  # number of classes called head; 0: a third of them
    config.evaluation.tail_classes = 0
    # 'robal_aa' (RoBal's pair APGD-CE and APGD-T), 'standard' (AutoAttack), 'plus', 'rand', 'none', or a
    # list: 'apgd_ce,square'.
    config.evaluation.autoattack = "robal_aa"
    config.evaluation.audit = ConfigDict({"examples": 200})  # test images that it looks at; 0: no audit
    config.evaluation.audit.surrogate = ""  # another run on the same data, to attack by transfer; '': none
    config.evaluation.precision = "highest"  # robust accuracy is only believed in full float32

    if data == "digits_lt":
        _digits(config)
    return config


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
    config.train.crop_flip = False
    config.train.checkpoint_epochs = 10
    config.evaluation.batch_size = 120
    config.evaluation.autoattack = "standard"
    config.evaluation.audit.examples = 350
    config.evaluation.step_size = 0.0125  # epsilon / 8
