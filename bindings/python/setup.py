"""Puts the shared library into the package: the file that NATS_PRESENCE_LIBRARY names, or else one that cargo builds.

The sources of the library are two folders up in a checkout, and in rust/ in an sdist. The command line becomes part of
a wheel if NATS_PRESENCE_COMMAND names the file; cargo does not build it here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from distutils.command.build_scripts import build_scripts  # that of setuptools, whose backend runs this file
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent
IN_SDIST = HERE / "rust"
ROOT = IN_SDIST if IN_SDIST.exists() else HERE.parents[1]
SOURCES = (
    "Cargo.toml",
    "Cargo.lock",
    "build.rs",
    "cbindgen.toml",
    "src",
    "include",
    "packaging/rustflags",
    "cli/Cargo.toml",  # The workspace has it, and Cargo.lock its dependencies.
    "cli/src",
)


def built_library() -> Path:
    if chosen := os.environ.get("NATS_PRESENCE_LIBRARY"):
        return Path(chosen)
    if not (ROOT / "Cargo.toml").exists():
        sys.exit("the sources of the library are missing: set NATS_PRESENCE_LIBRARY to the path of the shared library")
    if not shutil.which("cargo"):
        sys.exit(
            "there is no wheel of nats-presence for this platform, and building one needs cargo, which is not in PATH: "
            "install Rust 1.89 or newer (https://rustup.rs)"
        )
    subprocess.run(["cargo", "fetch", "--locked"], cwd=ROOT, check=True)
    flags = subprocess.run([ROOT / "packaging/rustflags"], check=True, stdout=subprocess.PIPE, text=True).stdout
    folder = ROOT / os.environ.get("CARGO_TARGET_DIR", "target")
    command = ["cargo", "build", "--release", "--locked", "--lib", "--target-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "RUSTFLAGS": flags.strip()}, check=True)
    return folder / os.environ.get("CARGO_BUILD_TARGET", "") / "release/libnats_presence.so"


class Build(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "nats_presence/libnats_presence.so.0")
            shutil.copyfile(built_library(), target)
            target.chmod(0o755)


class BuildScripts(build_scripts):
    def get_source_files(self) -> list[str]:
        return []  # The command does not belong to the sources.

    def copy_scripts(self) -> None:
        """Copies the command line as it is: it is not a text in which to replace the first line."""
        self.mkpath(self.build_dir)
        for script in self.scripts:
            target = Path(self.build_dir, Path(script).name)
            shutil.copyfile(script, target)
            target.chmod(0o755)


class Binary(Distribution):
    def has_ext_modules(self) -> bool:
        return True


class Wheel(bdist_wheel):
    """A wheel for one platform, and for each Python: ctypes loads the library."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class SourceDistribution(sdist):
    def make_release_tree(self, base_dir: str, files: Sequence[str]) -> None:
        super().make_release_tree(base_dir, files)
        license_file = Path(base_dir, "LICENSE")
        if license_file.is_symlink():
            license_file.unlink()
            shutil.copy(ROOT / "LICENSE", license_file)
        if not IN_SDIST.exists():
            for name in SOURCES:
                target = Path(base_dir, "rust", name)
                target.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, target)


COMMAND = os.environ.get("NATS_PRESENCE_COMMAND")

setup(
    distclass=Binary,
    cmdclass={"build_py": Build, "build_scripts": BuildScripts, "bdist_wheel": Wheel, "sdist": SourceDistribution},
    scripts=[COMMAND] if COMMAND else [],
)
