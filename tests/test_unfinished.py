"""What an interrupted job leaves behind (robal_jax.unfinished)."""

import json
import time

import numpy as np
import pytest

from robal_jax.storage.unfinished import SAVE_SECONDS, Unfinished

SETTINGS = {"epsilon": 0.1, "attack": "pgd", "layers": [1, 2], "data": {"name": "digits"}}
ARRAYS = {"pred": np.arange(5), "images": np.ones((2, 3), np.float32), "done": np.array(7)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "unfinished" / "part.npz"


@pytest.fixture
def clock(monkeypatch):
    """``clock(seconds)`` lets time pass."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    return passes


def same(arrays):
    assert arrays.keys() == ARRAYS.keys()
    for name, values in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], values)
        assert arrays[name].dtype == values.dtype


def test_what_is_saved_is_read(path):
    kept = Unfinished(path, SETTINGS)
    assert kept.arrays == {}
    assert not path.exists()
    kept.save({"pred": np.zeros(3)})
    kept.save(ARRAYS)
    same(Unfinished(path, SETTINGS).arrays)
    same(Unfinished(path, dict(reversed(SETTINGS.items()))).arrays)
    assert [file.name for file in path.parent.iterdir()] == ["part.npz"]


@pytest.mark.parametrize(
    "other", [{**SETTINGS, "epsilon": 0.2}, {**SETTINGS, "data": {"name": "cifar"}}, {"epsilon": 0.1}, {}]
)
def test_other_settings_are_not_read(path, clock, other):
    kept = Unfinished(path, SETTINGS)
    clock(5)
    kept.save(ARRAYS)
    fresh = Unfinished(path, other)
    assert fresh.arrays == {}
    assert fresh.seconds == 0
    fresh.save({"pred": np.zeros(2)})
    assert Unfinished(path, SETTINGS).arrays == {}


def test_damaged_files_are_not_read(path):
    Unfinished(path, SETTINGS).save(ARRAYS)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert Unfinished(path, SETTINGS).arrays == {}, length
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        found = Unfinished(path, SETTINGS).arrays
        for name in found:  # a byte that nothing depends on, such as a date
            np.testing.assert_array_equal(found[name], ARRAYS[name])
    for content in (b"", b"PK", b"no file of NumPy", json.dumps(SETTINGS).encode()):
        path.write_bytes(content)
        assert Unfinished(path, SETTINGS).arrays == {}


def test_other_files_are_not_read(path):
    path.parent.mkdir()
    for arrays in ({}, ARRAYS, {**ARRAYS, "settings": np.array("{")}):
        np.savez(path, **arrays)
        assert Unfinished(path, SETTINGS).arrays == {}
    with path.open("wb") as file:
        np.save(file, ARRAYS["images"])
    assert Unfinished(path, SETTINGS).arrays == {}
    path.unlink()
    path.mkdir()
    assert Unfinished(path, SETTINGS).arrays == {}


def test_seconds_add_up_over_processes(path, clock):
    first = Unfinished(path, SETTINGS)
    assert first.seconds == 0
    clock(5)
    first.save(ARRAYS)
    clock(2)
    first.save(ARRAYS)
    assert first.seconds == 7
    clock(100)  # lost with the process, or between two
    second = Unfinished(path, SETTINGS)
    assert second.seconds == 7
    clock(4)
    second.save(ARRAYS)
    assert second.seconds == 11
    third = Unfinished(path, SETTINGS)
    assert third.seconds == 11
    same(third.arrays)


def test_a_save_is_due_after_a_while(path, clock):
    kept = Unfinished(path, SETTINGS)
    for _ in range(2):
        assert not kept.due
        clock(SAVE_SECONDS)
        assert not kept.due
        clock(1)
        assert kept.due
        kept.save(ARRAYS)


def test_what_takes_long_to_save_is_saved_less_often(path, clock):
    kept = Unfinished(path, SETTINGS)

    def slowly():
        clock(20)
        return ARRAYS

    clock(5)
    kept.save(slowly)
    same(Unfinished(path, SETTINGS).arrays)
    clock(190)
    assert not kept.due
    clock(20)
    assert kept.due
    kept.save(ARRAYS)
    assert kept.seconds == 5 + 20 + 190 + 20
    clock(SAVE_SECONDS + 1)
    assert kept.due


def test_a_save_that_fails_leaves_the_one_before(path, monkeypatch):
    kept = Unfinished(path, SETTINGS)
    kept.save(ARRAYS)

    def full(file, **arrays):
        file.write(b"a part of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        kept.save({"pred": np.zeros(2)})
    monkeypatch.undo()
    same(Unfinished(path, SETTINGS).arrays)
    kept.save({"pred": np.zeros(2)})
    np.testing.assert_array_equal(Unfinished(path, SETTINGS).arrays["pred"], [0, 0])
