package presence

// #include <nats_presence.h>
//
// // An integer in place of the handle and uint8_t in place of void, so that cgo need not search them for pointers.
// static inline presence_status sender_send(uintptr_t sender, const uint8_t *data, size_t len) {
//   return presence_sender_send((presence_sender *)sender, data, len);
// }
// #cgo noescape sender_send
// #cgo nocallback sender_send
import "C"

import (
	"context"
	"errors"
	"fmt"
	"log"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"
)

// Handler answers one request. It runs in a goroutine of its own.
//
// ctx ends when the client leaves or the stream is stopped for another reason (context.Cause(ctx) is then ErrOffline,
// ErrCancelled, ErrPeerGone, …), when the service ends, and when the handler has returned.
//
// The handler's return ends a stream that has not ended before: nil ends it as [Sender.End] does, an error or a panic
// ends it with the error "the handler failed". The text of the error or the panic is not sent, because it may contain
// what the requester must not see. It is logged, a panic with its stack: by the function of [WithLog], or by log.Print
// without one.
//
// To send a text to the requester, return an error that [Errorf] has made, which also has a code. The requester gets
// the text and the code of exactly this error, also if the handler returns an error that wraps it; it is not logged.
// Or return s.SendError(err).
//
// A handler that sends from another goroutine after its return must call [Sender.Detach] first, or the service needs
// the option [Detached]. Without either, the handler's return ends the stream, which then looks complete to the reader.
// The goroutine's sends fail with ErrClosed and the text "its handler returned without Detach"; the first such failure
// of a service is logged too.
type Handler func(ctx context.Context, req *Request, s *Sender) error

// Request is a request for a stream.
type Request struct {
	Subject  string
	ClientID string // empty if the stream belongs to no client
	Data     []byte // the payload; the handler owns it
	sender   *Sender
}

// Header returns the first header of the request with exactly this name. It returns "" if there is none, or if the
// stream has ended and its handler has returned.
func (r *Request) Header(name string) string { return r.sender.header(name) }

// Headers returns all headers of the request, by their names as they were sent. The client's id is one of them, under
// Connect-ID. It returns nil if there are none, or if the stream has ended and its handler has returned.
func (r *Request) Headers() map[string][]string { return r.sender.headers() }

// Reply returns the request's reply subject, for logs and for peers without this library. If both ends run this
// library, a message that is published to it is ignored: answer with [Sender.Send]. Reply returns "" if the stream has
// ended and its handler has returned.
func (r *Request) Reply() string { return r.sender.reply() }

// serveEnded is a status that the C library does not have: the service has ended.
const serveEnded Status = 1

// Sender is the worker's end of one stream. Once ended, it stays ended: a client that comes back has new streams.
type Sender struct {
	conn     *Conn
	service  *Service
	client   string
	ctx      context.Context
	cancel   context.CancelCauseFunc
	writable chan struct{} // holds a token when a blocked send should try again
	ended    chan struct{} // closed when the stream has ended
	end      sync.Once     // closes ended
	detached atomic.Bool
	returned atomic.Bool // the handler returned nil without Detach, which ended the stream
	onFirst  atomic.Pointer[func()]
	// How many of the two owners still need the C sender: the stream, until it has ended, and the handler, until it has
	// returned. The last one frees it.
	owners atomic.Int32

	mu        sync.RWMutex       // held for reading during C calls, and for writing to free the handle
	wasCut    bool               // the end of the service ended the stream
	handle    *C.presence_sender // nil once freed; after that the last three fields answer
	word      *uint32            // the C library's status word: 0 while it may send
	status    Status             // why it may not send
	endStatus Status             // the result of another End
	count     uint64             // messages sent
}

// Send sends one message of the stream. If the reader is too slow or the send buffer is full, Send blocks the
// goroutine, but no thread, until the message can be sent or the stream ends.
//
// Once the client is offline Send always fails with ErrOffline. It also fails with ErrCancelled (the stream was
// cancelled, or its service ended), ErrPeerGone (the gateway's process is gone), ErrClosed or ErrDisconnected. After
// ErrTooLarge and ErrReserved the stream goes on.
func (s *Sender) Send(data []byte) error { return s.SendContext(context.Background(), data) }

// SendContext is like Send, but when ctx ends first it sends nothing and returns ctx's cause, and the stream goes on.
func (s *Sender) SendContext(ctx context.Context, data []byte) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	status := s.send(data)
	for status == ErrFull {
		select {
		case <-s.writable:
		case <-s.ended:
		case <-s.ctx.Done():
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if status = s.send(data); status != ErrFull {
			signal(s.writable) // wakes other goroutines whose sends are blocked
		}
	}
	return s.sendResult(status, len(data))
}

