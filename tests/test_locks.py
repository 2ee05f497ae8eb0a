"""One writer at a time, where the file system has no locks; test_training.py has two runs where it has them."""

import errno
import os
import time
from pathlib import Path
from unittest import mock

import pytest

from nope_jax import locks


@pytest.fixture
def leased(tmp_path, monkeypatch) -> Path:
    """A folder whose file system knows no locks, as buckets do not; its holders beat fast."""
    refuse = OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    monkeypatch.setattr(locks.fcntl, "flock", mock.Mock(side_effect=refuse))
    monkeypatch.setattr(locks, "BEAT", 0.1)
    monkeypatch.setattr(locks, "SETTLE", 0.01)
    return tmp_path


def test_where_there_are_no_locks_a_living_holder_is_known_by_its_beat(leased):
    with locks.held(leased) as check:
        with (
            pytest.raises(ValueError, match=f"{leased} is being written by process {os.getpid()} on"),
            locks.held(leased),
        ):
            pass
        check()  # it is still ours
    assert not list(leased.iterdir())


def test_where_there_are_no_locks_a_dead_holder_is_waited_for(leased, monkeypatch, capsys):
    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    (leased / "lock").write_text('{"host": "gone", "pid": 7, "lease": "x", "beat": "0"}')
    with locks.held(leased):
        assert "names process 7 on gone: waiting" in capsys.readouterr().err


def test_a_lease_that_another_took_is_noticed(leased):
    with locks.held(leased) as check:
        (leased / "lock").write_text('{"host": "other", "pid": 7, "lease": "x", "beat": "0"}')
        with pytest.raises(ValueError, match="is being written by process 7 on other"):
            for _ in range(5000):
                check()
                time.sleep(0.01)
    assert "other" in (leased / "lock").read_text()  # which goes on
