"""Signals that ask a run to stop (robal_jax.logs)."""

import os
import signal

import pytest

from robal_jax import logs


def test_a_signal_asks_every_loop_around():
    before = signal.getsignal(signal.SIGTERM)
    with logs.stop_signals() as outer:
        with logs.stop_signals() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner
            assert outer
        with logs.stop_signals() as another:
            assert not another  # it was not there then
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_second_interrupt_stops_at_once():
    with logs.stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
