package presence

// #include <nats_presence.h>
import "C"

import (
	"context"
	"fmt"
	"strings"
	"unsafe"
)

// Status says how a call failed or why a stream ended: compare with errors.Is(err, presence.ErrOffline). Its numbers are
// those of the C library, fixed for ever.
type Status int32

const (
	ErrInvalid      Status = C.PRESENCE_INVALID       // an argument is wrong; the error's message names it
	ErrOffline      Status = C.PRESENCE_OFFLINE       // the client is offline: it was marked so here, or another process says so
	ErrClosed       Status = C.PRESENCE_CLOSED        // the sender, stream or connection has ended already
	ErrCancelled    Status = C.PRESENCE_CANCELLED     // the stream was cancelled by its reader; at a worker also: the client left before it began; or the context ended
	ErrFull         Status = C.PRESENCE_FULL          // no room to send now; or too much waited for a stream's reader
	ErrTooLarge     Status = C.PRESENCE_TOO_LARGE     // the payload is larger than nats-server's max_payload
	ErrReserved     Status = C.PRESENCE_RESERVED      // the payload would be taken for something else: it begins with __STREAM_END__ or __STREAM_ERROR__
	ErrDisconnected Status = C.PRESENCE_DISCONNECTED  // no connection to nats-server, or lost before the stream had a lane
	ErrPeerGone     Status = C.PRESENCE_PEER_GONE     // the process at the other end is gone
	ErrNoResponders Status = C.PRESENCE_NO_RESPONDERS // nobody serves the subject
	ErrBusy         Status = C.PRESENCE_BUSY          // the worker runs as many streams as it may ("server busy"); or in use by another thread
	ErrTimeout      Status = C.PRESENCE_TIMEOUT       // the time given was over
	ErrRemote       Status = C.PRESENCE_REMOTE        // the worker ended the stream with an error: the message
	ErrForked       Status = C.PRESENCE_FORKED        // not usable in a forked process
	ErrInternal     Status = C.PRESENCE_INTERNAL      // a defect of the library, which remains usable
)

// Error tells what the status means, in a few English words.
func (s Status) Error() string { return C.GoString(C.presence_status_text(C.int32_t(s))) }

// Error is what this package's functions return when they fail, alone or wrapped.
type Error struct {
	Status Status
	// Message says which value was wrong and why, for people; with ErrRemote it is the worker's text. It may be empty.
	// It never holds a password or another secret.
	Message string
}

// Error returns the message, or what the status means if there is none.
func (e *Error) Error() string {
	if e.Message == "" {
		return "presence: " + e.Status.Error()
	}
	return "presence: " + e.Message
}

// Unwrap returns the status, for errors.Is.
func (e *Error) Unwrap() error { return e.Status }

func invalid(format string, args ...any) error {
	return &Error{ErrInvalid, fmt.Sprintf(format, args...)}
}

// failed is the error of a call that tells no more than its status; what says on what it was.
func failed(rc C.int32_t, what string) error {
	if rc == C.PRESENCE_OK {
		return nil
	}
	return &Error{Status(rc), what + ": " + Status(rc).Error()}
}

// reported is the error of a call that filled report.
func reported(rc C.int32_t, report *C.presence_error) error {
	if rc == C.PRESENCE_OK {
		return nil
	}
	return &Error{Status(rc), C.GoString(&report.message[0])}
}

// cancelled is the error of what ended because ctx did; errors.Is finds ErrCancelled and ctx's cause in it.
func cancelled(ctx context.Context) error {
	return fmt.Errorf("%w: %w", &Error{Status: ErrCancelled}, context.Cause(ctx))
}

// cString shows s to C, where its length goes with it.
func cString(s string) *C.char { return (*C.char)(unsafe.Pointer(unsafe.StringData(s))) }

// cText is cString for where C looks for a NUL; what names s in the error if it has one inside.
func cText(what, s string) (*C.char, error) {
	if at := strings.IndexByte(s, 0); at >= 0 {
		return nil, invalid("%s has a NUL at byte %d: it may have none", what, at)
	}
	return cString(s + "\x00"), nil
}
