"""Packages are used as their users use them."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from user import C11, ROOT, VERSION, Server, expect, passed, stop

HERE = Path(__file__).resolve().parent
HOST = f"{platform.machine()}-linux-gnu"
GO_MODULE = "github.com/nats-presence/nats-presence/bindings/go"
COMMAND = "bin/nats-presence"
COMMAND_FILES = {
    COMMAND,
    "share/man/man1/nats-presence.1",
    "share/man/man1/nats-presence-serve.1",
    "share/bash-completion/completions/nats-presence",
    "share/fish/vendor_completions.d/nats-presence.fish",
    "share/zsh/site-functions/_nats-presence",
}
README = (ROOT / "README.md").read_text()
PROGRAMS = re.findall(r"```(?:c|go|python)\n(.*?)```", README, re.DOTALL)


def go(user, out):
    """The environment of a Go user: a module proxy, and no module of ours in a cache."""
    cache = os.environ.get("GOCACHE") or subprocess.check_output(["go", "env", "GOCACHE"], text=True).strip()
    downloaded = subprocess.check_output(["go", "env", "GOMODCACHE"], text=True).strip()
    subprocess.run(["go", "mod", "download"], cwd=ROOT / "bindings/go/message", check=True)
    return {
        "GOCACHE": cache,  # so that the standard library is not compiled again
        "GOFLAGS": "-modcacherw",
        "GOPATH": str(user.work / "gopath"),
        # The second one is for nats.go, which package message needs.
        "GOPROXY": f"file://{out}/go-proxy,file://{downloaded}/cache/download",
        "GONOSUMDB": "*",
        "GOTOOLCHAIN": "local",
    }


def check_command(user, *program):
    """The command line starts, without the shared library."""
    printed = user.run(*program, "--version")
    expect(printed == f"nats-presence {VERSION}\n", f"{program} prints {printed!r}")


def tarball(user, out):
    (archive,) = out.glob(f"nats-presence-{VERSION}-{HOST}.tar.gz")
    user.run("tar", "-xf", archive)
    folder = user.work / archive.name.removesuffix(".tar.gz")
    documents = "share/doc/nats-presence"
    others = {"LICENSE", "install.sh", f"{documents}/README.md", f"{documents}/docs/wire.md"}
    others |= {f"{documents}/bindings/{language}/README.md" for language in ("c", "go", "python")}
    for name in COMMAND_FILES | others:
        expect((folder / name).is_file(), f"the tarball lacks {name}")
    prefix = user.work / "from-tarball"
    user.run(folder / "install.sh", prefix)
    for place in (folder, prefix):
        libdir = place / "lib"
        found = user.run("pkg-config", "--cflags", "--libs", libdir / "pkgconfig/nats-presence.pc").split()
        program = user.work / "from-tarball-presence"
        user.run(*C11, ROOT / "examples-c/presence.c", "-o", program, *found, f"-Wl,-rpath,{libdir}")
        printed = user.run(program)
        expect(printed.startswith(f"nats-presence {VERSION}\n"), f"presence prints\n{printed}")
        check_command(user, place / "bin/nats-presence")


def python_wheel(user, out):
    """Installs the wheel into a fresh virtual environment, and returns its python."""
    venv = user.work / "venv"
    user.run(sys.executable, "-m", "venv", venv)
    (wheel,) = out.glob(f"*-manylinux_*_{platform.machine()}.whl")
    user.run(venv / "bin/pip", "install", "--quiet", "--no-index", "--disable-pip-version-check", wheel)
    code = "import nats_presence as p; print(p.__version__, p._ffi.lib._name)"
    version, library = user.run(venv / "bin/python", "-c", code).split()
    expect(version == VERSION, f"the wheel has version {version}")
    expect(Path(library).is_relative_to(venv), f"the wheel loads {library}")
    check_command(user, venv / "bin/nats-presence")
    return venv / "bin/python"


def python_sdist_without_cargo(user, out):
    tools = user.work / "without-cargo"
    tools.mkdir()
    (sdist,) = out.glob("nats_presence-*.tar.gz")
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps", sdist]
    done = user.done(*command, "--target", user.work / "never", PATH=str(tools))
    expect(done.returncode != 0, "the sdist installs without cargo")
    expect("building one needs cargo, which is not in PATH: install Rust" in done.stdout, done.stdout)


def python_sdist_has_the_sources(user, out):
    """Cargo accepts the manifests and the lock file in it. (`make test-dist` builds it.)"""
    (sdist,) = out.glob("nats_presence-*.tar.gz")
    user.run("tar", "-xf", sdist)
    sources = user.work / sdist.name.removesuffix(".tar.gz") / "rust"
    command = ["cargo", "metadata", "--locked", "--offline", "--format-version=1"]
    done = subprocess.run(command, cwd=sources, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    expect(done.returncode == 0, f"cargo metadata in the sdist:\n{done.stderr}")


def place(program, url):
    return program.replace("nats://127.0.0.1:4222", url)


def go_program(user, out, url):
    """Builds the README's worker with the module of the proxy, and returns its folder and the environment."""
    environment = go(user, out)
    folder = user.work / "gomodule"
    folder.mkdir()
    (folder / "main.go").write_text(place(PROGRAMS[1], url))
    user.run("go", "mod", "init", "example.org/worker", cwd=folder, **environment)
    user.run("go", "get", GO_MODULE, cwd=folder, **environment)
    user.run("go", "build", "-o", "worker", ".", cwd=folder, **environment)
    needed = user.run("ldd", folder / "worker")
    expect("nats_presence" not in needed, f"the Go program needs\n{needed}")
    return folder, environment


