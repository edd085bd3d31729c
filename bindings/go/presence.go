// Package presence stops work for clients who have left: presence and streams over NATS.
//
// A worker serves stream requests ([Conn.Serve]); a gateway requests streams for its clients ([Conn.Request]) and says
// when a client leaves ([MarkClientOffline], [Session.Close]), or cancels one of its streams ([Stream.Close], the request's
// context). From that moment the worker's [Sender] refuses to send and its handler's context is cancelled, in whatever
// process and language it runs.
//
// Clients are named by an id that the gateway chose: 1 to 1024 bytes of UTF-8 without control characters. The empty id
// means "no client": it is always online, and marking it has no effect.
//
// Everything may be called from any goroutine at any time, also after its owner was closed, unless its comment says
// otherwise. Data passed in is copied before a call returns; data handed out belongs to the receiver. Errors are [*Error]
// values, alone or wrapped: compare with errors.Is(err, presence.ErrOffline) and its kin.
package presence

// #include <nats_presence.h>
// #cgo noescape presence_mark_online
// #cgo nocallback presence_mark_online
// #cgo noescape presence_mark_offline
// #cgo nocallback presence_mark_offline
// #cgo noescape presence_is_online
// #cgo nocallback presence_is_online
import "C"

import "fmt"

// MarkClientOnline marks a client online in this process, until [MarkClientOffline] or an announcement of another process
// says otherwise. Once more is fine. Fails with ErrInvalid, for a bad id only.
func MarkClientOnline(id string) error {
	return idError(C.presence_mark_online(cString(id), C.size_t(len(id))), id)
}

// MarkClientOffline marks a client offline: its senders and streams in this process stop before this returns, its
// sessions are over, and every open connection announces it to the other processes (unless its option "announce" says
// otherwise). It does not block. Marking an unknown client offline announces it all the same. Fails with ErrInvalid, for
// a bad id only.
func MarkClientOffline(id string) error {
	return idError(C.presence_mark_offline(cString(id), C.size_t(len(id))), id)
}

// IsClientOnline reports whether a client is online in this process: it is marked so, has an open session, or has a
// running stream here. The empty id is always online, an unknown or bad one never.
func IsClientOnline(id string) bool {
	return bool(C.presence_is_online(cString(id), C.size_t(len(id))))
}

// OnlineCount returns how many clients are online in this process.
func OnlineCount() uint64 { return uint64(C.presence_online_count()) }

// Version returns the version of the C library, as in "1.2.3".
func Version() string { return C.GoString(C.presence_version()) }

// Session is one of a client's connections to this process, such as one of two tabs of a browser. A client may have sessions
// in several gateway processes; each process knows its own only.
type Session struct{ handle *C.presence_session }

// OpenSession opens a session of a client, who is online here as long as one of its sessions is open. Close ends it, and so does
// [MarkClientOffline]; a session that is forgotten stays open, for the garbage collector must not decide when a client's
// streams end. The empty id gives a session without effect. Fails with ErrInvalid, for a bad id only.
func OpenSession(id string) (*Session, error) {
	s := new(Session)
	if err := idError(C.presence_session_open(cString(id), C.size_t(len(id)), &s.handle), id); err != nil {
		return nil, err
	}
	return s, nil
}

// Close closes the session. With a client's last one in this process, the streams that this process requested for the client
// end with ErrOffline, unless the client is also marked online; after the option "session_grace_ms" if [Connect] set it, and
// without a new session in that time. The client's streams at other gateways go on: [MarkClientOffline] ends them too. Once
// more has no effect. It returns nil.
//
// A worker on level 0 (without this library, or with lanes=false) can be stopped only by announcing the client offline to
// all processes. If one of the streams that end here is on level 0, the client's streams at other gateways end, too.
func (s *Session) Close() error {
	C.presence_session_close(s.handle)
	return nil
}

func idError(rc C.int32_t, id string) error {
	if rc != C.PRESENCE_INVALID {
		return failed(rc, "client")
	}
	if len(id) > 32 {
		id = id[:32] + fmt.Sprintf("… (%d bytes)", len(id))
	}
	return invalid("client id %q is not 1 to 1024 bytes of UTF-8 without control characters", id)
}
