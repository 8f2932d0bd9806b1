"""One update as a pure function, and several updates in one compiled loop."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from robal_jax import averages, builder, models, objectives
from robal_jax.attacks import FreeSteps, free
from robal_jax.averages import Average, Weights, estimation_share
from robal_jax.budgets import Budget
from robal_jax.class_statistics import ClassStatistics
from robal_jax.data import cutmix, draw_cutmix, to_float
from robal_jax.devices import parallel
from robal_jax.keys import PARTNERS, example_keys
from robal_jax.perturbations import Perturbation
from robal_jax.training.state import TrainState

NO_AVERAGE = averages.none(1)


class Extras(NamedTuple):
    """What a training step does besides minimising its objective.

    Attributes:
      perturbation: of the weights at which the gradient is taken; None for the weights themselves.
      average: of the weights, kept in the state.
      budget: gives each image its radius; None for the threat model's.
      steps_per_epoch: to see where an epoch ends.
      batch_norm_momentum: weight of a pass in the running statistics; None for the usual 0.1.
      free: steps of the images' perturbation in the state, in place of the objective's attack; None for none.
      statistics: of the classes, gathered in the state; None for none.
      logged_passes: training passes at the new weights, of 'adv' and 'nat', that move the running statistics.
    """

    perturbation: Perturbation | None = None
    average: Average = NO_AVERAGE
    budget: Budget | None = None
    steps_per_epoch: int = 1
    batch_norm_momentum: float | None = None
    free: FreeSteps | None = None
    statistics: ClassStatistics | None = None
    logged_passes: tuple[str, ...] = ()


NO_EXTRAS = Extras()


def train_step(
    state: TrainState,
    batch: objectives.Batch,
    *,
    model: models.Model,
    objective: objectives.Objective,
    optimizer: optax.GradientTransformation,
    axis_name: str | None = None,
    accumulation_steps: int = 1,
    extras: Extras = NO_EXTRAS,
    partners: objectives.Partners | None = None,
    positions: chex.Array | None = None,
) -> tuple[TrainState, dict[str, chex.Array]]:
    """Makes one update.

    ``g = mean over parts and devices of grad (mean loss of the part's images on the device)``; metrics and
    batch-norm moments are averaged in the same way. With a perturbation the gradient is that of perturbed
    weights, and the adversarial images are those of the weights themselves.

    Args:
      state: before the update.
      batch: this device's part of the batch.
      model: the network.
      objective: the function to minimise.
      optimizer: turns gradients into updates.
      axis_name: mapped axis over which the batch is spread, if any.
      accumulation_steps: number of parts ``A`` in which the device takes its images, one after the other, so
        that it needs the memory of one part. Objectives and batch norm then see one part at a time.
      extras: see :class:`Extras`.
      partners: of images that are mixed from two; None for images as they are.
      positions: of this device's images in the whole batch, for free steps; else None.

    Returns:
      The state after the update, and scalars: ``loss``, ``grad_norm`` (global, before clipping) and the
      metrics of the objective.
    """
    perturbation, average, budget = extras.perturbation, extras.average, extras.budget
    momentum, free_steps = extras.batch_norm_momentum, extras.free
    shows = perturbation or average.estimates or _learners(extras) or "adv" in extras.logged_passes
    over_parts = partial(_over_parts, parts=accumulation_steps, axis_name=axis_name)
    of_run = {"classes": state.classes or None, "teacher": state.teacher or None}

    def gradients_of(params: chex.ArrayTree, part: tuple[Any, ...]) -> tuple[chex.ArrayTree, Any]:
        images, known = part
        images = images._replace(epoch=batch.epoch)

        def loss_fn(params: chex.ArrayTree, shown: chex.Array | None) -> tuple[chex.Array, Any]:
            told = known._replace(adversarial=shown, **of_run)
            told = () if all(x is None for x in told) else (told,)
            return objective(model, params, state.stats, images, *told)

        gradient_of = jax.value_and_grad(loss_fn, (0, 1) if free_steps else (0,), has_aux=True)
        (loss, outcome), (gradients, *by_image) = gradient_of(params, known.adversarial)
        # What nobody asks for is not stacked over the parts.
        attacked = outcome.attacked if shows else None
        found = gradients, outcome.moments, {"loss": loss, **outcome.metrics}, outcome.attack_moments
        return found, (attacked, *by_image)

    radii = None if budget is None else _radii(budget.radii(state.classes, batch.epoch), batch, partners)
    known = objectives.Known(radii, partners)
    if free_steps is not None:
        threat = free_steps.threat if radii is None else replace(free_steps.threat, epsilon=radii)
        known = known._replace(adversarial=free.perturbed(batch.images, state.delta[positions], threat))
    examples = batch._replace(epoch=None), known
    found, (attacked, *by_image) = over_parts(partial(gradients_of, state.params), examples)
    params, attack_moments = state.params, found[3]
    if perturbation is not None:
        attack_moments = (*attack_moments, *(found[1] if perturbation.counts_pass else ()))
        params = _perturbed(state, found[0], batch.epoch, perturbation, optimizer)
        if attacked is not None:
            examples = examples[0], known._replace(adversarial=attacked.images)
        found, (attacked, *_) = over_parts(partial(gradients_of, params), examples)
    gradients, moments, metrics, _ = found
    updates, opt_state = optimizer.update(gradients, state.opt_state, params)
    new_state = replace(
        state,
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        stats=models.update_statistics(state.stats, (*attack_moments, *moments), momentum),
        opt_state=opt_state,
    )
    pass_of = partial(_pass_of, model=model, over_parts=over_parts)
    new_state = _followed(state, new_state, extras, batch, attacked, pass_of, axis_name)
    if free_steps is not None:
        moved = free.ascended(state.delta[positions], by_image[0], batch.images, threat)
        new_state = replace(new_state, delta=_everywhere(state.delta, positions, moved, axis_name))
    return new_state, {**metrics, "grad_norm": optax.tree.norm(gradients)}


def _learners(extras: Extras) -> list[ClassStatistics]:
    """Returns what is gathered of the classes, for a budget or by itself."""
    of_budget = None if extras.budget is None else extras.budget.statistics
    return [each for each in (extras.statistics, of_budget) if each is not None]


def _radii(of_class: chex.Array, batch: objectives.Batch, partners: objectives.Partners | None) -> chex.Array:
    """Returns the radius of each image ``[B]``; that of a mixed image lies between those of its classes."""
    radii = of_class[batch.labels]
    if partners is None:
        return radii
    return partners.share * radii + (1 - partners.share) * of_class[partners.labels]


def _over_devices(sums: chex.ArrayTree, axis_name: str | None) -> chex.ArrayTree:
    return sums if axis_name is None else lax.psum(sums, axis_name)


def _everywhere(
    whole: chex.Array, positions: chex.Array, mine: chex.Array, axis_name: str | None
) -> chex.Array:
    """Returns what the images of the whole batch have, from each device's images and their positions."""
    parts = positions, mine
    if axis_name is not None:
        parts = lax.all_gather(parts, axis_name, tiled=True)
    return whole.at[parts[0]].set(parts[1])


def _perturbed(
    state: TrainState,
    gradients: chex.ArrayTree,
    epoch: chex.Numeric,
    perturbation: Perturbation,
    optimizer: optax.GradientTransformation,
) -> chex.ArrayTree:
    """Returns the weights at which the step's gradient is taken."""
    if perturbation.of_optimizer:  # its step up the loss; its state stays as it is
        up = jax.tree.map(jnp.negative, gradients)
        gradients, _ = optimizer.update(up, state.opt_state, state.params)
    return perturbation.perturb(state.params, gradients, epoch)


def _over_parts(
    function: Callable[[Any], tuple[Any, Any]], examples: chex.ArrayTree, *, parts: int, axis_name: str | None
) -> tuple[Any, Any]:
    """Computes a function of a batch part by part.

    Args:
      function: from a part to what is averaged over parts and devices, and what each image has.
      examples: ``[A b, ...]``.
      parts: ``A``.
      axis_name: see :func:`train_step`.

    Returns:
      The means, and the values of the images ``[A b, ...]``.
    """
    if parts == 1:
        means, values = function(examples)
    else:
        split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), examples)
        first = jax.tree.map(lambda x: x[0], split)
        shapes, _ = jax.eval_shape(function, first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def add(sums: chex.ArrayTree, part: chex.ArrayTree) -> tuple[chex.ArrayTree, chex.ArrayTree]:
            found, values = function(part)
            return jax.tree.map(jnp.add, sums, found), values

        total, values = lax.scan(add, zeros, split)
        means = jax.tree.map(lambda x: x / parts, total)
        values = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), values)
    return (means if axis_name is None else lax.pmean(means, axis_name)), values


