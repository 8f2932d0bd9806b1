"""All fields with their units and sources, and the data sets.

The config of a method is a file beside this one: it calls ``get_config(data)`` and states only what differs.
``data`` is the argument after the colon of ``--config=configs/at.py:cifar10_lt``.

A section with a ``name`` (data, model, head, loss, ...) selects a function of the library; the other keys of
the section are its keyword arguments. A name of the form ``module:function`` is imported, so it can be your
own function.
"""

from ml_collections import ConfigDict

RATIOS = {
    "digits_lt": 0.05,
    "cifar10_lt": 0.02,
    "cifar100_lt": 0.1,
    "tiny_imagenet_lt": 0.1,
    "imagenet_lt": 1.0,  # all images of its list, which is long-tailed
}

STEP = 0.0078 / 0.031
"""Step size of PGD in the released code, as a part of epsilon."""


def get_config(data: str) -> ConfigDict:
    """Returns plain adversarial training (AT) of a linear head on one of the data sets of ``RATIOS``."""
    if data not in RATIOS:
        raise ValueError(f"unknown data set {data!r}; use one of {', '.join(RATIOS)}")
    config = ConfigDict()
    config.method = "AT"  # its name in tables and reports
    config.seed = 0  # initial weights, example order, augmentation, attack noise

    # The images. RoBal section 5.1: exponential profile, n_min / n_max = 0.02 (CIFAR-10), 0.1 (CIFAR-100).
    config.data = ConfigDict({"name": data})
    config.data.ratio = RATIOS[data]  # n_min / n_max, in (0, 1]
    config.data.profile = "exp"  # 'exp' or 'step'
    config.data.seed = 0  # of the subset; 0 is the paper's subset, for any training seed
    if data != "digits_lt":
        # CIFAR: a TFDS folder or an .npz file; '' for TFDS's default folder. Others: the folder of images.
        config.data.path = ""

    # Images of a generator beside them: int(share * batch size) images of each batch, drawn with replacement;
    # Wang et al. (ICML 2023): 0.7. An epoch has as many batches as without. Losses and heads then know the
    # class counts of the mixture. The path is an .npz file with images and labels, or a folder with one
    # sub-folder per class, whose files are read as RGB.
    config.generated = ConfigDict({"path": "", "share": 0.0})  # share in [0, 1); 0: none

    # 'wide_resnet' (RoBal section 5.1), 'deepmind_wide_resnet' (the form of most WideResNets on RobustBench),
    # 'preact_resnet18', 'resnet18', 'resnet20', 'resnet32', 'resnet50' or 'small_cnn'; their settings are in
    # robal_jax/models. All take mean and std, one number per channel, to standardise images.
    config.model = ConfigDict({"name": "wide_resnet", "depth": 34, "widen": 10})
    # 'linear', 'cosine', 'class_temperature', 'tau_norm' or 'tde', see robal_jax/classifiers.py.
    config.head = ConfigDict({"name": "linear"})
    # 'cross_entropy', 'smoothed_cross_entropy', 'binary_cross_entropy', 'focal', 'focal_softmax',
    # 'soft_logit_margin', 'boosted_cross_entropy', 'class_balanced_focal', 'class_balanced_sigmoid',
    # 'class_balanced_softmax', 'class_temperature', 'logit_adjustment', 'uniform_margin', 'ldam', 'robal',
    # 'deferred', 'harl', 'rebalanced', 'staged' or 'weighted_by_radius', see robal_jax/losses.py.
    config.loss = ConfigDict({"name": "cross_entropy"})
    # 'plain' (no attack), 'pgd_at', 'distilled', 'regularised', 'trades', 'mart', 'avmixup' or 'mma', see
    # robal_jax/objectives.py.
    config.objective = ConfigDict({"name": "pgd_at"})

    # L-infinity ball around images in [0, 1]: 0.031 and steps of 0.0078, not 8/255 and 2/255 (released code).
    config.threat = ConfigDict({"epsilon": 0.031, "norm": "linf"})  # or 'l2'
    # Radius of each class in training: 'constant', 'by_frequency' (RobustLT: alpha), 'given' (epsilons),
    # 'cfa' (lambda1; start, the first epoch that counts, 10), 'dafa' (scale; epoch, that is measured, 70).
    config.threat.budget = ConfigDict({"name": "constant"})
    config.threat.scaled_steps = True  # a class's step size is as large a part of its radius as in 'constant'
    config.threat.ramp = 0.0  # part of the epochs over which radii rise from 0 (RobustLT: 0.8); 0: none
    config.attack = ConfigDict()  # during training
    config.attack.loss = ConfigDict({"name": "cross_entropy"})  # is maximised, on the head's own logits
    config.attack.steps = 5
    config.attack.step_size = STEP * config.threat.get_oneway_ref("epsilon")  # it follows epsilon
    # 'one_sided' (released: x + epsilon * U[0, 1)), 'uniform', 'uniform_clipped', 'gaussian', 'clean'
    config.attack.start = "one_sided"
    config.attack.noise = 1.0  # radius of a uniform start, in epsilons (N-FGSM: 2)
    config.attack.common_noise = False  # the start's radius is epsilon in all classes (RobustLT)
    config.attack.reach = 1.0  # radius that the steps may not leave, in epsilons (N-FGSM: 3, never reached)
    # Batch norm in the attack: 'running' statistics; those of the attacked 'batch'; 'batch_update': these,
    # and every step of the attack moves the running ones (CFA's released code); 'batch_update_end': so does
    # the attack's result (AWP's released code); 'natural_first': running ones, which a training pass of the
    # clean images moves before the attack (TAET's released code).
    config.attack.batch_norm = "running"
    # m > 0: free adversarial training (Shafahi et al., NeurIPS 2019: m = 8), for objective 'pgd_at'. Every
    # batch is shown m times in a row. One backward pass per step moves the weights, and moves the
    # perturbation of the images by epsilon; the other fields of config.attack are not used, and those that
    # need passes of their own must be neutral. Epochs and milestones count steps, so m does not change the
    # cost, but each image is drawn only epochs / m times. 0: an attack in every step
    config.attack.free_steps = 0
    # Epoch, counted from 1, in which the attack begins; before it, the images are shown as they are (TAET:
    # 41).
    config.attack.first_epoch = 1
    # DAFA's released code around AT: each step by the class's radius is followed by one by the common radius,
    # in the same direction, and the result stays within the common radius.
    config.attack.second_step = False
    config.attack.alignment = 0.0  # weight of GradAlign's regulariser (0.2 for 8/255 in its paper); 0: none

    config.optimizer = ConfigDict({"name": "sgd", "momentum": 0.9, "weight_decay": 2e-4})
    config.optimizer.clip_norm = 0.0  # largest global norm of the gradient; 0: no clipping
    config.optimizer.trainable = ""  # beginning of the trained parameters' names ('classifier'); '': all
    # Weights at which a step's gradient is taken: 'none' (the weights themselves), or 'awp' (gamma;
    # start, an epoch; direction; counts_pass).
    config.perturbation = ConfigDict({"name": "none"})
    # An average of the weights, kept beside them: 'none', 'ema' (decay; warmup in epochs), 'per_epoch' (CFA:
    # decay) or 'swa' (start in epochs).
    config.average = ConfigDict({"name": "none"})
    # What is gathered of the classes in one epoch, and read by losses and objectives in the next: 'none', or
    # 'predictions' (REAT: how often each class is predicted for adversarial images; logged=True: in the
    # logged pass, as RobustLT's code counts).
    config.class_statistics = ConfigDict({"name": "none"})
    # Nesterov's momentum, as PyTorch's SGD has it; Wang et al. (ICML 2023) train with it, and with
    # decayed='not_batch_norm'.
    config.optimizer.nesterov = False
    # Parameters with weight decay: 'all', 'weights' (no batch norm, no bias) or 'not_batch_norm'.
    config.optimizer.decayed = "all"
    # 'released' applies the decay again in every epoch after a milestone, 'paper' once; 'piecewise' is that
    # with a warm-up by step. 'cosine' (warmup, start, final, by) and 'one_cycle' have other arguments:
    # --config.schedule.name=cosine drops those that it does not take; a config file replaces the section:
    # ``config.schedule = ConfigDict({"name": "cosine", "lr": 0.1, "warmup": 5})``. AT-BSL (Yue et al., CVPR
    # 2024) is 'paper' with milestones (75, 90, 100) of 100 epochs.
    config.schedule = ConfigDict({"name": "released"})
    config.schedule.lr = 0.1
    config.schedule.milestones = (60, 75)  # epochs, counted from 1
    config.schedule.decay = 0.1
    config.schedule.warmup = 0  # epochs

    config.train = _train()
    config.evaluation = _evaluation(config.threat)
    if data in _DIFFERENCES:
        _DIFFERENCES[data](config)
    return config


