"""When a browser leaves a real web server, its worker stops, however the app forwards the stream.

tests/trials/leave.py does the same with any number of browsers, and prints how long it takes.
"""

from __future__ import annotations

import pytest
from trials.leave import FORMS, SERVERS, trial


@pytest.mark.parametrize("kind", ["uvicorn", "hypercorn"])
def test_500_leaving_browsers_stop_their_workers(url: str, kind: str) -> None:
    cases = [(form, "silent") for form in ("response", "bare", "block", "sse")]
    outcomes = {(form, worker): outcome.stopped for form, worker, outcome in trial(url, kind, cases, 500)}
    assert outcomes == dict.fromkeys(cases, 500)


@pytest.mark.parametrize("kind", SERVERS)
def test_leaving_browsers_stop_their_workers(url: str, kind: str) -> None:
    cases = [(form, subject) for form in FORMS for subject in ("silent", "chatty")]
    cases += [("response", "flood"), ("loop", "flood")]
    outcomes = {(form, worker): outcome.stopped for form, worker, outcome in trial(url, kind, cases, 20)}
    assert outcomes == dict.fromkeys(cases, 20)


@pytest.mark.parametrize("kind", SERVERS)
def test_leaving_browsers_stop_their_workers_behind_middleware(
    url: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The app forwards less than the workers send: its tasks are cancelled while they do not wait for a message."""
    monkeypatch.setenv("MIDDLEWARE", "1")
    cases = [("response", "silent"), ("response", "chatty"), ("response", "flood")]
    cases += [("bare", "silent"), ("bare", "chatty"), ("sse", "chatty")]
    outcomes = {(form, worker): outcome.stopped for form, worker, outcome in trial(url, kind, cases, 50)}
    assert outcomes == dict.fromkeys(cases, 50)
