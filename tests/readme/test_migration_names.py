"""Each name in the tables of docs/migrate.md exists: ours in the header and the bindings, nats-py's in nats-py."""

import inspect
import re
import sys
from pathlib import Path

import nats.errors
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bindings/python"))

import nats_presence
from nats_presence import aio

ROOT = Path(__file__).resolve().parents[2]
HEADER = (ROOT / "include/nats_presence.h").read_text()
GO = "\n".join(file.read_text() for file in (ROOT / "bindings/go").glob("*.go") if not file.stem.endswith("_test"))
NATSGO = (ROOT / "bindings/go/message/natsgo/natsgo.go").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", (ROOT / "docs/migrate.md").read_text(), re.DOTALL | re.M))


def parameters(function):
    return set(inspect.signature(function).parameters)


def public(*things):
    return {name for thing in things for name in dir(thing) if not name.startswith("_")}


GO_NAMES = set(re.findall(r"^(?:func (?:\(.*?\) )?|type |\t)([A-Z]\w*)", GO, re.M))
OPTIONS = set(re.findall(r'#define PRESENCE_OPTION_\w+ "(\w+)"', HEADER))
C_NAMES = OPTIONS | set(re.findall(r"\b(?:presence_|PRESENCE_|mark_client_)\w+", HEADER)) | {"tag"}
PYTHON_NAMES = (
    public(nats_presence, aio, aio.Connection, aio.Stream, aio.Sender, nats_presence.Client, nats_presence.Request)
    | parameters(aio.connect) | parameters(aio.Connection.stream) | parameters(aio.Connection.serve)
    | parameters(aio.Connection.close) | OPTIONS | {"nats_presence", "presence_conn_watch"}
)  # fmt: skip
NATS_PY_NAMES = (
    public(nats, nats.errors, Client, Msg, Subscription)
    | parameters(Client.connect) | parameters(Client.publish) | parameters(Client.subscribe)
)  # fmt: skip
# Words of the languages, and variables in the examples of calls.
OTHERS = {"async", "await", "with", "as", "for", "in", "range", "False", "nats", "ssl", "SSLContext", "presence",
          "natsgo", "nc", "sub", "msg", "conn", "client", "stream", "sender", "request", "message", "subject", "queue",
          "handler", "data", "inbox", "id", "name", "ctx", "err"}  # fmt: skip
TEXTS = re.compile(r'"[^"]*"|\w+://')


def tables(section):
    """Yields the tables of a section: the headings of its columns, and the names in the code of each column."""
    for table in re.findall(r"(?:^\|.*\n)+", SECTIONS[section], re.M):
        head, _, *rows = (line.split("|")[1:-1] for line in table.splitlines())
        assert {len(row) for row in rows} == {len(head)}
        cells = zip(*rows)  # by columns
        columns = [{name for cell in column for code in re.findall("`(.*?)`", cell) for name in names(code)}
                   for column in cells]  # fmt: skip
        yield [cell.strip(" `") for cell in head], columns


def names(code):
    return set(re.findall(r"[A-Za-z_]\w*", TEXTS.sub("", code))) - OTHERS


KNOWN = {
    ("From nats.go", "with nats-presence"): GO_NAMES,
    ("From nats.go", "Go"): GO_NAMES,
    ("From nats.go", "C, Python"): C_NAMES | PYTHON_NAMES,
    ("From nats-py", "by hand"): NATS_PY_NAMES,
    ("From nats-py", "with nats-presence"): PYTHON_NAMES,
    ("From nats-py", "nats-py"): NATS_PY_NAMES,
    ("From nats-py", "Python"): PYTHON_NAMES,
    ("From nats.c", "with nats-presence"): C_NAMES,
    ("From nats.c", "presence_config_set"): C_NAMES,
}


@pytest.mark.parametrize(("section", "column"), KNOWN)
def test_names_exist(section, column):
    found = [columns[head.index(column)] for head, columns in tables(section) if column in head]
    assert len(found) == 1
    assert len(found[0]) >= 5
    assert sorted(found[0] - KNOWN[section, column]) == []


def test_functions_of_natsgo_exist():
    for name in re.findall(r"`natsgo\.(\w+)\(", SECTIONS["From nats.go"]):
        assert f"func {name}(" in NATSGO