// TrySend is like Send, but fails with ErrFull where Send would block.
func (s *Sender) TrySend(data []byte) error { return s.sendResult(s.send(data), len(data)) }

// MaxMessage returns the size of the largest message that can be sent, in bytes: the max_payload of the present
// nats-server, less 64. It is 0 after the stream's end.
func (s *Sender) MaxMessage() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return int(C.presence_sender_max_message(s.handle))
}

// sendResult returns the error of a send. It logs a send that fails because the handler returned without Detach: the
// reader cannot see this defect, since its stream looks complete.
func (s *Sender) sendResult(status Status, size int) error {
	if status == ErrTooLarge {
		text := fmt.Sprintf("message of %d bytes is too large: the limit is %d", size, s.MaxMessage())
		return &Error{Status: ErrTooLarge, Message: text}
	}
	if status == C.PRESENCE_OK {
		if f := s.onFirst.Load(); f != nil && s.onFirst.CompareAndSwap(f, nil) {
			(*f)()
		}
		return nil
	}
	err := s.statusError(status)
	if status == ErrClosed && s.returned.Load() {
		s.service.warn.Do(func() { s.log(err.Error()) })
	}
	return err
}

func (s *Sender) send(data []byte) Status {
	s.mu.RLock() // Unlocked without defer, which would cost as much as the lock.
	status := s.state()
	if status == C.PRESENCE_OK {
		handle, text := C.uintptr_t(uintptr(unsafe.Pointer(s.handle))), (*C.uint8_t)(unsafe.SliceData(data))
		status = Status(C.sender_send(handle, text, C.size_t(len(data))))
	}
	s.mu.RUnlock()
	return status
}

// state returns why the sender may not send, 0 while it may. The caller holds the mutex.
func (s *Sender) state() Status {
	switch {
	case s.handle == nil:
		return s.status
	case s.wasCut:
		return serveEnded
	}
	if status := Status(atomic.LoadUint32(s.word)); status != C.PRESENCE_OK {
		return status
	}
	if s.ctx.Err() != nil {
		return serveEnded
	}
	return C.PRESENCE_OK
}

// SendError ends the stream with an error whose text is sent to the reader as it is: use it for errors that the reader
// may see. The code of an error by [Errorf] is sent, too. SendError fails with ErrClosed if the stream has ended
// already, and with the reason if the stream was stopped.
func (s *Sender) SendError(err error) error {
	if err == nil {
		err = errors.New("unknown error")
	}
	return s.endWithError(codeOf(err), err.Error())
}

func (s *Sender) endWithError(code int, text string) error {
	text = strings.ToValidUTF8(text, "\uFFFD")
	s.mu.RLock()
	status := s.status
	switch {
	case s.handle == nil:
	case s.wasCut:
		status = serveEnded
	default:
		size := C.size_t(len(text))
		status = Status(C.presence_sender_error_code(s.handle, C.int32_t(code), cString(text), size))
	}
	s.mu.RUnlock()
	s.finish()
	return s.statusError(status)
}

// End ends the stream. Calling it again has no effect. It fails with the reason if the stream was stopped. If the
// service has ended, the reader gets an error, because a stream that was cut short must not look complete.
func (s *Sender) End() error {
	if s.ctx.Err() != nil {
		s.cut() // has an effect only if the service has ended
	}
	s.mu.RLock()
	status := s.endStatus
	switch {
	case s.handle == nil:
	case s.wasCut:
		status = serveEnded
	default:
		status = Status(C.presence_sender_end(s.handle))
	}
	s.mu.RUnlock()
	s.finish()
	return s.statusError(status)
}

// cut ends a stream that still runs because its service ends.
func (s *Sender) cut() {
	s.mu.Lock() // for writing, so that no call sees the end of the stream before wasCut
	if s.handle != nil {
		rc := C.presence_sender_error(s.handle, cString(stoppedServing), C.size_t(len(stoppedServing)))
		s.wasCut = s.wasCut || rc == C.PRESENCE_OK
	}
	s.mu.Unlock()
	s.finish()
}

// Detach keeps the stream open after its handler has returned nil. You must then end it with End or SendError.
// Otherwise it ends only when the client leaves or the service ends: no finalizer ends the stream of a sender that
// becomes unreachable. The handler's context lasts as long as the stream.
func (s *Sender) Detach() { s.detached.Store(true) }

// IsClosed reports whether the sender can no longer send, for whatever reason. It takes a few nanoseconds.
func (s *Sender) IsClosed() bool { return s.Err() != nil }

// Err returns the error that Send would return: ErrOffline, ErrClosed, …; nil while the sender can send. While it can,
// Err takes a few nanoseconds: it makes no C call and no lookup.
func (s *Sender) Err() error {
	s.mu.RLock()
	status := s.state()
	s.mu.RUnlock()
	return s.statusError(status)
}