def _train() -> ConfigDict:
    """Returns the section ``train``: length, batches, augmentation, devices and checkpoints."""
    config = ConfigDict()
    config.epochs = 80
    config.max_steps = 0  # ends the run after so many steps, for a trial: it cannot go on; 0: no limit
    config.batch_size = 64  # on all devices; the last incomplete batch of an epoch is dropped
    # Parts of a batch that a device computes one after the other, to save memory. Batch norm then takes its
    # statistics from each part, and without sync_batch_norm from each device's share of the part. Runs that
    # cut their batches into the same number of parts agree, on any devices.
    config.accumulation_steps = 1
    config.sync_batch_norm = True  # statistics of the images of all devices
    # or 'class_aware' (RoBal's re-sampling), 'mixed' (alternately), or 'balanced' (a fixed set with the same
    # number of images per class: some of the large classes', and those of the small classes several times)
    config.sampler = "uniform"
    # Images of each class in the 'balanced' sampler; 0: as many as the mean class has
    config.images_per_class = 0
    config.teacher = ""  # a run, or one of its checkpoints, that teaches objective 'distilled'; '': none
    config.start_from = ""  # a run, or one of its checkpoints, to fine-tune; '': random weights
    # 'crop_flip' (random crop from a zero border of 4, horizontal flip), 'resized_crop_flip', 'cutout',
    # 'random_erasing', 'randaugment' (two operations of magnitude 8), 'autoaugment' (the policy of CIFAR-10),
    # your own 'module:function', from (keys, images, size) to images, or a list that is applied in its order:
    # 'randaugment,crop_flip' is AT-BSL's; 'none'
    config.augmentation = "crop_flip"
    config.mixing = "none"  # or 'cutmix': boxes of other images of the batch, each label with its share
    config.batch_norm_momentum = 0.1  # weight of a batch in the running statistics
    # Training passes of the new weights after each update. They train nothing and move only batch norm's
    # running statistics. RobustLT's released code makes 'adv,nat', CFA's and AWP's 'nat', for the sake of
    # their logs.
    config.logged_passes = ""
    # s in [0, 1): the loss becomes (1 - s) l(z, y) + s mean_k l(z, k), the loss of the attack stays as it is.
    config.label_smoothing = 0.0  # 0: none; 0.1 in Wang et al. (ICML 2023)
    config.reading_threads = 16  # threads that read image files; at most the number of cores
    # Training steps per dispatch to the devices; a signal to stop takes effect after the dispatch.
    config.steps_per_dispatch = 20
    config.checkpoint_epochs = 5  # epochs between two checkpoints; there is one at the end, too
    config.keep_checkpoints = 3  # number of newest checkpoints kept
    # Share of the training images, in [0, 1), that are held out: of each class at least one. A share that
    # leaves no image of a class is refused.
    # The class counts, and so all priors, are those of the rest. Rice, Wong, Kolter (ICML 2020).
    config.held_out = 0.0
    # Epochs between two looks at the held-out images: clean, and under 10 steps of PGD with the evaluation's
    # epsilon and step size; also at the end. 0: none
    config.evaluate_epochs = 0
    # The checkpoint that is evaluated: 'last', or 'best', the one with the highest accuracy under PGD on the
    # held-out images (mean of the classes). 'best_on_test' looks at the test images instead, as the released
    # code of RoBal, AT-BSL and REAT does: for reproducing numbers only, the audit flags it.
    config.select = "last"
    config.layout = "jit"  # 'jit' over a mesh of all devices, or 'pmap'; same numbers
    # Of matrix products: 'default' (TF32 on a GPU), 'high' or 'highest'; 'bfloat16': the backbone computes in
    # bfloat16, while parameters, batch-norm statistics, head, softmax and the attack's images stay float32.
    config.precision = "default"
    return config


