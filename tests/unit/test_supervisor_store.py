"""The supervisors' store: a first host whose link is cut does not keep them waiting."""

from __future__ import annotations

import threading

import pytest

from dsmoe_vl.training import restarts


class _Silent:
    """A store whose host has gone without closing the connection."""

    def check(self, keys):
        threading.Event().wait()


def test_a_store_that_does_not_answer_is_left(monkeypatch):
    monkeypatch.setattr(restarts, "_ANSWER_SECONDS", 0.2)
    store = restarts._LimitedStore(_Silent())
    with pytest.raises(OSError, match="no answer for 0 s"):  # a TimeoutError, which ends a supervisor
        store.has("key")


def test_an_error_of_the_store_is_raised():
    class Broken:
        def get(self, key):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        restarts._LimitedStore(Broken()).get("key")
