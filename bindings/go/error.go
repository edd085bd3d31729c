package presence

// #include <nats_presence.h>
import "C"

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"unsafe"
)

// Status says why a call failed or why a stream ended: compare with errors.Is(err, presence.ErrOffline). Its numbers
// are those of the C library and never change.
type Status int32

const (
	// ErrInvalid: an argument is wrong; the error's message names it.
	ErrInvalid Status = C.PRESENCE_INVALID
	// ErrOffline: the client is offline: it was marked so here, or another process says so.
	ErrOffline Status = C.PRESENCE_OFFLINE
	// ErrClosed: the sender, stream, service or connection has ended already.
	ErrClosed Status = C.PRESENCE_CLOSED
	// ErrCancelled: the reader cancelled the stream; at a worker also: the client left before the stream began; or the
	// context ended.
	ErrCancelled Status = C.PRESENCE_CANCELLED
	// ErrFull: the send buffer or the window is full; or the reader of a stream on level 0 left too much unread.
	ErrFull Status = C.PRESENCE_FULL
	// ErrTooLarge: the payload is larger than nats-server's max_payload.
	ErrTooLarge Status = C.PRESENCE_TOO_LARGE
	// ErrReserved: the peer would misread the payload: it begins with __STREAM_END__ or __STREAM_ERROR__.
	ErrReserved Status = C.PRESENCE_RESERVED
	// ErrDisconnected: there is no connection to nats-server, or it was lost while a stream had no lane.
	ErrDisconnected Status = C.PRESENCE_DISCONNECTED
	// ErrPeerGone: the process at the other end is gone.
	ErrPeerGone Status = C.PRESENCE_PEER_GONE
	// ErrNoResponders: no worker serves the subject.
	ErrNoResponders Status = C.PRESENCE_NO_RESPONDERS
	// ErrBusy: the worker runs as many streams as it may ("server busy"); or another goroutine uses the service.
	ErrBusy Status = C.PRESENCE_BUSY
	// ErrTimeout: the time limit passed.
	ErrTimeout Status = C.PRESENCE_TIMEOUT
	// ErrRemote: the worker ended the stream with an error, whose text is the message.
	ErrRemote Status = C.PRESENCE_REMOTE
	// ErrForked: the process was forked after the library connected.
	ErrForked Status = C.PRESENCE_FORKED
	// ErrInternal: a defect of the library, which remains usable.
	ErrInternal Status = C.PRESENCE_INTERNAL
)

// Error returns a short English description of the status.
func (s Status) Error() string { return C.GoString(C.presence_status_text(C.int32_t(s))) }

// Error is what this package's functions return when they fail, alone or wrapped.
type Error struct {
	Status Status
	// Message says, for people, which value was wrong and why; with ErrRemote it is the worker's text. It may be empty.
	// It never contains a password or another secret.
	Message string
	// Code is the code that the worker gave its error, see [Errorf]; 0 if it gave none.
	Code int
}

// Error returns the message, or the description of the status if there is no message.
func (e *Error) Error() string {
	if e.Message == "" {
		return "presence: " + e.Status.Error()
	}
	return "presence: " + e.Message
}

// Unwrap returns the status, for errors.Is.
func (e *Error) Unwrap() error { return e.Status }

// Errorf returns an error for a [Handler] to return: it ends the stream, and the requester gets the error's text and
// code, as the Message and the Code of an [*Error] with ErrRemote. The text is formatted as by fmt.Errorf, and %w wraps
// an error. So the text of a wrapped error is sent to the requester, too.
//
// The code is a number of your choice, from 1 to 2147483647; 0 and all other numbers are no code. Requesters without
// this library, and those of earlier releases, get the text only.
func Errorf(code int, format string, args ...any) error {
	return &handlerError{code, fmt.Errorf(format, args...)}
}

// handlerError is an error whose text and code the requester may see.
type handlerError struct {
	code int
	err  error
}

func (e *handlerError) Error() string { return e.err.Error() }

func (e *handlerError) Unwrap() error { return e.err }

// codeOf returns the code of the first error in err's tree that [Errorf] has made; 0 if it has none that can be sent.
func codeOf(err error) int {
	var failed *handlerError
	if errors.As(err, &failed) && failed.code > 0 && failed.code <= math.MaxInt32 {
		return failed.code
	}
	return 0
}

func invalid(format string, args ...any) error {
	return &Error{Status: ErrInvalid, Message: fmt.Sprintf(format, args...)}
}

// statusError is the error of a C call that returned only a status; what names the subject of the call.
func statusError(rc C.presence_status, what string) error {
	if rc == C.PRESENCE_OK {
		return nil
	}
	return &Error{Status: Status(rc), Message: what + ": " + Status(rc).Error()}
}

// callError is the error of a C call that filled report when it failed.
func callError(rc C.presence_status, report *C.presence_error) error {
	if rc == C.PRESENCE_OK {
		return nil
	}
	return &Error{Status: Status(rc), Message: C.GoString(&report.message[0])}
}

// contextError is the error of a call that ended because ctx ended; errors.Is finds ErrCancelled and ctx's cause in it.
func contextError(ctx context.Context) error {
	return fmt.Errorf("%w: %w", &Error{Status: ErrCancelled}, context.Cause(ctx))
}

// cString returns a pointer to the bytes of s, for C functions that also take its length.
func cString(s string) *C.char { return (*C.char)(unsafe.Pointer(unsafe.StringData(s))) }

// cText returns a NUL-terminated copy of s. It fails if s contains a NUL; the error calls the value what.
func cText(what, s string) (*C.char, error) {
	if at := strings.IndexByte(s, 0); at >= 0 {
		return nil, invalid("%s contains a NUL at byte %d; remove it", what, at)
	}
	return cString(s + "\x00"), nil
}
