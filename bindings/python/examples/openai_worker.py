"""A worker that gets its answers from a server with the API of OpenAI, such as vLLM, llama.cpp or Ollama.

    pip install httpx

When the client leaves, the handler is cancelled, and the request to the server is aborted: its connection is closed,
so that the server stops computing. The request's payload is the prompt; each message is a piece of the answer.

Environment: NATS_URL (nats://127.0.0.1:4222), SUBJECT (answers), OPENAI_BASE_URL (http://127.0.0.1:8000/v1),
OPENAI_API_KEY, MODEL (default).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncGenerator
from contextlib import aclosing

import httpx

from nats_presence import Request, aio

URL = os.environ.get("NATS_URL", "nats://127.0.0.1:4222")
SUBJECT = os.environ.get("SUBJECT", "answers")
BASE_URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
KEY = os.environ.get("OPENAI_API_KEY", "")
MODEL = os.environ.get("MODEL", "default")
TIMEOUT = httpx.Timeout(10, read=120)
"""In seconds. `read` is the time between two pieces, and from the request to the first one."""


class IncompleteAnswerError(Exception):
    """The server refused the request, or broke its answer off. The text may be shown to clients."""


async def completion(client: httpx.AsyncClient, prompt: str) -> AsyncGenerator[str, None]:
    """Yields the pieces of an answer. Closing the generator aborts the request."""
    body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": prompt}]}
    try:
        async with client.stream("POST", "/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise IncompleteAnswerError(f"the model's server answered with status {response.status_code}")
            rest = b""
            async for part in response.aiter_bytes():  # aiter_lines() would also split at line separators in the text.
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    if not line.startswith(b"data:"):
                        continue
                    data = line.removeprefix(b"data:").strip()
                    if data == b"[DONE]":
                        return
                    for choice in json.loads(data)["choices"]:  # The last event may have none.
                        if text := choice["delta"].get("content"):
                            yield text
    except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError) as why:
        raise IncompleteAnswerError(f"the answer of the model's server is broken: {type(why).__name__}") from why
    raise IncompleteAnswerError("the model's server ended its answer too early")


async def main() -> None:
    headers = {"Authorization": f"Bearer {KEY}"} if KEY else {}
    limits = httpx.Limits(max_connections=None)  # The service has max_streams.
    async with httpx.AsyncClient(base_url=BASE_URL, headers=headers, timeout=TIMEOUT, limits=limits) as client:

        async def answer(request: Request, sender: aio.Sender) -> None:
            try:
                async with aclosing(completion(client, request.data.decode(errors="replace"))) as pieces:
                    async for text in pieces:
                        await sender.send(text)
            except IncompleteAnswerError as why:
                sender.error(str(why))
            finally:
                print(f"{request.client_id}: {sender.send_count} pieces", flush=True)

        async with aio.connect(URL, name="example OpenAI worker", on_event=print) as conn:
            await conn.serve(SUBJECT, answer, queue="workers", max_streams=100)
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, conn.stop)
            print(f"serving {SUBJECT}", flush=True)
            await conn.run()


if __name__ == "__main__":
    asyncio.run(main())