def go_message(user, folder, environment):
    """A worker that is written for package message builds, with nats.go from another proxy."""
    program = folder / "message-worker"
    program.mkdir()
    shutil.copy(ROOT / "bindings/go/message/examples/worker/main.go", program)
    user.run("go", "get", f"{GO_MODULE}/message", cwd=folder, **environment)
    user.run("go", "build", "-o", "message-worker-program", "./message-worker", cwd=folder, **environment)


def go_vendor(user, folder, environment):
    user.run("go", "mod", "vendor", cwd=folder, **environment)
    offline = {**environment, "GOPROXY": "off", "GOPATH": str(user.work / "empty-gopath")}
    user.run("go", "build", "-o", "vendored", ".", cwd=folder, **offline)
    shutil.rmtree(folder / "vendor")


def go_unsupported(user, folder, environment):
    """Without cgo, and where there is no library, the compiler says what is missing, and nothing else."""
    for changed in ({"CGO_ENABLED": "0"}, {"GOOS": "darwin", "CGO_ENABLED": "0"}):
        done = user.done("go", "build", "./...", cwd=folder, **environment, **changed)
        errors = [line for line in done.stdout.splitlines() if ".go:" in line]
        expect(len(errors) == 1 and "needs cgo on 64-bit Linux" in errors[0], f"{changed}:\n{done.stdout}")


def go_with_another_library(user, folder, environment, other):
    """Go's linker accepts another static library of Rust beside ours."""
    program = folder / "other"
    program.mkdir()
    (program / "main.go").write_text(f"""package main

// #cgo LDFLAGS: {other}
// int other_panics(void);
import "C"
import presence "{GO_MODULE}"

func main() {{
	if C.other_panics() != 1 || presence.MarkClientOnline("client") != nil || !presence.IsClientOnline("client") {{
		panic("wrong")
	}}
}}
""")
    user.run("go", "run", "./other", cwd=folder, **environment)


def readme_programs(user, worker, python, url):
    """The README's Go worker and its Python gateway, from their packages."""
    gateway = user.work / "gateway.py"
    gateway.write_text(place(PROGRAMS[3], url))
    run_readme_programs(user, [worker], [python, gateway])


def run_readme_programs(user, worker, gateway, **environment):
    """Runs one of the README's workers, and its gateway."""
    process = user.start(*worker, **environment)
    try:
        for _ in range(100):  # the first ones may come before the worker serves
            done = user.done(*gateway, **environment)
            if "NoResponders" not in done.stdout:
                break
        expect(done.stdout.split() == ["0", "1", "2", "3"], f"the gateway prints\n{done.stdout}")
        left = process.stdout.readline()
        expect(left == "client-1 left\n", f"the worker prints {left!r}")
    finally:
        stop(process)


def use(user, out):
    """Uses the packages for this machine. Returns the folder of a Go program, and the environment of Go."""
    tarball(user, out)
    passed("tarball: used where it was unpacked, and installed by install.sh; the command starts")
    python = python_wheel(user, out)
    passed("wheel: a fresh virtual environment uses the library inside, and has the command")
    python_sdist_without_cargo(user, out)
    passed("sdist: without cargo it says what is needed")
    python_sdist_has_the_sources(user, out)
    passed("sdist: cargo accepts its manifests and its lock file")
    with Server(user.work) as url:
        folder, environment = go_program(user, out, url)
        passed("Go module: go get and go build, without pkg-config and an installed library")
        readme_programs(user, folder / "worker", python, url)
        passed("the README's Go worker and Python gateway, from their packages")
    go_vendor(user, folder, environment)
    passed("Go module: go mod vendor keeps the library")
    go_unsupported(user, folder, environment)
    passed("Go module: one sentence says what is missing without cgo")
    return folder, environment


def check(user, other):
    """Packages what `make cli` built, and uses the packages."""
    out = user.work / "dist"
    command = [sys.executable, ROOT / "packaging/dist", out]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    expect(done.returncode == 0, f"packaging/dist exits with {done.returncode}:\n{done.stdout}")
    user.run("sha256sum", "--check", "--strict", "SHA256SUMS", cwd=out)
    passed("packaging/dist: packages of the library and the command that were built, with SHA-256 sums")
    folder, environment = use(user, out)
    go_with_another_library(user, folder, environment, other)
    passed("Go module: links with another static library of Rust")
    go_message(user, folder, environment)
    passed("Go module message: a worker builds with it and nats.go")
