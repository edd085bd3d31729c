"""Invalid input raises an exception that names the value and the reason, and changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import LIMIT, Server, until
from test_presence import BAD_IDS

import nats_presence
from nats_presence import (
    Connection,
    DisconnectedError,
    InvalidError,
    PresenceError,
    ReservedError,
    TooLargeError,
    aio,
    online_count,
)
from nats_presence._arguments import Option


@pytest.fixture
def conn(url: str) -> Iterator[Connection]:
    with nats_presence.connect(url) as conn:
        yield from check_unchanged(conn)


@pytest.fixture
def conn_without_lanes(url: str) -> Iterator[Connection]:
    with nats_presence.connect(url, lanes=False) as conn:
        yield from check_unchanged(conn)


def check_unchanged(conn: Connection) -> Iterator[Connection]:
    yield conn
    until(lambda: conn.stats()["streams"] == 0 == conn.stats()["senders"])
    assert online_count() == 0


def check(caught: pytest.ExceptionInfo[PresenceError], *expected: str) -> None:
    for part in expected:
        assert part in caught.value.message


@pytest.mark.parametrize("client", [*BAD_IDS, " white space around "])
def test_invalid_client_ids(conn: Connection, client: Any) -> None:
    with pytest.raises(InvalidError) as caught:
        conn.stream("answers", client_id=client)
    check(caught, "client id")


class SecretObject:
    def __repr__(self) -> str:
        return SECRET


SUBJECTS = [None, 3, b"x", "", "a b", "a\r\nb", "a\tb", "\0", "a\0b", "a\ud800", ".a", "a.", "a..b"]


@pytest.mark.parametrize("subject", [*SUBJECTS, "a.*", "a.>"])
def test_invalid_subjects_of_requests(conn: Connection, subject: Any) -> None:
    with pytest.raises(InvalidError) as caught:
        conn.stream(subject)
    check(caught, "subject")


@pytest.mark.parametrize("subject", [*SUBJECTS, "a.>.b"])
def test_invalid_subjects_of_services(conn: Connection, subject: Any) -> None:
    with pytest.raises(InvalidError) as caught:
        conn.service(subject)(lambda request, sender: None)
    check(caught, "subject")


@pytest.mark.parametrize("queue", [None, "a b", "a\nb", "\0"])
def test_invalid_queue_groups(conn: Connection, queue: Any) -> None:
    with pytest.raises(InvalidError):
        conn.service("answers", queue=queue)(lambda request, sender: None)


@pytest.mark.parametrize("numbers", [{"max_streams": -1}, {"max_streams": 2**32}, {"max_streams": "2"}, {"threads": 0}])
def test_invalid_numbers_of_a_service(conn: Connection, numbers: dict[str, Any]) -> None:
    with pytest.raises(InvalidError) as caught:
        conn.service("answers", **numbers)(lambda request, sender: None)
    check(caught, *numbers, *map(repr, numbers.values()))


@pytest.mark.parametrize("data", [None, 7, ["a"], "a\ud800"])
def test_payloads_of_a_wrong_type(conn: Connection, data: Any) -> None:
    with pytest.raises(InvalidError) as caught:
        conn.stream("answers", data)
    check(caught, f"payload {data!r}")


Refusals = list[tuple[Any, type[PresenceError], str]]
INVALID_PAYLOADS: Refusals = [
    (None, InvalidError, "payload None"),
    (7, InvalidError, "payload 7"),
    ("\ud800", InvalidError, "cannot be encoded as UTF-8"),
]
MARKERS: Refusals = [
    ("__STREAM_END__", ReservedError, "marker"),
    (b"__STREAM_END__ and more", ReservedError, "marker"),
    ("__STREAM_ERROR__:why", ReservedError, "marker"),
]
MAX_PAYLOAD = 1 << 20
RESERVE = 64


def refuse(conn: Connection, max_size: int, refused: Refusals) -> None:
    """Checks that each of these messages is refused, and that a message of the maximum size can be sent afterwards."""

    @conn.service("answers")
    def handler(request: nats_presence.Request, sender: nats_presence.Sender) -> None:
        too_large: Refusals = [(b"x" * (max_size + 1), TooLargeError, f"{max_size + 1} bytes")]
        for data, kind, expected in refused + too_large:
            for send in (
                sender.send,
                lambda data: sender.send_many([data, b"x"]),
                lambda data: sender.send_many({data}),
            ):
                with pytest.raises(kind) as caught:
                    send(data)
                check(caught, expected)
        with pytest.raises(InvalidError):
            sender.send_many([b"x", None])  # type: ignore[list-item]
        for name in (None, "a\0b"):
            with pytest.raises(InvalidError, match="header"):
                request.header(name)  # type: ignore[arg-type]
        assert sender.send_count == 0
        assert not sender.closed
        sender.send(b"x" * max_size)

    assert list(conn.stream("answers")) == [b"x" * max_size]


def test_a_refused_payload_leaves_the_stream_open(conn: Connection) -> None:
    refuse(conn, MAX_PAYLOAD - RESERVE, INVALID_PAYLOADS)


def test_level_0_refuses_markers(conn_without_lanes: Connection) -> None:
    refuse(conn_without_lanes, MAX_PAYLOAD - RESERVE, INVALID_PAYLOADS + MARKERS)


def test_a_lane_carries_markers(conn: Connection) -> None:
    conn.service("answers")(lambda request, sender: sender.send_many([data for data, _, _ in MARKERS]))
    assert list(conn.stream("answers")) == [b"__STREAM_END__", b"__STREAM_END__ and more", b"__STREAM_ERROR__:why"]


def test_a_request_over_max_payload(conn: Connection, conn_without_lanes: Connection) -> None:
    with pytest.raises(TooLargeError) as caught:
        conn_without_lanes.stream("answers", b"x" * (MAX_PAYLOAD + 1))
    check(caught, str(MAX_PAYLOAD + 1), str(MAX_PAYLOAD))
    with pytest.raises(TooLargeError) as caught:
        conn.stream("answers", b"x" * MAX_PAYLOAD)  # The header that offers a lane counts, too.
    check(caught, "headers", str(MAX_PAYLOAD))


REQUEST_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"colour": "red"}, "colour"),
    ({"retries": -1}, "retries"),
    ({"retries": "many"}, "retries"),
    ({"retries": 1.5}, "retries"),
    ({"name": "of a connection"}, "name"),
    ({"re\0tries": 1}, "option"),
    ({"stream_buffer_bytes": True}, "stream_buffer_bytes"),
    ({"manual_credit": False}, "manual_credit"),
    ({"lanes": False}, "lanes"),
    ({"timeout": 0 - 1}, "timeout -1"),
    ({"timeout": float("nan")}, "timeout nan"),
    ({"timeout": float("inf")}, "timeout inf"),
    ({"timeout": "5"}, "timeout '5'"),
    ({"headers": {"Connect-ID": "other"}}, "Connect-ID"),
    ({"headers": {"X Y": "1"}}, "X Y"),
    ({"headers": {"X": "a\r\nY: b"}}, "X"),
    ({"headers": {"X": "a\0"}}, "NUL"),
]


@pytest.mark.parametrize(("options", "expected"), REQUEST_OPTIONS)
def test_invalid_options_of_a_request(conn: Connection, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(InvalidError) as caught:
        conn.stream("answers", **options)
    check(caught, expected)


CONNECT_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"colour": "red"}, "colour"),
    ({"announce": "sometimes"}, "sometimes"),
    ({"connect_timeout_ms": "soon"}, "connect_timeout_ms"),
    ({"tls_first": "perhaps"}, "tls_first"),
    ({"name": "a\0b"}, "name"),
    ({"name": "a\ud800"}, "name"),
    ({"retries": 1}, "retries"),
    ({"lanes": "perhaps"}, "lanes"),
    ({"heartbeat_ms": 0}, "heartbeat_ms"),
    ({"heartbeat_ms": -1}, "heartbeat_ms"),
    ({"peer_grace_ms": -1}, "peer_grace_ms"),
    ({"manual_credit": True}, "manual_credit"),
]


@pytest.mark.parametrize(("options", "expected"), CONNECT_OPTIONS)
def test_invalid_options_of_a_connection(url: str, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(InvalidError) as caught:
        nats_presence.connect(url, **options)
    check(caught, expected)


def test_valid_options_of_a_connection(url: str) -> None:
    options = {"name": "Ünï", "tls_first": False, "announce": "never", "max_reconnects": 3, "token": None}
    options |= {"lanes": True, "heartbeat_ms": 500, "peer_grace_ms": 0, "send_buffer_bytes": 1 << 20}
    with nats_presence.connect(url, **options) as conn:  # type: ignore[arg-type]
        assert conn.stats()["connected"] == 1


@pytest.mark.parametrize("url", [None, 4222, "", "nats://", "http://a", "nats://a:99999", "nats://a b", "nats://a\0"])
def test_malformed_urls(url: Any) -> None:
    with pytest.raises(InvalidError) as caught:
        nats_presence.connect(url)
    check(caught, "URL" if isinstance(url, str) and "\0" not in url else "url")


def test_connecting_to_an_unreachable_server(server: Server) -> None:
    server.stop()
    for _ in range(2):
        with pytest.raises(DisconnectedError) as caught:
            nats_presence.connect(server.url, connect_timeout_ms=int(LIMIT * 1000))
        check(caught, str(server.port))

    async def main() -> None:
        async with aio.connect(server.url):
            pass

    with pytest.raises(DisconnectedError):
        asyncio.run(main())


def test_wrong_credentials_are_refused_and_not_shown(tmp_path: Path) -> None:
    server = Server(tmp_path, 'authorization { user: ada, password: "right-secret" }')
    try:
        with nats_presence.connect(server.url, user="ada", password="right-secret") as conn:
            assert conn.stats()["connected"] == 1
        at = server.url.replace("nats://", "nats://ada:wrong-secret@")
        attempts: list[tuple[str, dict[str, str]]] = [
            (server.url, {}),
            (server.url, {"user": "ada", "password": "wrong-secret"}),
            (server.url, {"token": "wrong-secret"}),
            (at, {}),
        ]
        for url, options in attempts:
            with pytest.raises(DisconnectedError) as caught:
                nats_presence.connect(url, **options)  # type: ignore[arg-type]
            assert "secret" not in caught.value.message
    finally:
        server.stop()


SECRET = "s3cret"
INVALID_TEXTS = [SECRET.encode(), f"{SECRET}\0", f"{SECRET}\ud800", [SECRET], SecretObject()]


@pytest.mark.parametrize("value", INVALID_TEXTS, ids=lambda value: type(value).__name__)
def test_no_message_shows_a_secret(conn: Connection, url: str, value: Any) -> None:
    at = value if not isinstance(value, str) else f"nats://me:{value}@127.0.0.1"
    attempts: list[tuple[str, Callable[[], object]]] = [("url", lambda: nats_presence.connect(at))]
    for option in ("password", "token", "nkey_seed", "name"):
        attempts.append((f"option {option}", partial(nats_presence.connect, url, **{option: value})))
    attempts.append(("option header.X", lambda: conn.stream("answers", headers={"X": value})))
    for expected, attempt in attempts:
        with pytest.raises(InvalidError) as caught:
            attempt()
        check(caught, expected)
        assert SECRET not in caught.value.message
        assert caught.value.__cause__ is None


def test_options_and_headers_take_text_numbers_and_paths(conn: Connection, tmp_path: Path) -> None:
    sent: dict[str, Option] = {"Text": "ü", "Int": 3, "Float": 0.5, "Bool": True, "Path": tmp_path, "None": None}

    @conn.service("answers")
    def handler(request: nats_presence.Request, sender: nats_presence.Sender) -> None:
        sender.send_many([str(request.header(name)) for name in sent])

    got = [message.decode() for message in conn.stream("answers", headers=sent)]
    assert got == ["ü", "3", "0.5", "true", str(tmp_path), "None"]
    with pytest.raises(InvalidError, match="tls_ca_file"):
        nats_presence.connect("tls://127.0.0.1", tls_ca_file=tmp_path / "none.pem")


@pytest.mark.parametrize("drain", [-1, float("nan"), "5"])
def test_invalid_drain_times(conn: Connection, drain: Any) -> None:
    with pytest.raises(InvalidError) as caught:
        conn.close(drain)
    check(caught, f"drain {drain!r}")
    assert conn.stats()["connected"] == 1


@pytest.mark.parametrize("long", [1e9, 1e300, 10**400], ids=["1e9", "1e300", "1e400"])
def test_durations_may_be_of_any_length(url: str, long: float) -> None:
    conn = nats_presence.connect(url)
    conn.service("answers")(lambda request, sender: sender.send("x"))
    assert list(conn.stream("answers", timeout=long)) == [b"x"]
    conn.close(long)

    async def main() -> None:
        async with aio.connect(url) as conn:
            await conn.close(long)

    asyncio.run(main())


async def all_of(stream: aio.Stream) -> list[bytes]:
    return [message async for message in stream]


async def returns_nothing(request: object, sender: object) -> None:
    pass


def test_asyncio_refuses_the_same_input(url: str) -> None:
    async def main() -> None:
        async with aio.connect(url) as conn:
            for subject in (None, "", "a b", "a\0b"):
                with pytest.raises(InvalidError, match="subject"):
                    conn.stream(subject)  # type: ignore[arg-type]
                with pytest.raises(InvalidError, match="subject"):
                    await conn.serve(subject, returns_nothing)  # type: ignore[arg-type]
            for client in BAD_IDS:
                with pytest.raises(InvalidError, match="client id"):
                    conn.stream("answers", client_id=client)  # type: ignore[arg-type]
            for options, expected in REQUEST_OPTIONS:
                with pytest.raises(InvalidError, match=expected):
                    conn.stream("answers", **options)
            with pytest.raises(InvalidError, match="drain"):
                await conn.close(-1)

            async def handler(request: nats_presence.Request, sender: aio.Sender) -> None:
                with pytest.raises(TooLargeError):
                    await sender.send(b"x" * MAX_PAYLOAD)
                with pytest.raises(TooLargeError):
                    await sender.send_many([b"x" * MAX_PAYLOAD, b"x"])
                for data, kind, expected in INVALID_PAYLOADS:
                    with pytest.raises(kind, match=expected):
                        await sender.send(data)
                    with pytest.raises(kind, match=expected):
                        await sender.send_many([b"x", data])
                await sender.send("fine")

            await conn.serve("answers", handler)

            assert await asyncio.wait_for(all_of(conn.stream("answers")), LIMIT) == [b"fine"]
            assert conn.stats()["streams"] == 0

    asyncio.run(main())