def _evaluation(threat: ConfigDict) -> ConfigDict:
    """Returns the section ``evaluation``: the protocol, and the method's changes at inference."""
    config = ConfigDict()
    config.batch_size = 500  # images per device in each call; a CPU takes fewer, see devices.cpu.at_once
    config.seed = 0  # of the attacks' random starts, and of the part that 'examples' takes
    # Test images that are evaluated, as many of each class; 0: all. A larger part holds a smaller one.
    config.examples = 0
    config.weights = "current"  # or 'average': those of config.average
    config.epsilon = threat.get_oneway_ref("epsilon")
    config.step_size = STEP * config.get_oneway_ref("epsilon")
    # Radius of each class: 'constant', the standard; 'by_frequency' (alpha; RobustLT) or 'given' (epsilons).
    config.budget = ConfigDict({"name": "constant"})
    config.logit_scale = 1.0  # factor of the model's logits
    config.tau_p = 0.0  # tau_p * log prior is subtracted from them (logit adjustment after training)
    config.head = ConfigDict({"name": ""})  # used in place of the trained head; '': the trained head
    # How the classes are divided for the figures by group, a list with commas of 'thirds' (RoBal, REAT),
    # 'last_80_percent' (RobustLT), 'few' (fewer than 20 training images), 'last_five', and 'shots' (more than
    # 100, 20 to 100, fewer; ImageNet-LT). The first leads; the report shows all of several side by side.
    config.groups = "thirds"
    # For 'thirds': numbers of head and of tail classes; 0: a third, or those of equal counts, see
    # metrics.class_groups.
    config.head_classes = 0
    config.tail_classes = 0
    # 'robal_aa' (RoBal's pair APGD-CE and APGD-T), 'standard' (AutoAttack), 'torchattacks' (as that package
    # runs AutoAttack, with 10 iterations, which much published work reports), 'fast' (PMA, APGD-MALT and a
    # short Square, with AutoAttack's own Square after it if it breaks an image; an upper estimate for daily
    # work), 'union' ('standard', then PMA and APGD-MALT: at most AutoAttack's accuracy), 'plus', 'rand',
    # 'none', or a list: 'apgd_ce,square', also of your own attacks: 'apgd_ce,my_attacks:noise'.
    config.autoattack = "robal_aa"
    # 'fmn' (L-infinity, L2) or 'ddn' (L2): the distances of the closest adversarial images, their medians by
    # class and group, and the robust accuracy by radius that follows from them; '': none
    config.minimum_norm = ""
    # Also the accuracy on clean images under 15 common corruptions at 5 strengths (Hendrycks and Dietterich,
    # ICLR 2019). Images need 1 or 3 channels. A finished evaluation is given it without another attack.
    config.corruptions = False
    # Also the certified accuracy at the radius and at parts of it, a lower bound of the robust accuracy by
    # linear bounds (CROWN). For small networks, in L-infinity. A finished evaluation is given it, too.
    config.certified = False
    # Also how the attacks of the ensemble compare: for each one alone, the smallest of eight radii at which
    # it breaks each image of the audit's sample. Each attack runs about three times on each of these images,
    # also on those that another one has broken. A finished evaluation is given it, too.
    config.optimality = False
    config.audit = ConfigDict({"examples": 200})  # test images in its sample; 0: no audit
    config.audit.surrogate = ""  # another run on the same data, for attacks by transfer; '': none
    config.precision = "highest"  # a robust accuracy needs full float32
    return config