def _followed(
    before: TrainState,
    after: TrainState,
    extras: Extras,
    batch: objectives.Batch,
    attacked: objectives.Attacked | None,
    pass_of: Callable[..., Any],
    axis_name: str | None,
) -> TrainState:
    """Returns the state after a step with all that follows the update.

    These are the passes for a log, the average and its own statistics, and what is gathered of the classes.
    """
    shown = {"nat": batch.images, "adv": (attacked or batch).images}
    momentum, average, steps_per_epoch = extras.batch_norm_momentum, extras.average, extras.steps_per_epoch
    logged = {}
    for name in extras.logged_passes:
        moments, logged[name] = pass_of(after.params, after.stats, shown[name])
        after = replace(after, stats=models.update_statistics(after.stats, (moments,), momentum))
    old, new = (Weights(state.params, state.stats) for state in (before, after))
    moved = average.update(before.average, after.step, old, new)
    if average.estimates:
        share = estimation_share(after.step, steps_per_epoch)
        moments, _ = pass_of(moved["params"], moved["stats"], shown["adv"])
        moved = {**moved, "stats": models.update_statistics(moved["stats"], (moments,), share)}
    classes = before.classes
    for learner in _learners(extras):
        kept = {name: classes[name] for name in learner.init()}
        logits = logged["adv"] if learner.logged else attacked.logits  # type: ignore[union-attr]
        seen = _over_devices(learner.seen(batch.labels, logits), axis_name)
        ends = after.step % steps_per_epoch == 0
        classes = {**classes, **learner.update(kept, seen, batch.epoch, ends)}
    return replace(after, average=moved, classes=classes)


