"""The C ABI of libnats_presence, as include/nats_presence.h declares it. A test compares the two.

A handle is a `c_void_p` (in Python an `int`). Bytes that the library only reads are a `c_char_p` (`bytes`).

The functions that are called for every message exist a second time, as `fast_...`: see the end of this file.
"""

from __future__ import annotations

import os
import sys
from ctypes import (
    CDLL,
    POINTER,
    PyDLL,
    Structure,
    c_bool,
    c_char,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path
from typing import Any

SONAME = "libnats_presence.so.0"
ERROR_MESSAGE = 508

# presence_status
OK = 0
INVALID = -1
OFFLINE = -2
CLOSED = -3
CANCELLED = -4
FULL = -5
TOO_LARGE = -6
RESERVED = -7
DISCONNECTED = -8
PEER_GONE = -9
NO_RESPONDERS = -10
BUSY = -11
TIMEOUT = -12
REMOTE = -13
FORKED = -14
INTERNAL = -15

# presence_event_kind
EVENT_REQUEST = 1
EVENT_DATA = 2
EVENT_END = 3
EVENT_ERROR = 4
EVENT_STOPPED = 5
EVENT_WRITABLE = 6
EVENT_ONLINE = 7
EVENT_OFFLINE = 8
EVENT_CONNECTED = 9
EVENT_DISCONNECTED = 10
EVENT_LOG = 11


class Error(Structure):
    _fields_ = [("status", c_int32), ("message", c_char * ERROR_MESSAGE)]


class RequestArgs(Structure):
    _fields_ = [
        ("size", c_size_t),
        ("subject", c_char_p),
        ("data", c_char_p),
        ("data_len", c_size_t),
        ("client", c_char_p),
        ("client_len", c_size_t),
        ("tag", c_uint64),
        ("config", c_void_p),
    ]


class Stats(Structure):
    _fields_ = [
        ("connected", c_uint64),
        ("connects", c_uint64),
        ("streams", c_uint64),
        ("senders", c_uint64),
        ("requests", c_uint64),
        ("requests_busy", c_uint64),
        ("requests_ignored", c_uint64),
        ("messages_out", c_uint64),
        ("messages_in", c_uint64),
        ("messages_ignored", c_uint64),
        ("offline_out", c_uint64),
        ("offline_in", c_uint64),
        ("bytes_waiting", c_uint64),
        ("lanes", c_uint64),
        ("reserved", c_uint64 * 6),
    ]


class Event(Structure):
    _fields_ = [
        ("kind", c_int32),
        ("status", c_int32),
        ("tag", c_uint64),
        ("sender", c_void_p),
        ("stream", c_void_p),
        ("client", c_void_p),
        ("client_len", c_size_t),
        ("subject", c_void_p),
        ("subject_len", c_size_t),
        ("data", c_void_p),
        ("data_len", c_size_t),
        ("error_code", c_int32),
        ("reserved", c_uint32 * 3),
    ]


_handle, _out, _error = c_void_p, POINTER(c_void_p), POINTER(Error)

# name: (result type, argument types)
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "presence_status_text": (c_char_p, [c_int32]),
    "presence_event_kind_text": (c_char_p, [c_int32]),
    "presence_version": (c_char_p, []),
    "presence_config_new": (_handle, []),
    "presence_config_set": (c_int32, [_handle, c_char_p, c_char_p]),
    "presence_config_error": (c_int32, [_handle, _error]),
    "presence_config_free": (None, [_handle]),
    "presence_connect": (c_int32, [c_char_p, _handle, _out, _error]),
    "presence_listen_offline": (c_int32, [_handle]),
    "presence_conn_watch": (c_int32, [_handle, _handle, c_uint64]),
    "presence_close": (c_int32, [_handle, c_int64]),
    "presence_conn_stats": (c_int32, [_handle, POINTER(Stats)]),
    "presence_metrics": (c_int64, [c_char_p, c_size_t]),
    "presence_request": (c_int32, [_handle, _handle, POINTER(RequestArgs), _out, _error]),
    "presence_stream_tag": (c_uint64, [_handle]),
    "presence_stream_client": (c_void_p, [_handle, POINTER(c_size_t)]),
    "presence_stream_consumed": (c_int32, [_handle, c_size_t]),
    "presence_stream_cancel": (c_int32, [_handle]),
    "presence_stream_free": (None, [_handle]),
    "mark_client_online": (c_int32, [c_char_p]),
    "mark_client_offline": (c_int32, [c_char_p]),
    "is_client_online": (c_bool, [c_char_p]),
    "presence_mark_online": (c_int32, [c_char_p, c_size_t]),
    "presence_mark_offline": (c_int32, [c_char_p, c_size_t]),
    "presence_mark_many": (c_int32, [c_bool, c_char_p, POINTER(c_size_t), c_size_t, POINTER(Error)]),
    "presence_is_online": (c_bool, [c_char_p, c_size_t]),
    "presence_online_count": (c_uint64, []),
    "presence_session_open": (c_int32, [c_char_p, c_size_t, _out]),
    "presence_session_is_open": (c_bool, [_handle]),
    "presence_session_close": (None, [_handle]),
    "presence_queue_new": (c_int32, [_out]),
    "presence_queue_fd": (c_int, [_handle]),
    "presence_queue_wait": (c_int64, [_handle, POINTER(Event), c_size_t, c_int64]),
    "presence_queue_wake": (None, [_handle]),
    "presence_queue_free": (None, [_handle]),
    "presence_watch": (c_int32, [_handle, c_uint64]),
    "presence_serve": (c_int32, [_handle, _handle, c_char_p, c_char_p, c_uint32, c_uint64, _out, _error]),
    "presence_service_stop": (c_int32, [_handle]),
    "presence_service_free": (None, [_handle]),
    "presence_sender_set_tag": (c_int32, [_handle, c_uint64]),
    "presence_sender_send": (c_int32, [_handle, c_char_p, c_size_t]),
    "presence_sender_send_many": (c_int64, [_handle, c_char_p, POINTER(c_size_t), c_size_t]),
    "presence_sender_send_wait": (c_int32, [_handle, c_char_p, c_size_t, c_int64]),
    "presence_sender_error": (c_int32, [_handle, c_char_p, c_size_t]),
    "presence_sender_error_code": (c_int32, [_handle, c_int32, c_char_p, c_size_t]),
    "presence_sender_end": (c_int32, [_handle]),
    "presence_sender_is_closed": (c_bool, [_handle]),
    "presence_sender_send_count": (c_uint64, [_handle]),
    "presence_sender_max_message": (c_size_t, [_handle]),
    "presence_sender_status_word": (c_void_p, [_handle]),
    "presence_sender_header": (c_int32, [_handle, c_char_p, _out, POINTER(c_size_t)]),
    "presence_sender_header_at": (
        c_int32,
        [_handle, c_size_t, _out, POINTER(c_size_t), _out, POINTER(c_size_t)],
    ),
    "presence_sender_reply": (c_void_p, [_handle, POINTER(c_size_t)]),
    "presence_sender_free": (None, [_handle]),
}


