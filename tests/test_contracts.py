"""What a user's own part takes and returns is checked before training, in the contract's words."""

import functools

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT
from ml_collections import ConfigDict

from robal_jax import builder, classifiers, cli, losses, models, objectives
from robal_jax.errors import InputError
from robal_jax.objectives import Batch, Outcome, plain


def config(section=None, name=None, **options):
    """AT on the digits, with a section that names something of this file."""
    config = cli.load_config(f"{ROOT}/configs/at.py:digits_lt")
    with config.unlocked():
        config.model.channels, config.model.width, config.attack.steps = (4, 4, 4), 8, 1
        if section == "attack.loss":
            config.attack.loss = ConfigDict({"name": f"test_contracts:{name}", **options})
        elif section is not None:
            config[section] = ConfigDict({"name": f"test_contracts:{name}", **options})
    return config


def refused(message, *arguments, **options):
    return helpers.refused(message, lambda: builder.training(config(*arguments, **options)))


# ---------------------------------------------------------------- losses


def of_the_epoch(logits, labels, epoch):
    return losses.cross_entropy(logits, labels) * epoch


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mean_of_three", "of_the_epoch"])
def test_label_smoothing_reaches_any_loss_of_the_objective_and_not_the_attack_s(name, monkeypatch):
    seen = {}

    def objective(model, params, stats, batch, *, attack, loss):
        logits = model[0]
        seen.update(found=loss(logits, batch.labels), attack=attack.keywords["loss"])

    monkeypatch.setitem(objectives.OBJECTIVES, "seeing", objective)
    made = config("loss", name)
    made.train.label_smoothing, made.objective = 0.25, ConfigDict({"name": "seeing"})
    logits, labels = jnp.asarray(np.random.RandomState(0).randn(6, 10)), jnp.arange(6)
    batch = Batch(None, labels, None, jnp.int32(3))
    builder.objective(made, np.arange(10, 0, -1))((logits,), None, None, batch)
    own = {"mean_of_three": mean_of_three, "of_the_epoch": functools.partial(of_the_epoch, epoch=3)}[name]
    every = np.mean([own(logits, jnp.full(6, k)) for k in range(10)], axis=0)
    np.testing.assert_allclose(seen["found"], 0.75 * own(logits, labels) + 0.25 * every, rtol=1e-5)
    np.testing.assert_array_equal(seen["attack"](logits, labels), losses.cross_entropy(logits, labels))


def mean_of_three(logits, labels):
    return losses.focal(logits, labels) / 3


@pytest.mark.parametrize("objective", ["mart", "avmixup"])
def test_label_smoothing_of_an_objective_with_a_loss_of_its_own_is_refused(objective):
    made = config()
    made.train.label_smoothing, made.objective = 0.1, ConfigDict({"name": objective})
    message = f"objective '{objective}' has a loss of its own and would ignore config.train.label_smoothing "
    with pytest.raises(InputError, match=f"{message}0.1; set it to 0"):
        builder.check(made)


@pytest.mark.parametrize("smoothing", [1.0, -0.1, float("nan")])
def test_label_smoothing_out_of_range_is_refused(smoothing):
    made = config()
    made.train.label_smoothing = smoothing
    with pytest.raises(InputError, match=r"config.train.label_smoothing is .*; it must be in \[0, 1\)"):
        builder.check(made)


def mean(logits, labels):
    return losses.cross_entropy(logits, labels).mean()


def summed(logits, labels):
    return losses.cross_entropy(logits, labels).sum()


def column(logits, labels):
    return losses.cross_entropy(logits, labels)[:, None]


def per_class(logits, labels):
    return losses.binary_cross_entropy(logits, labels)[:, None] * jnp.ones_like(logits)


def of_classes(logits, labels):
    return logits.mean(0)


def row(logits, labels):
    return losses.cross_entropy(logits, labels)[None]


def integers(logits, labels):
    return jnp.argmax(logits, -1) - labels


def booleans(logits, labels):
    return jnp.argmax(logits, -1) == labels


def none(logits, labels):
    losses.cross_entropy(logits, labels)