// OnFirstMessage makes the sender call f when it has sent its next message, once. It is for traces: call it before the
// first message.
func (s *Sender) OnFirstMessage(f func()) { s.onFirst.Store(&f) }

// SendCount returns how many messages have been sent.
func (s *Sender) SendCount() uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.handle == nil {
		return s.count
	}
	return uint64(C.presence_sender_send_count(s.handle))
}

func (s *Sender) header(name string) string {
	text, err := cText("name", name)
	if err != nil {
		return ""
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.handle == nil {
		return ""
	}
	var value *C.char
	var length C.size_t
	C.presence_sender_header(s.handle, text, &value, &length)
	return string(view(value, length))
}

func (s *Sender) headers() map[string][]string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.handle == nil {
		return nil
	}
	var headers map[string][]string
	for i := C.size_t(0); ; i++ {
		var name, value *C.char
		var nameLength, valueLength C.size_t
		C.presence_sender_header_at(s.handle, i, &name, &nameLength, &value, &valueLength)
		if name == nil {
			return headers
		}
		if headers == nil {
			headers = make(map[string][]string)
		}
		key := string(view(name, nameLength))
		headers[key] = append(headers[key], string(view(value, valueLength)))
	}
}

func (s *Sender) reply() string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.handle == nil {
		return ""
	}
	var length C.size_t
	return string(view(C.presence_sender_reply(s.handle, &length), length))
}

func (s *Sender) statusError(status Status) error {
	switch status {
	case C.PRESENCE_OK:
		return nil
	case serveEnded:
		return contextError(s.ctx)
	}
	what := fmt.Sprintf("stream of client %q", s.client)
	if status == ErrClosed && s.returned.Load() {
		what += ": its handler returned without Detach, which ended the stream"
		return &Error{Status: ErrClosed, Message: what}
	}
	return statusError(C.presence_status(status), what)
}

// runHandler runs the handler, and ends the stream according to its result.
func (s *Sender) runHandler(req *Request) {
	failure, isDefect := "the handler did not return: it called runtime.Goexit", true
	var answer *handlerError
	defer func() {
		if cause := recover(); cause != nil {
			failure = fmt.Sprintf("the handler panicked: %v\n%s", cause, debug.Stack())
		}
		s.service.handlers.Add(-1) // before the stream's end, after which the requester may request again
		if failure != "" || answer != nil {
			if s.ctx.Err() != nil {
				s.cut() // has an effect only if the service has ended
			}
			if failure == "" {
				s.endWithError(codeOf(answer), answer.Error())
			} else if err := s.endWithError(0, handlerFailed); err == nil || isDefect {
				// An error that the handler returned because the stream had ended already is not logged.
				s.log(failure)
			}
		} else if !s.detached.Load() {
			s.returned.Store(s.Err() == nil)
			s.End()
		}
		s.release()
		s.service.running.Done()
	}()
	err := s.service.callHandler(s, req)
	isAnswer := errors.As(err, &answer)
	failure, isDefect = "", false
	if err != nil && !isAnswer {
		failure = fmt.Sprint("the handler returned an error: ", err)
	}
}

// log logs a text about the stream: through WithLog, or to the standard logger without it.
func (s *Sender) log(text string) {
	if s.conn.log == nil {
		log.Print("presence: ", text)
	}
	s.conn.logEvent(Event{Kind: Log, ClientID: s.client, Text: text})
}

// stopped handles the event that something other than the sender's owner ended the stream.
func (s *Sender) stopped() {
	if err := s.Err(); err != nil {
		s.cancel(err)
		s.finish()
	}
}

// finish is called whenever the stream has ended.
func (s *Sender) finish() {
	s.end.Do(func() {
		close(s.ended)
		s.release()
	})
}

// release is called once by each owner. The last one frees the C sender, after the C calls in progress, which never
// block.
func (s *Sender) release() {
	if s.owners.Add(-1) > 0 {
		return
	}
	s.conn.mu.Lock()
	delete(s.conn.senders, s.handle)
	s.service.senders--
	s.conn.mu.Unlock()
	signal(s.service.idle)
	s.mu.Lock()
	s.status = Status(atomic.LoadUint32(s.word))
	s.endStatus = Status(C.presence_sender_end(s.handle))
	if s.wasCut {
		s.status, s.endStatus = serveEnded, serveEnded
	}
	s.count = uint64(C.presence_sender_send_count(s.handle))
	C.presence_sender_free(s.handle)
	s.handle, s.word = nil, nil
	endStatus := s.endStatus
	s.mu.Unlock()
	s.cancel(s.statusError(endStatus)) // has an effect if the STOPPED event of the stream was not handled yet
}
