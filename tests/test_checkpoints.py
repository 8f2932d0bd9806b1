"""Checkpoints: bit-exact, verified, the newest kept (robal_jax.checkpoints)."""

import errno
import json
import pathlib
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import empty, flip_a_bit, lose, truncate, zero

from robal_jax import optimizers
from robal_jax.averages import chosen
from robal_jax.errors import InputError
from robal_jax.storage import checkpoints
from robal_jax.training import TrainState


def tree(seed=0, width=3, dtype=np.float32):
    """A training state with containers of every kind, empty ones too."""
    rng = np.random.RandomState(seed)
    params = {
        "layer": {"weight": rng.randn(4, width).astype(dtype), "bias": rng.randn(width).astype(np.float32)}
    }
    optimizer = optimizers.sgd(optax.constant_schedule(0.1), clip_norm=1.0)
    stats = {
        "large": rng.randn(20_000).astype(np.float32),  # makes the biggest file one of data
        "half": jnp.asarray(rng.randn(5), jnp.bfloat16),
        "bytes": rng.randint(0, 256, 7).astype(np.uint8),
        "special": np.float32([np.nan, np.inf, -0.0, 1e-45]),
    }
    return TrainState(np.int32(seed), params, stats, optimizer.init(params))


def save(folder, *states, keep=10, first=1):
    with checkpoints.Saver(folder, keep) as saver:
        return [saver.save(step, state) for step, state in enumerate(states, first)]


def latest(folder, like, damaged=None):
    return checkpoints.restore_latest(
        folder,
        like,
        on_damage=lambda path, why: pytest.fail(why) if damaged is None else damaged.append((path, why)),
    )


@pytest.mark.parametrize("missing", [0, 1])
def test_a_save_needs_room_for_all_that_it_writes(tmp_path, monkeypatch, missing):
    """The arrays, and a bound on the files beside them."""
    state = tree()
    sizes = [np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state)]
    free = sum(sizes) + checkpoints.OVERHEAD + checkpoints.OVERHEAD_EACH * len(sizes) - missing
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    if missing:
        with pytest.raises(InputError, match="disk full: a checkpoint in "):
            save(tmp_path, state)
        assert not checkpoints.steps(tmp_path)
    else:
        save(tmp_path, state)


def test_one_process_saves_to_a_folder_whose_name_is_a_pattern(tmp_path):
    ((path, _),) = save(tmp_path / "run [1]*", tree())
    assert path.is_dir()


def test_round_trip_is_exact(tmp_path):
    state = tree(7)
    ((path, sha256),) = save(tmp_path, state)
    assert path == tmp_path / "1"
    for like in (tree(0), jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tree(0)))):
        found, read = checkpoints.restore(path, like)
        assert read == sha256 == checkpoints.digest(state)
        assert jax.tree.structure(found) == jax.tree.structure(state)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
            assert np.asarray(a).dtype == np.asarray(b).dtype
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_parts_are_left_out_only_if_that_is_asked_for(tmp_path):
    state = tree(3)
    ((path, sha256),) = save(tmp_path, state)
    like = {"params": tree(0).params, "stats": tree(0).stats}
    found, read = checkpoints.restore(path, like, part=partial(chosen, which="current"))
    assert read == sha256
    np.testing.assert_array_equal(found["params"]["layer"]["weight"], state.params["layer"]["weight"])
    with pytest.raises(InputError, match=r"different model: .* where the config's model has nothing"):
        checkpoints.restore(path, like)


def test_digest_sees_every_bit():
    state = {"a": {"b": np.arange(6, dtype=np.float32)}, "c": np.int32(1)}
    digests = [checkpoints.digest(state)]
    for byte in range(24):
        for bit in (0, 7):
            changed = state["a"]["b"].copy()
            changed.view(np.uint8)[byte] ^= 1 << bit
            digests.append(checkpoints.digest({**state, "a": {"b": changed}}))
    digests += [
        checkpoints.digest(other)
        for other in (
            {**state, "a": {"d": state["a"]["b"]}},  # name
            {**state, "a": {"b": state["a"]["b"].reshape(2, 3)}},  # shape
            {**state, "a": {"b": state["a"]["b"].view(np.int32)}},  # type
            {"a": state["a"]},
            {"a": state["a"], "c": np.int32(2)},
        )
    ]
    assert len(set(digests)) == len(digests)


def test_digest_sees_arrays_only():
    state = {"a": np.ones((2, 3), np.float32), "b": np.zeros(2, np.int32)}
    same = {"b": jnp.zeros(2, jnp.int32), "a": np.asfortranarray(state["a"])}  # order, memory, device
    assert checkpoints.digest(same) == checkpoints.digest(state)


def test_the_newest_are_kept(tmp_path):
    save(tmp_path, *(tree(i) for i in range(1, 6)), keep=2)
    assert checkpoints.steps(tmp_path) == [4, 5]
    found, path, _ = latest(tmp_path, tree())
    assert path == tmp_path / "5"
    assert int(found.step) == 5