def pair(logits, labels):
    return losses.cross_entropy(logits, labels), logits


def number(logits, labels):
    return 1.0


def words(logits, labels):
    return "a loss"


def on_the_host(logits, labels):
    return np.log(np.asarray(logits)).mean(-1)


def only_logits(logits):
    return logits.mean(-1)


def needs_a_scale(logits, labels, scale):
    return scale * losses.cross_entropy(logits, labels)


def needs_late(logits, labels, *, epochs):
    return losses.cross_entropy(logits, labels)


def changes_the_counts(logits, labels, *, class_counts):
    class_counts[:] = 1
    return losses.cross_entropy(logits, labels)


def indexes_with_labels(logits, labels, *, class_counts):
    return losses.cross_entropy(logits, labels) / class_counts[labels]


def wrong_shape(logits, labels):
    return logits @ labels


RETURNS = {
    "mean": r"float32\[\]",
    "summed": r"float32\[\]",
    "column": r"float32\[11, 1\]",
    "per_class": r"float32\[11, 10\]",
    "of_classes": r"float32\[10\]",
    "row": r"float32\[1, 11\]",
    "integers": r"int32\[11\]",
    "booleans": r"bool\[11\]",
    "none": "None",
    "pair": r"a tuple \(float32\[11\], float32\[11, 10\]\)",
    "number": r"float32\[\]",
}


@pytest.mark.parametrize("section", ["loss", "attack.loss"])
@pytest.mark.parametrize("name", RETURNS)
def test_a_loss_returns_one_float_per_example(section, name):
    refused(
        f"loss 'test_contracts:{name}' returns {RETURNS[name]} for logits .11, 10. and labels .11.; "
        r"it must take \(logits \[B, K\], labels \[B\]\) and return one float per example, \[B\]",
        section,
        name,
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("words", "fails with TypeError"),
        (
            "on_the_host",
            r"needs the values .*; write it with jax\.numpy, not numpy, .*\(.*test_contracts.py:\d+\)",
        ),
        ("wrong_shape", r"fails with TypeError: dot_general.*\(.*test_contracts.py:\d+\)"),
        ("only_logits", r"is a function of \(logits\); it must take \(logits \[B, K\], labels \[B\]\)"),
        ("needs_a_scale", "needs 'scale'; set it in the config file"),
        (
            "needs_late",
            r"needs 'epochs'; set it .*, or use what is passed \(class_counts, .*epoch, .*it must",
        ),
        ("changes_the_counts", "fails with ValueError: assignment destination is read-only"),
        ("indexes_with_labels", r"needs the values .* arrays that it only indexes \(jnp.asarray\)"),
        ("ANSWER", "is a int, not a function"),
        ("nothing", "cannot import the loss"),
    ],
)
def test_a_loss_that_cannot_be_called(name, message):
    refused(f"loss 'test_contracts:{name}' {message}|{message} 'test_contracts:{name}'", "loss", name)


def test_a_value_that_training_passes_is_not_set_by_the_config():
    with pytest.raises(InputError, match="'test_contracts:of_the_epoch' takes no 'epoch'; leave it out"):
        builder.training(config("loss", "of_the_epoch", epoch=5))


ANSWER = 42


def wrong_or_right(logits, labels):
    return (jnp.argmax(logits, -1) != labels).astype(float)


def stopped(logits, labels):
    return losses.cross_entropy(jax.lax.stop_gradient(logits), labels)


def constant(logits, labels):
    return jnp.ones(len(labels))


def nothing_of_it(logits, labels):
    return 0 * losses.cross_entropy(logits, labels)


def rounded(logits, labels):
    return losses.cross_entropy(jnp.round(logits), labels)


def not_a_number(logits, labels):
    return jnp.sqrt(-1 - jnp.square(logits)).sum(-1)


def angles(logits, labels):
    """Has a gradient for cosines only."""
    return jnp.arccos(logits).sum(-1)


def logarithms(logits, labels):
    """Has a gradient for positive logits only."""
    return -jnp.log(logits).sum(-1)


def late(logits, labels, *, epoch):
    return (epoch > 100) * losses.cross_entropy(logits, labels)


