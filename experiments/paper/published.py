"""The tables of the RoBal paper (Wu et al., CVPR 2021) as data: rows, the config of each, published figures.

A row is a config with overrides. ``plan`` lists the runs of a table, ``table`` makes the table.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from robal_jax.errors import InputError

DATA_SETS = {"digits_lt": "digits_lt", "cifar10_lt": "CIFAR-10-LT", "cifar100_lt": "CIFAR-100-LT"}

CIFAR = ("cifar10_lt", "cifar100_lt")

CHOSEN_BY = "pgd_20"  # the condition that decides between the settings of a row

FAKE_GAINS = ("cdt_post", "tau_norm")  # rows whose gain under PGD the paper itself calls fake


class Elsewhere(NamedTuple):
    """Figures of a method that were published with a protocol of their own; a dash is not known.

    Attributes:
      data: data set and imbalance ratio.
      network: its name.
      clean: accuracy in percent, as printed.
      pgd: under PGD-20.
      aa: under AutoAttack, as far as ``attack`` says.
      attack: which AutoAttack: its iterations, or its attacks.
      epsilon: radius.
      checkpoint: how it was chosen.
      source: first-hand, the authors' own; or second-hand, and whose.
    """

    data: str
    network: str
    clean: str
    pgd: str
    aa: str
    attack: str
    epsilon: str
    checkpoint: str
    source: str


class Row(NamedTuple):
    """A row of a table.

    Attributes:
      key: its name on the command line.
      stage: heading of the rows that belong together.
      label: its name in the paper.
      config: name of the config file.
      cifar10: published figures on CIFAR-10-LT, in the order of the table's columns.
      cifar100: the same on CIFAR-100-LT.
      overrides: its changes to the config, such as ``loss.margin=0.2``.
      settings: overrides to try in the evaluation, '' for none; the best by ``CHOSEN_BY`` is shown.
      start: a config whose run of the same seed is fine-tuned; '' for none.
      baseline: key of the row to compare with.
      data: data sets that have this row.
      teacher: a config whose run of the same seed teaches; '' for none.
      elsewhere: figures that were published with other protocols.
      unpublished: why there are none; '' if there are, and in the tables of the paper.
    """

    key: str
    stage: str
    label: str
    config: str
    cifar10: tuple[float, ...] = ()
    cifar100: tuple[float, ...] = ()
    overrides: tuple[str, ...] = ()
    settings: tuple[str, ...] = ("",)
    start: str = ""
    baseline: str = "at"
    data: tuple[str, ...] = tuple(DATA_SETS)
    teacher: str = ""
    elsewhere: tuple["Elsewhere", ...] = ()
    unpublished: str = ""


class Table(NamedTuple):
    """A table of the paper.

    Attributes:
      title: what it shows.
      columns: published conditions; our 'worst' is added to them.
      baseline: name of the row that others are compared with.
      rows: all rows.
      note: a remark for the reader.
      protocol: overrides of all rows, by data set.
      follow_up: whether the table is of the methods after the paper: rows are compared with the row above,
        and figures of other protocols and costs are shown.
    """

    title: str
    columns: tuple[str, ...]
    baseline: str
    rows: tuple[Row, ...]
    note: str = ""
    protocol: Mapping[str, tuple[str, ...]] = {}
    follow_up: bool = False


_TABLE_1 = (
    Row("at", "train", "Vanilla FC", "at", (62.33, 29.30, 28.15)),
    Row("cos", "train", "Vanilla Cos", "cos", (56.59, 29.38, 27.23)),
    Row("ldam", "train", "Class-aware margin (LDAM)", "ldam", (63.24, 29.81, 28.70)),
    Row("he", "train", "Cosine with margin (HE)", "he", (58.47, 31.73, 28.45)),
    Row("cdt", "train", "Class-aware temperature (CDT)", "cdt", (73.11, 30.12, 28.62)),
    Row("la", "train", "Class-aware bias (logit adjustment)", "la", (74.46, 32.45, 30.55)),
    Row("focal", "train", "Hard-example mining (focal)", "focal", (62.07, 30.73, 28.12)),
    Row("rs", "train", "Re-sampling", "rs", (58.62, 25.06, 24.25)),
    Row("rw", "train", "Re-weighting (CB-focal)", "rw", (64.33, 34.53, 29.01)),
    Row("one_epoch_rs", "fine-tune", "One-epoch RS", "one_epoch_rs", (70.88, 29.81, 28.59), start="at"),
    Row("one_epoch_rw", "fine-tune", "One-epoch RW", "one_epoch_rw", (71.72, 32.34, 28.25), start="at"),
    Row("lws", "fine-tune", "Learnable classifier scale (LWS)", "lws", (69.63, 28.81, 27.99), start="at"),
    Row("cdt_post", "inference", "Classifier re-scaling (CDT-post)", "cdt_post", (73.84, 39.05, 28.23)),
    Row("tau_norm", "inference", "Classifier normalisation (τ-norm)", "tau_norm", (72.70, 36.57, 29.77)),
    Row("la_post", "inference", "Class-aware bias (LA-post)", "la_post", (74.25, 31.95, 30.45)),
    Row("tde", "inference", "Feature disentangling (TDE)", "tde", (71.16, 32.69, 30.48)),
)

_FIGURES_2 = {
    "plain": ((77.16, 7.01, 0.00, 0.00, 0.00, 0.00), (62.29, 3.94, 0.00, 0.00, 0.00, 0.00)),
    "at": ((62.33, 33.57, 29.30, 30.02, 30.31, 28.15), (48.96, 21.06, 17.26, 17.80, 17.65, 16.26)),
    "trades": ((54.29, 32.80, 30.20, 30.53, 29.58, 28.94), (43.71, 23.06, 21.13, 21.42, 19.49, 18.68)),
    "he": ((58.47, 35.17, 31.73, 32.26, 29.96, 28.45), (48.63, 23.06, 19.56, 20.28, 19.20, 17.60)),
    "mma": ((61.51, 36.40, 29.29, 30.38, 29.59, 25.91), (54.98, 19.65, 13.52, 13.98, 12.35, 14.54)),
    "avmixup": ((66.97, 33.90, 28.40, 29.67, 26.43, 24.39), (52.45, 23.28, 19.04, 20.78, 14.82, 12.60)),
    "robal_n": ((75.52, 40.04, 33.50, 34.57, 33.68, 31.72), (51.63, 22.81, 19.01, 19.50, 19.42, 18.16)),
    "robal_r": ((74.51, 40.55, 33.87, 34.92, 34.12, 32.04), (50.38, 23.59, 19.48, 20.13, 20.16, 18.69)),
}

_LABELS_2 = ("Plain", "AT", "TRADES", "HE", "MMA", "AVmixup", "RoBal-N", "RoBal-R")

_TABLE_2 = tuple(
    Row(key, "", label, key, *figures)
    for (key, figures), label in zip(_FIGURES_2.items(), _LABELS_2, strict=True)
)

_TAU_P = tuple(f"evaluation.tau_p={tau}" for tau in ("0", "0.5", "1", "1.5", "2"))


def _ablation(
    key: str, stage: str, label: str, m: float, tau_m: float, tau_b: float, *cifar10: tuple[float, float]
) -> Iterator[Row]:
    """Yields a training of table 3 and, if it has two pairs of figures, its best prior adjustment."""
    loss = (f"loss.margin={m}", f"loss.tau_m={tau_m}", f"loss.tau_b={tau_b}")
    yield Row(key, stage, label, "robal_n", cifar10[0], (), (*loss, _TAU_P[0]), baseline="margin_0")
    if cifar10[1:]:
        best = f"{label}, best τ_p"
        yield Row(f"{key}_best", stage, best, "robal_n", cifar10[1], (), loss, _TAU_P, baseline="margin_0")


_TABLE_3 = (
    *_ablation("margin_0", "τ_b = τ_m = 0", "m₀ = 0", 0.0, 0.0, 0.0, (63.51, 28.47), (75.98, 30.46)),
    *_ablation("margin_0.1", "τ_b = τ_m = 0", "m₀ = 0.1", 0.1, 0.0, 0.0, (63.17, 29.13), (75.51, 31.24)),
    *_ablation("margin_0.2", "τ_b = τ_m = 0", "m₀ = 0.2", 0.2, 0.0, 0.0, (60.60, 29.04), (74.83, 32.04)),
    *_ablation("margin_0.3", "τ_b = τ_m = 0", "m₀ = 0.3", 0.3, 0.0, 0.0, (56.59, 28.63), (71.31, 31.28)),
    *_ablation("bias_0.5", "m₀ = 0.1, τ_m = 0", "τ_b = 0.5", 0.1, 0.0, 0.5, (68.58, 30.55), (75.77, 30.94)),
    *_ablation("bias_1", "m₀ = 0.1, τ_m = 0", "τ_b = 1", 0.1, 0.0, 1.0, (73.93, 31.52), (75.42, 31.61)),
    *_ablation("bias_1.5", "m₀ = 0.1, τ_m = 0", "τ_b = 1.5", 0.1, 0.0, 1.5, (74.67, 30.95), (74.67, 30.95)),
    *_ablation("tau_m_-0.3", "m₀ = 0.1, τ_b − τ_m = 1.2", "τ_m = −0.3", 0.1, -0.3, 0.9, (74.88, 30.66)),
    *_ablation("tau_m_0", "m₀ = 0.1, τ_b − τ_m = 1.2", "τ_m = 0", 0.1, 0.0, 1.2, (75.08, 31.79)),
    *_ablation("tau_m_0.3", "m₀ = 0.1, τ_b − τ_m = 1.2", "τ_m = 0.3", 0.1, 0.3, 1.5, (74.51, 32.04)),
    *_ablation("tau_m_0.6", "m₀ = 0.1, τ_b − τ_m = 1.2", "τ_m = 0.6", 0.1, 0.6, 1.8, (71.84, 31.41)),
)


def _at_ratio(ir: int, label: str, config: str, *cifar10: float) -> Row:
    # With 104 digits in the head class, IR 100 would leave two classes with one image; IR 5 replaces it.
    data: tuple[str, ...] = {100: CIFAR, 5: ("digits_lt",)}.get(ir, tuple(DATA_SETS))
    ratio = (f"data.ratio={1 / ir:g}",)
    row = Row(f"{config}_{ir}", f"IR {ir}", label, config, cifar10, overrides=ratio, data=data)
    return row._replace(baseline=f"at_{ir}")


_TABLE_4 = (
    _at_ratio(100, "AT", "at", 56.72, 27.27, 27.87, 27.80, 25.97),
    _at_ratio(100, "TRADES", "trades", 45.67, 26.97, 27.29, 26.53, 25.93),
    _at_ratio(100, "RoBal", "robal_n", 68.07, 30.35, 31.25, 30.55, 28.97),
    _at_ratio(50, "AT", "at", 62.33, 29.30, 29.72, 30.31, 28.15),
    _at_ratio(50, "TRADES", "trades", 54.29, 30.20, 30.53, 29.58, 28.94),
    _at_ratio(50, "RoBal", "robal_n", 73.93, 34.24, 35.37, 34.58, 32.70),
    _at_ratio(20, "AT", "at", 74.09, 33.59, 34.65, 34.27, 32.02),
    _at_ratio(20, "TRADES", "trades", 65.17, 34.65, 35.29, 34.07, 33.06),
    _at_ratio(20, "RoBal", "robal_n", 78.49, 39.17, 40.44, 39.38, 37.58),
    _at_ratio(10, "AT", "at", 79.45, 37.11, 37.93, 38.31, 35.51),
    _at_ratio(10, "TRADES", "trades", 72.92, 39.15, 39.95, 38.41, 37.33),
    _at_ratio(10, "RoBal", "robal_n", 81.20, 40.22, 41.75, 40.91, 38.90),
    _at_ratio(5, "AT", "at"),
    _at_ratio(5, "TRADES", "trades"),
    _at_ratio(5, "RoBal", "robal_n"),
)

_TABLE_S6 = (
    Row("at", "", "Cross entropy (AT)", "at"),
    *(
        Row(f"{config}_{place}", label, place, file, overrides=overrides)
        for label, config, loss in (
            ("Class-aware margin (LDAM)", "ldam", "ldam"),
            ("Class-aware temperature (CDT)", "cdt", "class_temperature"),
            ("Class-aware bias (logit adjustment)", "la", "logit_adjustment"),
            ("Hard-example mining (focal)", "focal", "focal"),
            ("Re-weighting (CB-focal)", "rw", "class_balanced_focal"),
        )
        for place, file, overrides in (
            ("inside", "at", (f"attack.loss.name={loss}",)),
            ("outside", config, ()),
            ("both", config, (f"attack.loss.name={loss}",)),
        )
    ),
)

_TABLE_S7 = (
    Row("at", "", "None (AT)", "at"),
    Row("kl", "", "Divergence of predictions (KL)", "alp", overrides=("objective.regulariser=kl",)),
    Row("alp", "", "Distance of probabilities (ALP)", "alp"),
    Row("alp_logits", "", "Distance of logits", "alp", overrides=("objective.regulariser=alp_logits",)),
    Row("norm", "", "Norm of natural logits", "alp", overrides=("objective.regulariser=norm",)),
    Row("mart", "", "MART", "mart"),
)

TABLES: dict[str, Table] = {
    "1": Table("long-tail methods with AT", ("clean", "pgd_20", "robal_aa"), "Vanilla FC", _TABLE_1),
    "2": Table(
        "methods of adversarial training",
        ("clean", "fgsm", "pgd_20", "mim_20", "cw_20", "robal_aa"),
        "AT",
        _TABLE_2,
        "HE and, on CIFAR-10-LT, RoBal-R are attacked on unscaled cosines, as released, where gradient "
        "attacks are weaker: also use `--config.evaluation.logit_scale=10`. The paper does not state the "
        "settings of MMA.",
    ),
    "3": Table(
        "ablation of RoBal",
        ("clean", "robal_aa"),
        "m₀ = 0, τ_p = 0",
        _TABLE_3,
        "τ_p is 0 unless the row says 'best'. Best τ_p: of 0, 0.5, 1, 1.5 and 2, that with the highest mean "
        "PGD-20 accuracy on the test set. This is a choice on the test set, as in the paper, so its gain is "
        "optimistic.",
    ),
    "4": Table(
        "imbalance ratios",
        ("clean", "pgd_20", "mim_20", "cw_20", "robal_aa"),
        "AT at the same IR",
        _TABLE_4,
        "The paper calls this row RoBal and does not state its exact setting; here it is RoBal-N.",
    ),
    "S6": Table(
        "a long-tail loss inside the attack, outside it, or both",
        ("clean", "pgd_20"),
        "cross entropy in both places",
        _TABLE_S6,
        "The paper's figures of this table were not available to us.",
    ),
    "S7": Table(
        "regularisers",
        ("clean", "pgd_20"),
        "AT",
        _TABLE_S7,
        "Neither rows nor figures of the paper's table were available to us. The composition is ours: the "
        "regularisers of the released code, on a linear head with the weights of `configs/alp.py`, and MART.",
    ),
}


# ---------------------------------------------------------------- after the paper

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


_AUGMENTED = {
    "ra": _augmented("ra", "RandAugment", "train.augmentation=randaugment,crop_flip", [
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

TABLES |= {
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


def rows_of(name: str, data: str, keys: Sequence[str] = ()) -> tuple[Row, ...]:
    """Returns the rows of a table that a data set has, or the named ones among them.

    Raises:
      InputError: no such table or row.
    """
    if name not in TABLES:
        raise InputError(f"unknown table {name!r}; use one of {', '.join(TABLES)}")
    rows = {row.key: row for row in TABLES[name].rows if data in row.data}
    unknown = [key for key in keys if key not in rows]
    if unknown:
        raise InputError(f"table {name} on {data} has no row {unknown[0]!r}; use one of {', '.join(rows)}")
    return tuple(row for row in rows.values() if not keys or row.key in keys)


def published(table: Table, row: Row, data: str) -> dict[str, float]:
    """Returns a row's published figures on a data set by condition, in percent."""
    figures = {"cifar10_lt": row.cifar10, "cifar100_lt": row.cifar100}.get(data)
    return dict(zip(table.columns, figures, strict=True)) if figures else {}