def test_nothing_there(tmp_path):
    assert latest(tmp_path, tree()) is None
    assert latest(tmp_path / "missing", tree()) is None
    assert checkpoints.steps(tmp_path / "missing") == []


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (tree(width=4), r"has float32\[3\] for opt_state/\S+/bias where .* has float32\[4\]"),
        (tree(dtype=np.float16), r"has float32\[4, 3\] for \S+/weight where .* has float16\[4, 3\]"),
        (tree().replace(stats={}), r"for stats/bytes where .* has nothing"),
        (
            tree().replace(params={**tree().params, "new": np.ones(2)}),
            r"has nothing for params/new where .* has float64\[2\]",
        ),
    ],
    ids=["shape", "type", "less", "more"],
)  # fmt: skip
def test_another_model(tmp_path, like, message):
    save(tmp_path, tree())
    with pytest.raises(InputError, match=message) as raised:
        latest(tmp_path, like)
    assert "is of a different model" in str(raised.value)


def forget_digest(folder):
    path = folder / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    content["custom_metadata"] = {}
    path.write_text(json.dumps(content))


DAMAGES = [flip_a_bit, zero, lose, truncate, empty, forget_digest]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed(tmp_path, damage):
    (_, whole), (path, _) = save(tmp_path, tree(1), tree(2))
    damage(path)
    with pytest.raises(checkpoints.DamagedCheckpointError) as raised:
        checkpoints.restore(path, tree())
    assert "\n" not in str(raised.value)
    damaged = []
    found, used, sha256 = latest(tmp_path, tree(), damaged)
    assert (used, sha256) == (tmp_path / "1", whole)
    assert int(found.step) == 1
    assert [path for path, _ in damaged] == [tmp_path / "2"]


def test_wrong_values_that_can_be_read_are_noticed(tmp_path):
    """What Orbax itself cannot see: whole files, but not the ones that were written."""
    (first, _), (second, _) = save(tmp_path, tree(1), tree(2))
    shutil.rmtree(second / "state")
    shutil.copytree(first / "state", second / "state")
    (second / checkpoints.FILES).unlink()  # as after a kill between a save and the list of its files
    with pytest.raises(checkpoints.DamagedCheckpointError, match=r"its sha256 is \w+…, but \w+… was written"):
        checkpoints.restore(second, tree())


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOTCONN, errno.EMFILE])
def test_a_drive_that_cannot_be_read_is_no_damage(tmp_path, monkeypatch, number):
    """A whole checkpoint would be set aside, and the training would go back."""
    save(tmp_path, tree(1), tree(2))
    original = pathlib.Path.read_bytes

    def read_bytes(path):
        if tmp_path / "2" in path.parents:
            raise OSError(number, "not now")
        return original(path)

    monkeypatch.setattr(pathlib.Path, "read_bytes", read_bytes)
    with pytest.raises(OSError, match="not now"):
        latest(tmp_path, tree())


def test_all_damaged(tmp_path):
    for path, _ in save(tmp_path, tree(1), tree(2)):
        empty(path)
    with pytest.raises(InputError, match=r"every checkpoint in .* is damaged"):
        latest(tmp_path, tree(), [])


def test_the_arrays_of_the_newest_whole_checkpoint(tmp_path):
    """What an export and a run that starts from another one read."""
    (_, whole), (path, newest) = save(tmp_path / "checkpoints", tree(1), tree(2))
    said = []
    read = partial(checkpoints.read_latest, tmp_path, on_damage=checkpoints.previous_instead(said.append))
    assert (read().sha256, said) == (newest, [])
    empty(path)
    assert read().sha256 == whole
    assert said[0].startswith(f"checkpoint {path} is damaged (")
    assert said[0].endswith("); passing it over")
    with pytest.raises(InputError, match=r"checkpoint \S+/2 is damaged .*; name another"):
        checkpoints.read_latest(tmp_path)
    empty(tmp_path / "checkpoints" / "1")
    with pytest.raises(InputError, match=r"every checkpoint in .* is damaged; move the folder away"):
        read()


def test_half_written_checkpoints_are_not_seen(tmp_path):
    save(tmp_path, tree(1))
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "3").write_text("a file")
    assert checkpoints.steps(tmp_path) == [1]


def test_failed_write(tmp_path):
    with checkpoints.Saver(tmp_path / "run", 3) as saver:
        saver.save(1, tree(1))
        saver.wait()

        class Failing:
            def result(self):
                raise OSError(28, "No space left on device")

        saver._pending = Failing()
        with pytest.raises(InputError, match=r"could not write a checkpoint to .*No space left"):
            saver.wait()
    assert int(latest(tmp_path / "run", tree())[0].step) == 1
