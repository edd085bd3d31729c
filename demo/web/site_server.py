"""Serves the page, its buttons, and the state that it shows."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from programs import DemoError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from supervisor import Supervisor
from tally import LANGUAGES, MODES

PAGE = Path(__file__).resolve().parent / "page"
TICK = 0.1
"""Seconds between two states that the page gets, if something has changed."""


class Site:
    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self.server: uvicorn.Server
        self.origin = ""

    def app(self, host: str) -> Starlette:
        return Starlette(
            routes=[
                Route("/state", self.state),
                Route("/do/{action}", self.do, methods=["POST"]),
                Mount("/", StaticFiles(directory=PAGE, html=True)),
            ],
            # Other pages must not reach the buttons, not even with a name of their own for this address.
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[host, "localhost"], www_redirect=False)],
        )

    async def state(self, request: Request) -> Response:
        """Server-sent events: the whole state whenever it has changed."""

        async def events() -> AsyncIterator[str]:
            shown = None
            while not self.server.should_exit:
                state = self.supervisor.state()
                if state != shown:
                    yield f"data: {json.dumps(state)}\n\n"
                    shown = state
                await asyncio.sleep(TICK)

        return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def do(self, request: Request) -> Response:
        if request.headers.get("origin") != self.origin:
            return PlainTextResponse("only the demo's own page may do this", 403)
        if request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers:
            return PlainTextResponse("a request has no body", 413, headers={"Connection": "close"})
        action, supervisor = request.path_params["action"], self.supervisor
        mode, language = (request.query_params.get(name, "") for name in ("mode", "worker"))
        if action in ("kill-gateway", "freeze-gateway", "thaw-gateway", "restart-server"):
            return PlainTextResponse(getattr(supervisor, action.replace("-", "_"))())
        if action not in ("kill-worker", "reset"):
            return PlainTextResponse(f"there is no action {action[:80]!r}", 404)
        if mode not in MODES or (action == "kill-worker" and language not in LANGUAGES):
            return PlainTextResponse(f"there is no worker {mode[:80]!r} {language[:80]!r}", 404)
        if action == "kill-worker":
            return PlainTextResponse(supervisor.kill_worker(mode, language))
        if not supervisor.tally.reset(mode):
            return PlainTextResponse("streams still run", 409)
        return PlainTextResponse("reset")


async def serve(supervisor: Supervisor, host: str, port: int) -> None:
    """Serves until a signal ends this process."""
    site = Site(supervisor)
    config = uvicorn.Config(
        site.app(host), host=host, port=port, log_level="error", timeout_graceful_shutdown=1, lifespan="off"
    )
    try:
        listener = config.bind_socket()
        listener.listen()
    except SystemExit:
        raise DemoError(f"port {port} of {host} cannot be used; choose another one with PORT=") from None
    site.server = uvicorn.Server(config)
    site.origin = f"http://{host}:{listener.getsockname()[1]}"
    await supervisor.start(host, site.origin)
    print(f"\nThe page is at {site.origin}/ ; end with Ctrl-C\n", flush=True)
    sweeping = asyncio.create_task(sweep(supervisor))
    try:
        await site.server.serve(sockets=[listener])
    finally:
        supervisor.stop()
        sweeping.cancel()


async def sweep(supervisor: Supervisor) -> Any:
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            await asyncio.sleep(1)
            supervisor.tally.sweep()