def constants_of(data: str) -> str:
    """Returns the data set whose constants a method uses.

    For the ImageNets no published constants are known to us; those of CIFAR-100, the other data set with many
    classes, are our choice.
    """
    return "cifar100_lt" if data in ("tiny_imagenet_lt", "imagenet_lt") else data


def fine_tuned(data: str, sampler: str, trainable: str) -> ConfigDict:
    """Returns one epoch of fine-tuning plain AT at the first rate; ten on the digits, of five steps each."""
    config = get_config(data)
    config.train.start_from = f"runs/{data}/at"
    config.train.sampler = sampler
    config.train.epochs = 10 if data == "digits_lt" else 1
    config.optimizer.trainable = trainable
    config.schedule.milestones = ()
    config.schedule.warmup = 0
    return config


def follow_up(data: str) -> ConfigDict:
    """Returns AT with the constants that most work after RoBal shares (AT-BSL, REAT, TAET, RobustLT).

    ResNet-18, epsilon 8/255, 10 steps of 2/255, 100 epochs with milestones 75 and 90, batches of 128, weight
    decay 5e-4, a linear head with a trained bias. The digits and ImageNet-LT keep their own constants.
    """
    config = get_config(data)
    if data in ("digits_lt", "imagenet_lt"):
        return config
    config.head = ConfigDict({"name": "linear", "bias": "trained"})
    config.threat.epsilon = 8 / 255
    config.attack.steps = 10
    config.attack.step_size = 0.25 * config.threat.get_oneway_ref("epsilon")
    config.evaluation.step_size = 0.25 * config.evaluation.get_oneway_ref("epsilon")
    config.optimizer.weight_decay = 5e-4
    config.schedule.name = "paper"
    config.schedule.milestones = (75, 90)
    config.train.epochs = 100
    config.train.batch_size = 128
    if data == "tiny_imagenet_lt":
        config.model = ConfigDict({"name": "preact_resnet18"})
    else:
        config.model = ConfigDict({"name": "resnet18"})
    return config


