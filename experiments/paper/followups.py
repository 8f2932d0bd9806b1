"""The tables of the methods after the paper, with figures that were published with other protocols."""

from collections.abc import Sequence

from experiments.paper.rows import CIFAR, Elsewhere, Row, Table

_CIFAR_PROTOCOL = (
    "model.name=resnet18", "threat.epsilon=8/255", "optimizer.weight_decay=5e-4", "schedule.name=paper",
    "schedule.milestones=75,90", "train.epochs=100", "train.batch_size=128", "train.augmentation=crop_flip",
    "attack.steps=10", "evaluation.step_size=2/255",
)  # fmt: skip

_PROTOCOL = dict.fromkeys(CIFAR, _CIFAR_PROTOCOL)

C10, C100 = "CIFAR-10-LT IR 50", "CIFAR-100-LT IR 10"

_RERUN = "second-hand: an independent rerun of the released code"

_NOTED = "second-hand: a note on RobustLT"


def _rerun(data: str, network: str, clean: str, pgd: str, aa: str) -> Elsewhere:
    return Elsewhere(data, network, clean, pgd, aa, "10 iterations", "8/255", "best on test", _RERUN)


def _noted(clean: str, pgd: str, aa: str = "—") -> Elsewhere:
    attack = "—" if aa == "—" else "10 iterations"
    return Elsewhere(C10, "WideResNet-28-10", clean, pgd, aa, attack, "8/255", "last", _NOTED)


def _of_taet(clean: str, pgd: str, aa: str, source: str) -> Elsewhere:
    data = "CIFAR-10-LT IR 10, long-tailed test set"
    return Elsewhere(data, "ResNet-18, 224 x 224", clean, pgd, aa, "10 iterations", "—", "last", source)


def _balanced(network: str, clean: str, pgd: str, aa: str, data: str = "CIFAR-10, balanced") -> Elsewhere:
    attack = "—" if aa == "—" else "iterations not stated"
    return Elsewhere(data, network, clean, pgd, aa, attack, "8/255", "—", "first-hand: the code's README")


def _of_robal(data: str, clean: str, pgd: str, aa: str) -> Elsewhere:
    pair = "100 iterations of APGD-CE and APGD-T"
    return Elsewhere(data, "WideResNet-34-10", clean, pgd, aa, pair, "0.031", "last", "first-hand: RoBal")


_TAET = "second-hand: a note on TAET"

_OURS = "a variant of ours"

_UNREAD = "its paper's tables could not be read"


def _augmented(
    key: str, label: str, override: str, alone: Sequence[Elsewhere] = (), plugged: Sequence[Elsewhere] = ()
) -> tuple[Row, ...]:
    """Returns the rows of AT-BSL with an augmentation, and of RobustLT on it."""
    # Shears, translations and boxes for 32 x 32 pixels destroy images of 8 x 8.
    return tuple(
        Row(
            f"{config}_{key}", "", f"{method}, {label}", config, overrides=(override,), data=CIFAR,
            elsewhere=tuple(elsewhere), unpublished="" if elsewhere else _OURS,
        )
        for config, method, elsewhere in (
            ("at_bsl", "AT-BSL", alone), ("robustlt_at_bsl", "RobustLT on AT-BSL", plugged)
        )
    )  # fmt: skip


RANDAUGMENT = "train.augmentation=randaugment,crop_flip"

_AUGMENTED = {
    "ra": _augmented("ra", "RandAugment", RANDAUGMENT, [
        _rerun(C10, "ResNet-18", "69.76", "38.09", "33.76")]),
    "aua": _augmented("aua", "AutoAugment", "train.augmentation=autoaugment,crop_flip", [
        _rerun(C100, "WideResNet-34-10", "53.15", "25.12", "21.40"), _noted("77.09", "37.98", "34.57")],
        [_noted("77.61", "42.11", "37.49")]),
    "cutmix": _augmented("cutmix", "CutMix", "train.mixing=cutmix"),
}  # fmt: skip

# On the digits the start is uniform already; the released AT starts on one side of the image.
_AT = Row("at", "", "AT", "at", overrides=("attack.start=uniform",))

_PLUGGED = {
    "at": (_AT._replace(elsewhere=(
        _of_robal(C10, "62.33", "29.30", "28.15"), _of_robal(C100, "48.96", "17.26", "16.26"),
        _noted("58.25", "27.28"), _of_taet("69.00", "25.69", "24.28", _TAET))),
        ("robustlt_at", _noted("61.59", "28.97"))),
    "at_bsl": (
        Row(
            "at_bsl", "", "AT-BSL", "at_bsl",
            elsewhere=(_rerun(C10, "ResNet-18", "68.17", "36.93", "33.04"),
                       _rerun(C100, "WideResNet-34-10", "49.83", "19.99", "18.14"),
                       _of_taet("72.74", "26.86", "25.26", _TAET)),
        ),
        ("robustlt_at_bsl", _noted("77.61", "42.11", "37.49")._replace(data=f"{C10}, AutoAugment")),
    ),
    "awp": (Row("at_awp", "", "AT-AWP", "at_awp", elsewhere=(
        _noted("59.66", "28.50"), _balanced("WideResNet-34-10", "—", "—", "53.97"),
        _balanced("PreActResNet-18", "81.65", "54.30", "—")._replace(
            checkpoint="last", source="first-hand: the code's log"))),
        ("robustlt_awp", _noted("65.22", "29.11"))),
    "robal": (Row("robal_n", "", "RoBal-N", "robal_n", elsewhere=(
        _of_robal(C10, "75.52", "33.50", "31.72"), _of_robal(C100, "51.63", "19.01", "18.16"),
        _noted("72.73", "32.29", "28.92"), _of_taet("73.18", "27.12", "24.13", _TAET))),
        ("robustlt_robal", _noted("74.63", "36.08", "31.03"))),
    "reat": (Row("reat", "", "REAT", "reat", elsewhere=(_of_taet("74.56", "24.02", "22.69", _TAET),)),
             ("robustlt_reat", None)),
    "taet": (Row("taet", "", "TAET", "taet", elsewhere=(_of_taet("76.22", "30.12", "27.31", _TAET),)),
             ("robustlt_taet", None)),
}  # fmt: skip


