"""The table of a small network on CIFAR-10-LT.

Its protocol, and what came out, are in ``experiments/results/cifar10_lt_small.md``.
"""

from experiments.paper.followups import RANDAUGMENT
from experiments.paper.rows import Elsewhere, Further, Row, Table

_PROTOCOL = (
    "model.name=resnet20", "threat.epsilon=8/255", "attack.steps=5", "optimizer.weight_decay=2e-4",
    "schedule.name=paper", "schedule.milestones=30,37", "train.epochs=40", "train.batch_size=64",
    "train.augmentation=crop_flip", "train.held_out=0.05", "train.evaluate_epochs=2",
    "train.checkpoint_epochs=1", "evaluation.step_size=2/255",
)  # fmt: skip
"""40 epochs with drops at 30 and 37: half of the paper's length. The other fields are the paper's."""

_AVERAGED = ("average.name=ema", "evaluation.weights=average")

_BUDGETS = ("threat.budget.name=by_frequency", "threat.ramp=0.8")


def _balanced(network: str, clean: str, pgd: str, aa: str, source: str) -> Elsewhere:
    attack = "—" if aa == "—" else "100 iterations"
    return Elsewhere("CIFAR-10, balanced", network, clean, pgd, aa, attack, "8/255", "—", source)


_ROWS = (
    Row("at", "", "AT", "at", seeds=2),
    Row("robal_n", "", "RoBal-N", "robal_n", seeds=2),
    Row("la", "", "LA", "la"),
    Row("at_bsl_ra", "", "AT-BSL, RandAugment", "at_bsl", overrides=(RANDAUGMENT,)),
    Row("robustlt_at_bsl_ra", "", "RobustLT on AT-BSL, RandAugment", "robustlt_at_bsl",
        overrides=(RANDAUGMENT,)),
    Row("robal_n_ema_budgets", "", "RoBal-N, EMA, budgets", "robal_n", overrides=(*_AVERAGED, *_BUDGETS)),
    Row("robal_r", "", "RoBal-R", "robal_r", overrides=("evaluation.logit_scale=10",)),
    Row("trades", "", "TRADES", "trades", overrides=("attack.steps=10",)),
    Row("plain", "", "Plain", "plain"),
    Row("n_fgsm_balanced", "", "N-FGSM, balanced training set", "n_fgsm",
        overrides=("data.ratio=1.0", "attack.steps=1"), elsewhere=(
            _balanced("ResNet-20; AT, 110 epochs", "74.38", "45.43 (PGD-10)", "—",
                      "second-hand: EhanW/AdversarialTraining"),
            _balanced("ResNet-20; Jang et al., ICCV 2019", "78.91", "—", "34.95",
                      "second-hand: measured by RobustBench"))),
)  # fmt: skip

_PART, _STANDARD = "evaluation.examples=1000", "evaluation.autoattack=standard"

FURTHER = (
    Further("autoattack", (_PART, _STANDARD, "evaluation.audit.examples=200"), transfer=("at", "robal_n")),
    Further("torchattacks", (_PART, "evaluation.autoattack=torchattacks")),
    Further("best", (_PART, "train.select=best")),
)
"""On 1,000 test images: AutoAttack with the audit; with 10 iterations; the pair on the best checkpoint."""

COMPARED = (
    ("robal_n", "la"), ("robal_n", "at_bsl_ra"), ("robustlt_at_bsl_ra", "at_bsl_ra"),
    ("robal_n_ema_budgets", "robal_n"), ("robal_r", "robal_n"),
)  # fmt: skip
"""Pairs of rows that are compared besides each with AT; not named before the runs."""

SMALL = {
    "small": Table(
        "AT, RoBal and later methods under one protocol",
        ("clean", "fgsm", "pgd_20", "mim_20", "cw_20", "robal_aa"),
        "AT",
        tuple(row._replace(data=("cifar10_lt",), seeds=row.seeds or 1) for row in _ROWS),
        protocol={"cifar10_lt": _PROTOCOL},
        further=FURTHER,
    ),
}