def _pass_of(
    params: chex.ArrayTree,
    stats: chex.ArrayTree,
    images: chex.Array,
    *,
    model: models.Model,
    over_parts: Callable[..., tuple[Any, Any]],
) -> tuple[chex.ArrayTree, chex.Array]:
    """Makes a training pass of the images of a step; returns its moments, and the logits of this device."""

    def of_part(part: chex.Array) -> tuple[chex.ArrayTree, chex.Array]:
        logits, moments = model.train(params, stats, part)
        return moments, logits

    return over_parts(of_part, images)


class Examples(NamedTuple):
    """Training images on the device: the whole set ``[N, ...]``, or those of some steps ``[T, A, b]``."""

    images: chex.Array  # uint8 [..., H, W, C]
    labels: chex.Array  # int32 [...]


def train_chunk(
    state: TrainState,
    data: Examples | None,
    rows: chex.Array | Examples,
    count: chex.Numeric,
    key: chex.PRNGKey,
    positions: chex.Array,
    *,
    step_fn: Callable[..., tuple[TrainState, dict[str, chex.Array]]],
    steps_per_epoch: int,
    pixel_max: int,
    augment: Callable[[chex.PRNGKey, chex.Array], chex.Array],
    mixing: str = "none",
    showings: int = 0,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, chex.Array]]:
    """Makes several steps in one compiled loop, which ends early after a step that is not finite.

    Args:
      state: before the first step.
      data: the training set; None if ``rows`` holds the images themselves.
      rows: ``[T, A, b]``, numbers of the images in ``data`` that each step sees in each part of its batch; or
        these images themselves.
      count: how many of the ``T`` steps to make; not static, so one compilation serves any number.
      key: of the run.
      positions: ``[A, b]``, positions of these images in the whole batch.
      step_fn: ``(state, batch) -> (state, metrics)``.
      steps_per_epoch: to count the epochs.
      pixel_max: the pixel value that becomes 1.
      augment: ``(keys [n], images [n, H, W, C]) -> images``, integers to integers.
      mixing: one of ``data.MIXINGS``.
      showings: steps that see the same batch in a row, augmented and mixed in the same way, and make free
        steps; 0 for one step and none of these.
      axis_name: mapped axis over which the batch is spread, if any; an image's partner may be anywhere.

    Returns:
      The state, and the metrics summed over the steps made (their number is the increase of ``state.step``).
    """

    def one(i: chex.Array, state: TrainState) -> tuple[TrainState, dict[str, chex.Array]]:
        shown = state.step // showings if showings else state.step  # the number of the batch
        keys = example_keys(key, shown, positions.reshape(-1))
        keys = jax.vmap(partial(jax.random.split, num=2))(keys)
        row = jax.tree.map(lambda x: x[i].reshape(-1, *x.shape[3:]), rows)
        images, labels = row if data is None else (data.images[row], data.labels[row])
        images = augment(keys[:, 0], images)
        told: dict[str, Any] = {}
        if mixing != "none":
            of_step = jax.random.fold_in(jax.random.fold_in(key, shown), PARTNERS)
            images, told["partners"] = _mixed(of_step, images, labels, positions.reshape(-1), axis_name)
        if showings:
            told["positions"] = positions.reshape(-1)
        epoch = state.step // steps_per_epoch + 1
        batch = objectives.Batch(to_float(images, pixel_max), labels, keys[:, 1], epoch)
        return step_fn(state, batch, **told)

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, state, sums, _ = carry
        state, metrics = one(i, state)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        return i + 1, state, jax.tree.map(jnp.add, sums, metrics), finite

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0, state)[1])
    first = (jnp.int32(0), state, zeros, jnp.bool_(True))
    _, state, sums, _ = lax.while_loop(lambda carry: (carry[0] < count) & carry[3], body, first)
    return state, sums