def _pair(name: str) -> tuple[Row, Row]:
    """Returns the row of a method, and that of RobustLT on it."""
    alone, (config, figures) = _PLUGGED[name]
    label = f"RobustLT on {alone.label}"
    row = Row(config, "", label, config, elsewhere=(figures,) if figures else ())
    return alone, row if figures else row._replace(unpublished=_UNREAD)


_TABLE_FOLLOWUPS = (
    Row("at_balanced", "", "AT, balanced training set", "at",
        overrides=("data.ratio=1.0", "attack.start=uniform"), unpublished="a reference of ours"),
    *_pair("at"),
    *_pair("awp"),
    Row("n_fgsm", "", "N-FGSM", "n_fgsm", overrides=("attack.steps=1",), elsewhere=(
        _balanced("PreActResNet-18, 30 epochs", "—", "—", "44.21 ± 0.47")._replace(source="second-hand"),)),
    Row("gradalign", "", "GradAlign", "gradalign", overrides=("attack.steps=1",), unpublished=_UNREAD),
    Row("trades", "", "TRADES", "trades", elsewhere=(
        _of_robal(C10, "54.29", "30.20", "28.94"), _of_robal(C100, "43.71", "21.13", "18.68"))),
    Row("trades_awp", "", "TRADES-AWP", "trades_awp", elsewhere=(
        _balanced("WideResNet-34-10", "85.36", "—", "56.17"),
        _balanced("WideResNet-34-10", "—", "—", "28.80", "CIFAR-100, balanced"))),
    Row("cfa", "", "CFA", "cfa", unpublished=_UNREAD),
    Row("dafa", "", "DAFA", "dafa", unpublished=_UNREAD),
    Row("trades_bsl", "", "TRADES with balanced softmax", "trades_bsl", unpublished=_OURS),
    *_pair("robal"),
    *_pair("at_bsl"),
    _AUGMENTED["ra"][0],
    _AUGMENTED["aua"][0],
    Row("self_distilled", "", "Self-distillation", "self_distilled", teacher="balanced_teacher",
        unpublished=_UNREAD),
    *_pair("reat"),
    Row("reat_pair", "", "REAT, TAIL by pairs", "reat", overrides=("objective.tail_divergence=pair",),
        unpublished=_OURS),
    *_pair("taet"),
    Row("taet_adv", "", "TAET, adversarial stage 1", "taet", overrides=("attack.first_epoch=1",),
        unpublished=_OURS),
)  # fmt: skip

_TABLE_AUGMENTATION = (
    *(row for name in ("at", "awp", "robal", "reat", "taet", "at_bsl") for row in _pair(name)),
    *(row for pair in _AUGMENTED.values() for row in pair),
)

WITHOUT_TABLE = (
    Row("trades_generated", "", "TRADES, generated images", "trades_generated", elsewhere=tuple(
        _balanced("WideResNet-28-10", clean, "—", aa, f"{data}, balanced, and generated images")._replace(
            checkpoint="best on 1,024 held-out images", source="first-hand")
        for data, clean, aa in (("CIFAR-10", "92.44", "67.31"), ("CIFAR-100", "72.58", "38.83"))
    )),
)  # fmt: skip
"""Methods that no table trains, with their published figures."""

_ONE_PROTOCOL = (
    "All rows have one protocol. On CIFAR: ResNet-18, ε = 8/255, ten steps in the attacks that have more "
    "than one, 100 epochs with drops at 75 and 90 (the teacher, too), batches of 128, crop and flip unless "
    "the row names another augmentation, last checkpoint. On the digits: that of all digits runs, in which "
    "each seed has its own long-tailed subset. Step sizes, starts, losses and batch norm in the attack, "
    "Nesterov's momentum and averaged weights are the methods' own. Augmentations are rows on CIFAR only, "
    "because they would destroy images of 8 x 8 pixels. AA is a choice made for time; "
    "--config.evaluation.autoattack=standard is an override."
)

FOLLOW_UPS: dict[str, Table] = {
    "followups": Table(
        "the methods after RoBal",
        ("clean", "pgd_20", "robal_aa"),
        "AT",
        _TABLE_FOLLOWUPS,
        f"{_ONE_PROTOCOL} TRADES with generated images is not a row, because it needs a file of these "
        "images: see `configs/trades_generated.py`. As released, the loss of CFA is about a seventh of "
        "TRADES', so that its learning rate is not comparable. The balanced training set has as many images "
        "of each class as the largest class has.",
        _PROTOCOL,
        follow_up=True,
    ),
    "augmentation": Table(
        "RobustLT as a plug-in, and augmentation",
        ("clean", "pgd_20", "robal_aa"),
        "AT",
        _TABLE_AUGMENTATION,
        f"{_ONE_PROTOCOL} Every second row is RobustLT on the row above it.",
        _PROTOCOL,
        follow_up=True,
    ),
}