@pytest.mark.parametrize("section", ["loss", "attack.loss"])
@pytest.mark.parametrize(
    "name", ["wrong_or_right", "stopped", "constant", "nothing_of_it", "rounded", "not_a_number"]
)
def test_a_loss_without_a_gradient(section, name):
    refused(
        f"loss 'test_contracts:{name}' has a gradient of 0 or NaN .*; make it differentiable", section, name
    )


@pytest.mark.parametrize("name", ["angles", "logarithms", "late"])
def test_a_loss_with_a_gradient_somewhere(name):
    builder.training(config("loss", name))


@pytest.mark.parametrize("change", [jnp.round, jnp.sign, jax.lax.stop_gradient, lambda x: x > 0.5])
def test_an_attack_needs_a_gradient(monkeypatch, change):
    class Blind(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(4)(change(x).astype(float).reshape(len(x), -1))

    monkeypatch.setitem(globals(), "Blind", Blind)
    message = "model 'test_contracts:Blind' .* gradient of 0 with respect to the images, so that no attack"
    refused(message, "model", "Blind")
    without = config("model", "Blind")
    with without.unlocked():
        without.objective.name = "plain"
    builder.training(without)


def test_a_wrapped_loss_is_checked_too():
    message = r"loss 'test_contracts:column' returns float32\[11, 1\]"
    with pytest.raises(InputError, match=message):
        changed = config()
        with changed.unlocked():
            changed.loss = ConfigDict(
                {"name": "deferred", "base": {"name": "test_contracts:column"}, "reweight": False}
            )
        builder.training(changed)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32, jnp.bfloat16])
def test_any_float_is_a_loss(monkeypatch, dtype):
    monkeypatch.setitem(globals(), "typed", lambda z, y: losses.cross_entropy(z, y).astype(dtype))
    builder.training(config("loss", "typed"))


def with_all(logits, labels, *, power, class_counts, threat, axis_name, epoch):
    mean = jax.lax.pmean(losses.cross_entropy(logits, labels).mean(), axis_name)
    return losses.cross_entropy(logits, labels) * power * epoch + threat.epsilon + mean + class_counts.min()


def test_a_loss_that_takes_all_that_is_given():
    builder.training(config("loss", "with_all", power=0.5))


# ---------------------------------------------------------------- backbones


