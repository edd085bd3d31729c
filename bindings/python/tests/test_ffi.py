"""_ffi.py agrees with the C header."""

from __future__ import annotations

import builtins
import ctypes
import os
import pickle
import re
import shutil
import subprocess
import sys
from ctypes import POINTER, Structure, c_char_p, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import pytest
from conftest import PACKAGE, ROOT, environment

import nats_presence
from nats_presence import _events, _ffi, errors

HEADER = ROOT / "include/nats_presence.h"
STRUCTS = {
    "presence_error": _ffi.Error,
    "presence_stats": _ffi.Stats,
    "presence_event": _ffi.Event,
    "presence_request_args": _ffi.RequestArgs,
}
# Structs that the caller fills: their texts are Python's.
ARGUMENTS = {"presence_request_args"}
SCALARS = {
    "void": None,
    "bool": ctypes.c_bool,
    "char": ctypes.c_char,
    "int": ctypes.c_int,
    "int32_t": ctypes.c_int32,
    "presence_status": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint32_t": ctypes.c_uint32,
    "uint64_t": c_uint64,
    "size_t": c_size_t,
}
# Functions that return text without a NUL.
NOT_TERMINATED = {"presence_stream_client", "presence_sender_reply"}


def header() -> str:
    """Returns the header without comments and preprocessor lines."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", HEADER.read_text(), flags=re.DOTALL)
    return re.sub(r"^#.*$|\bPRESENCE_NODISCARD\b", "", text, flags=re.MULTILINE)


def split(declaration: str) -> tuple[str, str]:
    """Splits a declaration into type and name: "const char *id" into ("char*", "id")."""
    kind, stars, name = re.fullmatch(r"(.*?)([\s*]+)(\w+)", declaration.strip()).groups()  # type: ignore[union-attr]
    return " ".join(w for w in kind.split() if w not in ("const", "struct")) + stars.replace(" ", ""), name


def parameter(kind: str) -> Any:
    if kind in ("char*", "void*"):
        return c_char_p
    if kind.endswith("**"):
        return POINTER(c_void_p)
    base = kind.rstrip("*")
    if base == kind:
        return SCALARS[kind]
    if base in SCALARS:
        return POINTER(SCALARS[base])
    return POINTER(STRUCTS[base]) if base in STRUCTS else c_void_p


def result(kind: str) -> Any:
    if kind == "char*":
        return c_char_p
    return c_void_p if kind.endswith("*") else SCALARS[kind]


def test_functions_match_the_header() -> None:
    found = {}
    for declaration, parameters in re.findall(r"^([\w\s*]+?)\(([^()]*)\);", header(), flags=re.MULTILINE):
        kind, name = split(declaration)
        names = [] if parameters.strip() == "void" else [parameter(split(p)[0]) for p in parameters.split(",")]
        found[name] = (c_void_p if name in NOT_TERMINATED else result(kind), names)
    assert len(found) > 30
    assert found == _ffi.FUNCTIONS


def fields(struct: str, body: str) -> list[tuple[str, Any]]:
    found = []
    for declaration in filter(None, map(str.strip, body.split(";"))):
        plain, _, count = declaration.partition("[")
        kind, name = split(plain)
        what: Any = c_void_p if kind.endswith("*") else SCALARS[kind]
        if struct in ARGUMENTS:
            what = parameter(kind)
        if count:
            number = count.rstrip("]")
            what = what * (_ffi.ERROR_MESSAGE if number == "PRESENCE_ERROR_MESSAGE" else int(number))
        found.append((name, what))
    return found


def test_structs_match_the_header() -> None:
    found = dict(re.findall(r"typedef struct (\w+) \{(.*?)\}", header(), flags=re.DOTALL))
    assert {name: fields(name, body) for name, body in found.items()} == {n: s._fields_ for n, s in STRUCTS.items()}


def test_constants_match_the_header() -> None:
    found = re.findall(r"^\s*PRESENCE_(\w+) = (-?\d+),", header(), flags=re.MULTILINE)
    assert len(found) > 20
    sizes = ("ERROR_MESSAGE", "FAST_MAX_BYTES")
    ours = {n: v for n, v in vars(_ffi).items() if n.isupper() and isinstance(v, int) and n not in sizes}
    assert {name: int(value) for name, value in found} == ours
    defines = dict(re.findall(r"^#define PRESENCE_(\w+) (\d+)", HEADER.read_text(), flags=re.MULTILINE))
    assert int(defines["ERROR_MESSAGE"]) == _ffi.ERROR_MESSAGE
    assert _ffi.SONAME.endswith(f".so.{defines['ABI']}")


def test_struct_layout_matches_the_c_compiler(tmp_path: Path) -> None:
    """Each field has the same offset in C and in ctypes."""

    def offsets(name: str, struct: type[Structure]) -> list[tuple[str, int]]:
        return [(name, ctypes.sizeof(struct))] + [
            (f"{name}.{field}", getattr(struct, field).offset) for field, *_ in struct._fields_
        ]

    ours = [place for name, struct in STRUCTS.items() for place in offsets(name, struct)]
    lines = [
        f'printf("%zu\\n", {"offsetof(%s, %s)" % tuple(name.split(".")) if "." in name else f"sizeof({name})"});'  # noqa: UP031
        for name, _ in ours
    ]
    source = "#include <stdio.h>\n#include <nats_presence.h>\nint main(void) {\n" + "\n".join(lines) + "\nreturn 0; }\n"
    (tmp_path / "layout.c").write_text(source)
    program = tmp_path / "layout"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-I", HEADER.parent, tmp_path / "layout.c", "-o", program], check=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert [int(line) for line in output.split()] == [place for _, place in ours]


def test_event_layouts_match_the_struct() -> None:
    assert _events.EVENT_LAYOUT.size == _events.MESSAGE_LAYOUT.size == ctypes.sizeof(_ffi.Event)
    events = _events.EventBatch(3)
    fields = [name for name, *_ in _ffi.Event._fields_ if name != "reserved"]
    numbers = list(range(1, len(fields) + 1))
    for field, number in zip(fields, numbers):
        setattr(events._array[0], field, number)
    events._array[1].kind = 7
    events.count = 2
    first, second = events
    assert first == tuple(numbers)
    assert second == events[1] == (7, *[0] * (len(fields) - 1))
    read = [fields.index(name) + 1 for name in ("kind", "tag", "data", "data_len")]
    assert events.message_fields() == [tuple(read), (7, 0, 0, 0)]
    events.clear()
    assert list(events) == events.message_fields() == []
    assert not any(events._bytes)


def test_bytes_are_copied_from_memory() -> None:
    text = ctypes.create_string_buffer("a\0Ü".encode(), 16)
    address = ctypes.addressof(text)
    taken = _events.copy_bytes(address, 4)
    text[0] = b"b"
    assert taken == "a\0Ü".encode()
    assert _events.decode_text(address, 4) == "b\0Ü"
    assert _events.copy_bytes(0, 0) == _events.copy_bytes(1, 0) == b""


def test_untyped_calls_pass_the_types_of_the_header() -> None:
    """ctypes converts these arguments by itself. Their sizes are those of the parameters in the header."""
    kinds = {"P": c_void_p, "q": ctypes.c_int64, "l": ctypes.c_int64, "L": c_size_t, "Q": c_size_t}
    calls = {
        "presence_sender_send": (_ffi.fast_send, ["P", None, "L"]),
        "presence_sender_send_many": (_ffi.fast_send_many, ["P", None, None, "L"]),
        "presence_sender_send_wait": (_ffi.fast_send_wait, ["P", None, "L", "l"]),
    }
    assert f"{_ffi.handle_argument(16)!r}".startswith("<cparam 'P'")
    assert {f"{size!r}"[9] for size in _ffi.SIZE_ARGUMENTS} == {"L"}
    assert f"{_ffi.ZERO_TIMEOUT!r}"[9] == "l"
    for name, (function, given) in calls.items():
        returns, takes = _ffi.FUNCTIONS[name]
        assert function.restype is returns
        assert function.argtypes is None
        for kind, wanted in zip(given, takes):
            assert kind is None or ctypes.sizeof(kinds[kind]) == ctypes.sizeof(wanted)
        assert len(given) == len(takes)


def test_each_status_has_an_exception() -> None:
    statuses = {v: n for n, v in vars(_ffi).items() if n.isupper() and isinstance(v, int) and v < 0}
    for status, name in statuses.items():
        failure = errors.error(status, "why")
        words = {"CANCELLED": "STREAM_CANCELLED", "TIMEOUT": "PRESENCE_TIMEOUT"}.get(name, name)
        assert type(failure).__name__.lower() == words.replace("_", "").lower() + "error"
        assert (failure.status, failure.message, str(failure)) == (status, "why", "why")
        assert type(failure).__name__ in nats_presence.__all__
    assert isinstance(errors.error(-99, "?"), nats_presence.InternalError)


def test_handler_errors_are_checked_and_copied() -> None:
    failed = nats_presence.HandlerError("why", 42)
    assert str(failed) == "error 42: why"
    assert str(nats_presence.HandlerError("why")) == "why"
    copied = pickle.loads(pickle.dumps(failed))
    assert (type(copied), copied.message, copied.code) == (nats_presence.HandlerError, "why", 42)
    assert not isinstance(failed, nats_presence.PresenceError)
    codes: list[Any] = [-1, 2**31, "4", None, 1.5]
    for code in codes:
        with pytest.raises(nats_presence.InvalidError, match="code"):
            nats_presence.HandlerError("why", code)
    no_text: Any = 42
    with pytest.raises(nats_presence.InvalidError, match="message 42: must be a str"):
        nats_presence.HandlerError(no_text)
    copied = pickle.loads(pickle.dumps(errors.error(_ffi.REMOTE, "why", 42)))
    assert (type(copied), copied.message, copied.code) == (nats_presence.RemoteError, "why", 42)
    assert errors.error(_ffi.REMOTE, "why").code == 0


def test_exceptions_are_the_builtins_that_programs_catch() -> None:
    expected = {
        TimeoutError: {_ffi.TIMEOUT},
        ConnectionError: {_ffi.DISCONNECTED, _ffi.PEER_GONE},
        ValueError: {_ffi.INVALID, _ffi.TOO_LARGE, _ffi.RESERVED},
    }
    for builtin, statuses in expected.items():
        assert {status for status in range(-15, 0) if isinstance(errors.error(status, "why"), builtin)} == statuses
    assert set(nats_presence.__all__).isdisjoint(dir(builtins))


def test_version_matches_the_library() -> None:
    assert nats_presence.__version__ == _ffi.lib.presence_version().decode()


def import_fresh(directory: Path = PACKAGE, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import nats_presence; print(nats_presence._ffi.lib._name)"],
        cwd=directory, env=environment(**env), capture_output=True, text=True,
    )  # fmt: skip


def test_the_import_error_names_a_library_that_does_not_load() -> None:
    for path, why in (("/nowhere/lib.so", "/nowhere/lib.so: "), ("libc.so.6", "libc.so.6: undefined symbol")):
        run = import_fresh(NATS_PRESENCE_LIBRARY=path)
        assert run.returncode == 1
        assert "ImportError: cannot load libnats_presence.so.0" in run.stderr
        assert why in run.stderr


def test_library_lookup_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NATS_PRESENCE_LIBRARY", raising=False)
    beside = str(PACKAGE / "nats_presence" / _ffi.SONAME)
    prefix = str(Path(sys.prefix, "lib", _ffi.SONAME))
    assert _ffi._library_paths() == [beside, _ffi.SONAME, prefix, "/usr/local/lib/" + _ffi.SONAME]
    monkeypatch.setenv("NATS_PRESENCE_LIBRARY", "/mine.so")
    assert _ffi._library_paths() == ["/mine.so"]


def test_a_library_beside_the_package_is_found_first(tmp_path: Path) -> None:
    copy = tmp_path / "nats_presence"
    shutil.copytree(PACKAGE / "nats_presence", copy)
    library = re.search(r"/\S*libnats_presence\S*", Path("/proc/self/maps").read_text())
    assert library is not None
    shutil.copy(library[0], copy / _ffi.SONAME)
    run = import_fresh(tmp_path, NATS_PRESENCE_LIBRARY="", PYTHONPATH="")
    assert run.stdout.strip() == str(copy / _ffi.SONAME), run.stderr