def _mixed(
    key: chex.PRNGKey,
    images: chex.Array,
    labels: chex.Array,
    positions: chex.Array,
    axis_name: str | None,
) -> tuple[chex.Array, objectives.Partners]:
    """Mixes this device's images with partners of the whole batch, in the same way on any devices.

    Args:
      key: of the step.
      images: uint8 ``[b, H, W, C]``.
      labels: ``[b]``.
      positions: ``[b]`` in the whole batch.
      axis_name: see :func:`train_chunk`.

    Returns:
      The mixed images, and their partners.
    """
    everyone = positions, images, labels
    if axis_name is not None:
        everyone = lax.all_gather(everyone, axis_name, tiled=True)
    order = jnp.argsort(everyone[0])
    of_batch, their_labels = (values[order] for values in everyone[1:])
    box, partners = draw_cutmix(key, len(order), images.shape[1:3])
    mixed, share = cutmix(of_batch, box, partners)
    shares = jnp.broadcast_to(share, labels.shape)
    return mixed[positions], objectives.Partners(their_labels[partners[positions]], shares)


def chunk_of(job: builder.Training) -> parallel.Chunk:
    """Returns :func:`train_chunk` for a training, as each of its devices computes it."""
    step_fn = partial(
        train_step,
        model=job.model,
        objective=job.objective,
        optimizer=job.optimizer,
        axis_name=parallel.AXIS,
        accumulation_steps=job.settings.accumulation_steps,
        extras=Extras(
            job.perturbation,
            job.average,
            job.budget,
            job.steps_per_epoch,
            job.settings.batch_norm_momentum,
            job.free_steps,
            job.class_statistics,
            job.settings.logged_passes,
        ),
    )
    return partial(
        train_chunk,
        step_fn=step_fn,
        steps_per_epoch=job.steps_per_epoch,
        pixel_max=job.data.pixel_max,
        augment=job.augment,
        mixing=job.settings.mixing,
        showings=job.free_steps.showings if job.free_steps else 0,
        axis_name=parallel.AXIS,
    )


def compiled_chunk(
    job: builder.Training, devices: list[jax.Device]
) -> Callable[..., tuple[TrainState, dict[str, chex.Array]]]:
    """Compiles :func:`train_chunk` for all devices."""
    return parallel.LAYOUTS[job.settings.layout](chunk_of(job), devices)