def _library_paths() -> list[str]:
    chosen = os.environ.get("NATS_PRESENCE_LIBRARY")
    if chosen:
        return [chosen]
    beside = Path(__file__).with_name(SONAME)
    installed = [Path(sys.prefix, "lib", SONAME), Path("/usr/local/lib", SONAME)]
    return [str(beside), SONAME, *map(str, installed)]


def _load() -> CDLL:
    tried = []
    for path in _library_paths():
        try:
            library = CDLL(path)
            for name, (result, arguments) in FUNCTIONS.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
            return library
        except (OSError, AttributeError) as error:
            tried.append(f"\n  {error}")
    raise ImportError(
        f"cannot load {SONAME}: install it with `make install`, or set NATS_PRESENCE_LIBRARY to its path. Tried:"
        + "".join(tried)
    )


lib = _load()

# These functions never block, so they are called without releasing the GIL. To release and take it again doubles the
# cost of a call; while another thread keeps the interpreter busy it costs far more.
_library_with_gil = PyDLL(lib._name, handle=lib._handle)


def _typed_function(name: str) -> Any:
    function = _library_with_gil[name]
    function.restype, function.argtypes = FUNCTIONS[name]
    return function


def _untyped_function(name: str) -> Any:
    """A function without argtypes, which halves the cost of a call. It takes bytes and arguments made by from_param."""
    function = _library_with_gil[name]
    function.restype, _ = FUNCTIONS[name]
    return function


fast_queue_wait = _typed_function("presence_queue_wait")
fast_stream_consumed = _typed_function("presence_stream_consumed")
fast_send = _untyped_function("presence_sender_send")
fast_send_many = _untyped_function("presence_sender_send_many")
fast_send_wait = _untyped_function("presence_sender_send_wait")

handle_argument = c_void_p.from_param
FAST_MAX_BYTES = 4096
SIZE_ARGUMENTS = tuple(map(c_size_t.from_param, range(FAST_MAX_BYTES + 1)))
ZERO_TIMEOUT = c_int64.from_param(0)