class Good(nn.Module):
    """As the contract wants it; the others differ in one way each."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, train):
        return self.head(nn.Dense(8)(self.norm(self.flat(images), train)), train)

    def flat(self, images):
        return images.reshape(len(images), -1)

    def norm(self, x, train):
        return models.BatchNorm(self.axis_name, name="bn")(x, train)

    def head(self, features, train):
        return features


class FlaxNorm(Good):
    def norm(self, x, train):
        return nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)(x)


class FlaxNormLate(Good):
    def norm(self, x, train):
        return nn.BatchNorm(momentum=0.5)(x, use_running_average=not train)


class OwnRunningMean(Good):
    def norm(self, x, train):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        if train and not self.is_initializing():
            mean.value = 0.9 * mean.value + 0.1 * x.mean(0)
        return x - mean.value[None]


class InABlock(Good):
    def norm(self, x, train):
        return nn.remat(FlaxBlock, static_argnums=(2,))(name="block")(x, train)


class FlaxBlock(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=not train)(x)


class Frozen(Good):
    """Normalises with the running values in training as well, and so keeps them."""

    def norm(self, x, train):
        return nn.BatchNorm(use_running_average=True)(super().norm(x, train))


class Counter(Good):
    """A state of its own name: the newest value is kept."""

    def norm(self, x, train):
        seen = self.variable("batch_stats", "seen", jnp.zeros, ())
        if train and not self.is_initializing():
            seen.value = seen.value + 1.0
        return x


class Constant(Good):
    """Moments that depend on nothing."""

    def norm(self, x, train):
        mean, var = (self.variable("batch_stats", name, jnp.zeros, ()) for name in ("mean", "var"))
        if train and not self.is_initializing():
            mean.value = var.value = jnp.ones(())
        return x


class IntegerCounter(Counter):
    def norm(self, x, train):
        seen = self.variable("batch_stats", "seen", lambda: jnp.zeros((), int))
        if train and not self.is_initializing():
            seen.value = seen.value + 1
        return x


class OfTheBatch(Good):
    def norm(self, x, train):
        last = self.variable("batch_stats", "last", jnp.zeros, ())
        if train and not self.is_initializing():
            last.value = x
        return x


class Late(Good):
    def norm(self, x, train):
        return super().norm(x, train) if train else x


class Elsewhere(Good):
    def norm(self, x, train):
        self.variable("cache", "mean", jnp.zeros, ())
        return x


class Dropout(Good):
    def head(self, features, train):
        return nn.Dropout(0.5, deterministic=not train)(features)


class AlwaysDropout(Good):
    def head(self, features, train):
        return nn.Dropout(0.5, deterministic=False)(features)


class Maps(Good):
    def flat(self, images):
        return images


class Pooled(Good):
    def head(self, features, train):
        return features.mean(-1)


class Pair(Good):
    def head(self, features, train):
        return features, {"aux": features}


class InTraining(Good):
    def head(self, features, train):
        return (features, features) if train else features


class Nothing(Good):
    def head(self, features, train):
        return None


class Integers(Good):
    def head(self, features, train):
        return jnp.round(features).astype(int)


class HalfABatch(Good):
    def head(self, features, train):
        return features[: len(features) // 2]


class WithoutTrain(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(8)(images.reshape(len(images), -1))


class KeywordTrain(nn.Module):
    @nn.compact
    def __call__(self, images, *, train):
        return nn.Dense(8)(images.reshape(len(images), -1))


class FixedBatch(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(8)(images.reshape(64, -1))


class NeedsWidth(nn.Module):
    width: int

    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(self.width)(images.reshape(len(images), -1))


def a_function():
    return lambda images, train: images.reshape(len(images), -1)


RUNNING = "stores a running value in '.*mean', .*use robal_jax.models.BatchNorm in place of flax's"
FEATURES = r"; it must be a flax.linen module without dropout, from \(images .* to floats \[B, D\]"
BACKBONES = {
    "FlaxNorm": RUNNING,
    "FlaxNormLate": RUNNING,
    "OwnRunningMean": RUNNING,
    "InABlock": RUNNING,
    "IntegerCounter": r"leaves 'seen' as int32\[\], not floats \[\] in 'batch_stats'",
    "OfTheBatch": r"leaves 'last' as float32\[64, 64\], not floats \[\] in 'batch_stats'",
    "Late": "fails with ScopeParamNotFoundError",
    "Elsewhere": "has variables in 'cache'; use the collections 'params' and 'batch_stats'",
    "Dropout": rf"fails with InvalidRngError: .*dropout.*test_contracts.py:\d+\){FEATURES}",
    "AlwaysDropout": "fails with InvalidRngError: .*dropout",
    "Maps": rf"returns float32\[64, 8, 8, 8\] for images \[64, 8, 8, 1\]{FEATURES}",
    "Pooled": rf"returns float32\[64\] for images \[64, 8, 8, 1\]{FEATURES}",
    "Pair": "returns a tuple .*float32.64, 8., a dict",
    "InTraining": "returns a tuple .*float32.64, 8., float32.64, 8.",
    "Nothing": "returns None for images",
    "Integers": r"returns int32\[64, 8\] for images",
    "HalfABatch": r"returns float32\[32, 8\] for images",
    "WithoutTrain": f"fails with TypeError: .*takes 2 positional arguments but 3 were given{FEATURES}",
    "KeywordTrain": f"fails with TypeError: .*{FEATURES}",
    "FixedBatch": "fails with ScopeParamShapeError: .*kernel",
    "NeedsWidth": "needs 'width'; set it in the config file",
    "a_function": f"returns a function{FEATURES}",
}


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_that_breaks_its_contract(name):
    refused(f"model 'test_contracts:{name}' {BACKBONES[name]}", "model", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Good", "Frozen", "Counter", "Constant"])
@pytest.mark.parametrize("head", ["linear", "tde"])
def test_backbones_that_keep_it(name, head):
    changed = config("model", name)
    with changed.unlocked():
        changed.head = {"name": head}
        changed.train.accumulation_steps = 2
    builder.training(changed)


@pytest.mark.slow
def test_flax_s_batch_norm_is_refused_without_a_config_too():
    network = models.functional(models.Network(FlaxNorm(), classifiers.LinearHead(10)))
    images = jnp.zeros((4, 8, 8, 1))
    params, stats = network.init(jax.random.key(0), images)
    network.predict(params, stats, images)
    with pytest.raises(ValueError, match=r"BatchNorm_0 is flax's nn\.BatchNorm, .*use robal_jax\.models"):
        network.train(params, stats, images)
    fixed = models.functional(models.Network(Frozen(), classifiers.LinearHead(10)))
    fixed.train(*fixed.init(jax.random.key(0), images), images)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet18", "test_contracts:OneByOne"])
@pytest.mark.parametrize(("batch", "parts"), [(1, 1), (64, 64)])
def test_one_value_per_channel_is_refused_before_training(model, batch, parts):
    changed = config()
    with changed.unlocked():
        changed.model = {"name": model}
        changed.train.batch_size, changed.train.accumulation_steps = batch, parts
    with pytest.raises(
        InputError, match=f"model '{model}' .*batch norm needs more than one value per channel"
    ):
        builder.training(changed)


class OneByOne(Good):
    def flat(self, images):
        return images.mean((1, 2))


# ---------------------------------------------------------------- heads


class GoodHead(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, features, train):
        return self.last(nn.Dense(self.num_classes)(features))

    def last(self, logits):
        return logits


class OneClassLess(GoodHead):
    def last(self, logits):
        return logits[:, 1:]


class PairHead(GoodHead):
    def last(self, logits):
        return logits, logits


class NormHead(GoodHead):
    def last(self, logits):
        return nn.BatchNorm(use_running_average=False)(logits)


class NeedsTemperature(GoodHead):
    temperature: float = 1.0
    scale: float = None

    def last(self, logits):
        return logits * self.scale


class WithoutClasses(nn.Module):
    @nn.compact
    def __call__(self, features, train):
        return nn.Dense(7)(features)


class RequiredTemperature(nn.Module):
    num_classes: int
    temperature: float

    @nn.compact
    def __call__(self, features, train):
        return nn.Dense(self.num_classes)(features) / self.temperature


LOGITS = r"; it must be a flax.linen module without dropout, from \(features .* to floats \[B, K\]"
HEADS = {
    "OneClassLess": rf"returns float32\[64, 9\] for features \[64, 8\]{LOGITS}",
    "PairHead": "returns a tuple",
    "NormHead": "fails with ModifyScopeVariableError",
    "NeedsTemperature": f"fails with TypeError.*{LOGITS}",
    "WithoutClasses": r"returns float32\[64, 7\]",
    "RequiredTemperature": "needs 'temperature'; set it in the config file",
    "WithoutTrain": "fails with TypeError",
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_breaks_its_contract(name):
    refused(f"head 'test_contracts:{name}' {HEADS[name]}", "head", name)


@pytest.mark.slow
def test_heads_that_keep_it():
    builder.training(config("head", "GoodHead"))
    builder.training(config("head", "RequiredTemperature", temperature=2.0))


@pytest.mark.parametrize(
    ("section", "name", "message"),
    [
        ("model", "WithoutTrain", "model 'test_contracts:WithoutTrain' .*fails with TypeError"),
        ("model", "AlwaysDropout", "fails with InvalidRngError"),
        ("head", "WithoutClasses", r"returns float32\[2, 7\]"),
    ],
)
def test_an_evaluation_refuses_them_too(section, name, message):
    with pytest.raises(InputError, match=message):
        builder.evaluation(config(section, name))


# ---------------------------------------------------------------- objectives


def objective(change):
    def changed(model, params, stats, batch, *, loss):
        return change(*plain(model, params, stats, batch, loss=loss))

    return changed


good = objective(lambda loss, outcome: (loss, outcome))
no_passes = objective(lambda loss, outcome: (loss, Outcome((), {})))
scalar_only = objective(lambda loss, outcome: loss)
no_outcome = objective(lambda loss, outcome: (loss, outcome.moments))
a_plain_tuple = objective(lambda loss, outcome: (loss, tuple(outcome)))
three = objective(lambda loss, outcome: (loss, *outcome))
nothing_at_all = objective(lambda loss, outcome: None)
vector_loss = objective(lambda loss, outcome: (jnp.ones(3) * loss, outcome))
integer_loss = objective(lambda loss, outcome: (loss.astype(int), outcome))
bare_moments = objective(lambda loss, outcome: (loss, outcome._replace(moments=outcome.moments[0])))
no_moments = objective(lambda loss, outcome: (loss, outcome._replace(moments=None)))
nested_moments = objective(lambda loss, outcome: (loss, outcome._replace(moments=(outcome.moments,))))
none_in_moments = objective(lambda loss, outcome: (loss, outcome._replace(moments=(None,))))
vector_metric = objective(lambda loss, outcome: (loss, outcome._replace(metrics={"m": jnp.ones(3)})))
list_metrics = objective(lambda loss, outcome: (loss, outcome._replace(metrics=[loss])))
metric_loss = objective(lambda loss, outcome: (loss, outcome._replace(metrics={"loss": loss})))
flat_loss = objective(lambda loss, outcome: (jnp.ones_like(loss), outcome))
stopped_loss = objective(lambda loss, outcome: (jax.lax.stop_gradient(loss), outcome))


def three_arguments(model, params, batch):
    return None


def fails(model, params, stats, batch):
    raise KeyError("mistake")


BOTH = r"; it must take \(model, params, stats, batch\) and return \(loss, Outcome\(moments, metrics\)\)"
OBJECTIVES = {
    "scalar_only": rf"returns float32\[\]{BOTH}",
    "no_outcome": rf"returns a tuple \(float32\[\], a tuple \(a dict\)\){BOTH}",
    "a_plain_tuple": rf"returns a tuple .*{BOTH}",
    "three": rf"returns a tuple .*{BOTH}",
    "nothing_at_all": f"returns None{BOTH}",
    "vector_loss": r"returns the loss as float32\[3\], not as a float scalar;",
    "integer_loss": r"returns the loss as int32\[\], not as a float scalar;",
    "bare_moments": "returns moments that are a dict, not a tuple of trees;",
    "no_moments": "returns moments that are None, not a tuple of trees;",
    "nested_moments": "returns moments with '0/backbone",
    "none_in_moments": "returns moments with no 'backbone/bn1/mean'",
    "vector_metric": r"returns metrics {'m': 'float32\[3\]'}, not a dictionary of float scalars;",
    "list_metrics": "returns metrics .* not a dictionary of float scalars;",
    "metric_loss": "returns a metric 'loss', which the training adds; rename it",
    "flat_loss": "has a gradient of 0 with respect to the parameters; make it differentiable",
    "stopped_loss": "has a gradient of 0 with respect to the parameters",
    "three_arguments": rf"is a function of \(model, params, batch\){BOTH}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_that_breaks_its_contract(name):
    refused(f"objective 'test_contracts:{name}' {OBJECTIVES[name]}", "objective", name)


def test_an_objective_that_fails():
    message = refused("objective 'test_contracts:fails' fails with KeyError: 'mistake'", "objective", "fails")
    assert f"{__file__}:" in message


@pytest.mark.parametrize("name", ["good", "no_passes"])
def test_objectives_that_keep_it(name):
    builder.training(config("objective", name))


# ---------------------------------------------------------------- schedules, optimizers, data


def rates(change):
    return lambda epochs: change(np.linspace(0.1, 0.0, epochs))


linear = rates(lambda x: x)
listed = rates(lambda x: x.tolist())
one_short = rates(lambda x: x[1:])
one_rate = rates(lambda x: 0.1)
negative = rates(lambda x: x - 0.05)
nan_rates = rates(lambda x: x * np.nan)
no_rates = rates(lambda x: None)
named_rates = rates(lambda x: {"lr": x})
by_step = rates(lambda x: lambda step: 0.1)


def short_of_steps(epochs, steps_per_epoch):
    return np.full(epochs * steps_per_epoch - 1, 0.1)


def one_per_step(epochs, steps_per_epoch):
    return np.linspace(0.1, 0.0, epochs * steps_per_epoch)


def without_epochs():
    return [0.1]


ONE_EACH = "; it must take epochs and return one finite learning rate >= 0 per epoch"
SCHEDULES = {
    "one_short": rf"returns rates of shape \[59\] for 60 epochs{ONE_EACH}",
    "one_rate": rf"returns rates of shape \[\] for 60 epochs{ONE_EACH}",
    "negative": rf"returns -0\.05\.\.0\.05 for 60 epochs{ONE_EACH}",
    "nan_rates": rf"returns nan\.\.nan for 60 epochs{ONE_EACH}",
    "no_rates": r"returns (nan|rates of shape)",
    "named_rates": f"fails with TypeError.*{ONE_EACH}",
    "by_step": f"fails with TypeError.*{ONE_EACH}",
    "without_epochs": f"fails with TypeError.*{ONE_EACH}",
    "short_of_steps": r"returns rates of shape \[(\d+)\] for \d+ steps; .*; or take steps_per_epoch, too, "
    "and return one per step",
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_that_breaks_its_contract(name):
    refused(f"schedule 'test_contracts:{name}' {SCHEDULES[name]}", "schedule", name)


@pytest.mark.parametrize("name", ["linear", "listed"])
def test_schedules_that_keep_it(name):
    assert float(builder.training(config("schedule", name)).schedule(0)) == pytest.approx(0.1)


def test_a_schedule_of_steps_that_keeps_it():
    job = builder.training(config("schedule", "one_per_step"))
    expected = np.linspace(0.1, 0.0, job.total_steps)
    found = [float(job.schedule(step)) for step in range(0, job.total_steps, 7)]
    np.testing.assert_allclose(found, expected[::7], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["cosine", "one_cycle", "piecewise"])
def test_a_library_s_schedule_of_steps(name):
    made = config()
    made.schedule = ConfigDict({"name": name, "lr": 0.1})
    job = builder.training(made)
    rates = [float(job.schedule(step)) for step in range(job.total_steps)]
    assert max(rates) == pytest.approx(0.1, rel=1e-3)
    assert name == "piecewise" or len(set(rates)) > job.total_steps // 2


def adam(schedule, *, b1=0.9):
    return optax.adam(schedule, b1=b1)


def no_optimizer(schedule):
    return schedule


def only_update(schedule):
    return optax.adam(schedule).update


def flat_updates(schedule):
    return optax.GradientTransformation(
        lambda params: (), lambda g, state, params=None: (jnp.zeros(3), state)
    )


def integer_updates(schedule):
    return optax.stateless(lambda g, params: jax.tree.map(lambda x: x.astype(int), g))


OPTIMIZERS = {
    "no_optimizer": "returns a function; it must return an optax.GradientTransformation",
    "only_update": "returns a function; it must return an optax.GradientTransformation",
    "flat_updates": "returns updates with ",
    "integer_updates": r"returns updates with .* as int32",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_breaks_its_contract(name):
    refused(f"optimizer 'test_contracts:{name}' {OPTIMIZERS[name]}", "optimizer", name)


@pytest.mark.slow
def test_an_optimizer_that_keeps_it():
    builder.training(config("optimizer", "adam", b1=0.8))


def arrays():
    return np.zeros((2, 8, 8, 1), np.uint8), np.arange(2)


def float_images():
    data = builder.dataset(config())
    return data._replace(train_images=data.train_images / 16)


def missing_file():
    return np.load("nowhere.npz")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("arrays", r"returns a tuple .*; it must return a robal_jax\.data\.Dataset"),
        ("missing_file", r"fails with FileNotFoundError.*test_contracts\.py:\d+"),
        ("float_images", "train images are float64 .*; give uint8"),
    ],
)
def test_a_data_set_that_breaks_its_contract(name, message):
    refused(message, "data", name)
