"""Browsers that leave real web servers: the worker of each stops, in whatever form the stream is forwarded.

tests/trials/leave.py does the same with any number of browsers, and prints how soon.
"""

from __future__ import annotations

import pytest
from trials.leave import FORMS, SERVERS, trial


@pytest.mark.parametrize("kind", ["uvicorn", "hypercorn"])
def test_500_browsers_leave(url: str, kind: str) -> None:
    cases = [("bare", "silent"), ("block", "silent"), ("sse", "silent")]
    outcomes = {(form, worker): outcome.stopped for form, worker, outcome in trial(url, kind, cases, 500)}
    assert outcomes == dict.fromkeys(cases, 500)


@pytest.mark.parametrize("kind", SERVERS)
def test_browsers_leave(url: str, kind: str) -> None:
    cases = [(form, subject) for form in FORMS for subject in ("silent", "chatty")] + [("loop", "flood")]
    outcomes = {(form, worker): outcome.stopped for form, worker, outcome in trial(url, kind, cases, 20)}
    assert outcomes == dict.fromkeys(cases, 20)


@pytest.mark.parametrize("kind", SERVERS)
def test_browsers_leave_an_app_with_middleware(url: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It forwards less than the workers send: the readers never wait for a message, and are cancelled elsewhere."""
    monkeypatch.setenv("MIDDLEWARE", "1")
    cases = [("bare", "silent"), ("bare", "chatty"), ("sse", "chatty")]
    outcomes = {(form, worker): outcome.stopped for form, worker, outcome in trial(url, kind, cases, 50)}
    assert outcomes == dict.fromkeys(cases, 50)
