// Package presence stops work for clients that have left: presence and streams over NATS.
//
// A worker serves requests for streams ([Conn.Serve]). A gateway requests streams for its clients ([Conn.Request]) and
// reports when a client leaves ([MarkClientOffline], [Session.Close]), or cancels a single stream ([Stream.Close], the
// context of the request). From that moment the worker's [Sender] refuses to send and the context of its handler is
// cancelled, in whatever process and language the worker runs.
//
// A client is identified by an id that the gateway chooses: 1 to 1024 bytes of UTF-8 without control characters. The
// empty id means "no client": it is always online, and marking it has no effect.
//
// All functions and methods may be called from any goroutine at any time, also after the value or its connection was
// closed, unless their comment says otherwise. Arguments are copied before a call returns; the caller owns all results.
// Errors are [*Error] values, alone or wrapped: compare with errors.Is(err, presence.ErrOffline) and the like.
package presence

// #include <nats_presence.h>
// #cgo noescape presence_mark_online
// #cgo nocallback presence_mark_online
// #cgo noescape presence_mark_offline
// #cgo nocallback presence_mark_offline
// #cgo noescape presence_mark_many
// #cgo nocallback presence_mark_many
// #cgo noescape presence_is_online
// #cgo nocallback presence_is_online
import "C"

import (
	"fmt"
	"strings"
	"unsafe"
)

// MarkClientOnline marks a client online in this process, until [MarkClientOffline] is called or another process
// announces the client offline. Marking a client twice is the same as marking it once. It fails only for an invalid id,
// with ErrInvalid.
func MarkClientOnline(id string) error {
	return idError(C.presence_mark_online(cString(id), C.size_t(len(id))), id)
}

// MarkClientOffline marks a client offline: its senders and streams in this process stop before this returns, its
// sessions end, and every open connection announces it to the other processes (unless the connection's option
// "announce" says otherwise). It does not block. A client that is unknown here is announced too. It fails only for an
// invalid id, with ErrInvalid.
func MarkClientOffline(id string) error {
	return idError(C.presence_mark_offline(cString(id), C.size_t(len(id))), id)
}

// MarkClientsOnline marks many clients online, each as [MarkClientOnline] does, in less time for each. The order in
// which different clients are marked is not defined. It fails only if an id is invalid, with ErrInvalid and a message
// that says which one, counted from 0: then no client was marked.
func MarkClientsOnline(ids []string) error { return markMany(true, ids) }

// MarkClientsOffline marks many clients offline, each as [MarkClientOffline] does, in less time for each. The order in
// which different clients are marked is not defined. It fails only if an id is invalid, with ErrInvalid and a message
// that says which one, counted from 0: then no client was marked.
func MarkClientsOffline(ids []string) error { return markMany(false, ids) }

func markMany(online bool, ids []string) error {
	lens := make([]C.size_t, len(ids))
	for i, id := range ids {
		lens[i] = C.size_t(len(id))
	}
	var report C.presence_error
	all := cString(strings.Join(ids, ""))
	rc := C.presence_mark_many(C.bool(online), all, unsafe.SliceData(lens), C.size_t(len(ids)), &report)
	return callError(rc, &report)
}

// IsClientOnline reports whether a client is online in this process: it is marked online, or it has an open session or
// a running stream here. The empty id is always online; an unknown or invalid id never is.
func IsClientOnline(id string) bool {
	return bool(C.presence_is_online(cString(id), C.size_t(len(id))))
}

// OnlineCount returns how many clients are online in this process.
func OnlineCount() uint64 { return uint64(C.presence_online_count()) }

// Version returns the version of the C library, such as "1.2.3".
func Version() string { return C.GoString(C.presence_version()) }

// Session is one of a client's connections to this process, such as one of two tabs of a browser. A client may have
// sessions in several gateway processes; each process knows only its own.
type Session struct{ handle *C.presence_session }

// OpenSession opens a session of a client. The client is online in this process while at least one of its sessions is
// open. [Session.Close] ends the session, and so does [MarkClientOffline]. No finalizer closes a session that becomes
// unreachable: garbage collection must not decide when a client's streams end. A session of the empty id has no effect.
// OpenSession fails only for an invalid id, with ErrInvalid.
func OpenSession(id string) (*Session, error) {
	s := new(Session)
	if err := idError(C.presence_session_open(cString(id), C.size_t(len(id)), &s.handle), id); err != nil {
		return nil, err
	}
	return s, nil
}

// Close closes the session. When it was the client's last one in this process, the streams that this process requested
// for the client end with ErrOffline, unless the client is also marked online. If [Connect] was given session_grace_ms,
// they end only after that time, and not at all if a new session opens before. The client's streams at other gateways
// go on; [MarkClientOffline] ends those too. Calling Close again has no effect. It always returns nil.
//
// A worker on level 0 (one without this library, or with lanes=false) can be stopped only by announcing the client
// offline to all processes. So if one of the streams that end here is on level 0, the client's streams at other
// gateways end too.
func (s *Session) Close() error {
	C.presence_session_close(s.handle)
	return nil
}

// isOpen reports whether the session was neither closed nor ended by an offline mark.
func (s *Session) isOpen() bool { return bool(C.presence_session_is_open(s.handle)) }

func idError(rc C.presence_status, id string) error {
	if rc != C.PRESENCE_INVALID {
		return statusError(rc, "client")
	}
	if len(id) > 32 {
		id = id[:32] + fmt.Sprintf("… (%d bytes)", len(id))
	}
	return invalid("client id %q is not 1 to 1024 bytes of UTF-8 without control characters", id)
}