def longer(config: ConfigDict, data: str, epochs: int, *milestones: int) -> ConfigDict:
    """Sets the epochs and milestones of a follow-up method; the digits and ImageNet-LT keep their own."""
    if data not in ("digits_lt", "imagenet_lt"):
        config.train.epochs, config.schedule.milestones = epochs, milestones
    return config


def robustlt(config: ConfigDict, data: str, *, beta: float = 0.8, beta_tiny: float = 0.2) -> ConfigDict:
    """Plugs RobustLT into a method: radii by class that rise from 0, and its released code's training loop.

    The loop attacks with the batch's statistics, starts all classes from the common radius, trains with
    Nesterov's momentum, and makes two more training passes after each update, for its log. It counts epochs
    from 1, whatever the method's own code does, so that the milestones of all methods are those published.
    Alpha and, on CIFAR-100-LT, beta are the same for all methods.

    Args:
      config: of the method; it is changed.
      data: the data set.
      beta: part of the epochs over which the radii rise on CIFAR-10-LT and the digits.
      beta_tiny: the same on Tiny-ImageNet-LT.
    """
    few = data in ("digits_lt", "cifar10_lt")
    config.method = f"RobustLT on {config.method}"
    config.threat.budget = ConfigDict({"name": "by_frequency", "alpha": 0.3 if few else 0.4})
    config.threat.ramp = beta if few else beta_tiny if data == "tiny_imagenet_lt" else 0.6
    config.attack.start = "uniform_clipped"
    config.attack.common_noise = True
    config.attack.batch_norm = "batch"
    config.optimizer.nesterov = True
    config.train.logged_passes = "adv,nat"
    if data not in ("digits_lt", "imagenet_lt"):
        milestones = {80: (60, 75), 100: (75, 90), 200: (100, 150)}
        config.schedule.milestones = milestones.get(config.train.epochs, config.schedule.milestones)
        if config.loss.name == "staged":  # TAET's second stage
            config.loss.start = config.attack.first_epoch = 40
    if data in ("cifar10_lt", "cifar100_lt"):
        config.model = ConfigDict({"name": "wide_resnet", "depth": 28, "widen": 10})
        config.threat.epsilon = 8 / 255
        config.attack.step_size = 0.25 * config.threat.get_oneway_ref("epsilon")
        config.optimizer.weight_decay = 5e-4
        config.schedule.name = "paper"
    return config


def _digits(config: ConfigDict) -> None:
    """8x8 digits: a problem for two CPU cores in which the tail is as fragile as on the large data sets.

    Different digits are at least 0.4375 apart in L-infinity, so epsilon = 0.1 keeps every label true.
    """
    config.data.head = 104  # images of the largest class
    config.data.test_per_class = 70
    # The training seed also draws which digit is the head class and which images are taken.
    config.data.seed = config.get_oneway_ref("seed")
    config.model = ConfigDict({"name": "small_cnn"})
    config.threat.epsilon = 0.1
    config.attack.steps = 7
    config.attack.step_size = 0.25 * config.threat.get_oneway_ref("epsilon")
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
    config.evaluation.step_size = 0.125 * config.evaluation.get_oneway_ref("epsilon")


def _image_folder(config: ConfigDict, image_size: int, resize: int, epsilon: float) -> None:
    """Images in folders; ``--config.data.path`` must be given. PGD from a uniform start: Madry et al."""
    config.data.name = "image_folder"
    config.data.train = "train"  # folder in config.data.path with one subfolder per class
    config.data.test = "val"
    config.data.train_list = ""  # list of images in config.data.path, used in place of the folder
    config.data.test_list = ""
    config.data.resize = resize  # pixels of an image's shorter side, and of a training image's sides
    config.data.image_size = image_size  # pixels of a test image's sides, cut from the middle
    config.threat.epsilon = epsilon
    config.attack.step_size = 0.25 * config.threat.get_oneway_ref("epsilon")
    config.attack.start = "uniform"
    config.schedule.name = "paper"
    config.evaluation.batch_size = 100  # our choice: ResNet-50 needs more memory per image
    config.evaluation.step_size = 0.25 * config.evaluation.get_oneway_ref("epsilon")


def _tiny_imagenet(config: ConfigDict) -> None:
    """200 classes of up to 500 images of 64x64 pixels.

    Ratio, epsilon, steps and schedule are those of AT-BSL's released code (Yue et al., CVPR 2024), which
    also uses RandAugment and starts the attack at 0.001 N(0, 1).
    """
    _image_folder(config, image_size=64, resize=64, epsilon=8 / 255)
    # Our choice, as on ImageNet-LT; follow-up work uses ResNet-18: --config.model.name=resnet18
    config.model = ConfigDict({"name": "resnet50", "stem": "small"})
    config.attack.steps = 10
    config.optimizer.weight_decay = 5e-4
    config.schedule.milestones = (75, 90)
    config.train.epochs = 100
    config.train.batch_size = 128


def _imagenet(config: ConfigDict) -> None:
    """1000 classes of 5 to 1280 images, from the lists of Liu et al. (CVPR 2019).

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
    config.train.steps_per_dispatch = 4  # images of this many steps, and as many again, are held in memory
    config.train.checkpoint_epochs = 1  # an epoch takes hours
    config.train.augmentation = "resized_crop_flip"


_DIFFERENCES = {"digits_lt": _digits, "tiny_imagenet_lt": _tiny_imagenet, "imagenet_lt": _imagenet}
