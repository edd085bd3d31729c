package presence

// #include <nats_presence.h>
//
// // An integer in place of the handle and uint8_t in place of void, so that cgo need not search them for pointers.
// static inline int32_t sender_send(uintptr_t sender, const uint8_t *data, size_t len) {
//   return presence_sender_send((presence_sender *)sender, data, len);
// }
// #cgo noescape sender_send
// #cgo nocallback sender_send
import "C"

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"
)

// Handler answers one request. It runs in a goroutine of its own.
//
// ctx ends when the client leaves or the stream is stopped for another reason (context.Cause(ctx) is then ErrOffline,
// ErrCancelled, ErrPeerGone, …), when Serve's context ends, and when the handler has returned.
//
// The handler's return ends a stream that has not ended before: nil ends it as [Sender.End] does, an error or a panic ends
// it with the error "the handler failed". The text of the error or the panic is not sent, because it may contain what the
// requester must not see. It is logged, a panic with its stack: by the function of [WithLog], or by log.Print without one.
// To send the text of an error to the requester, return s.SendError(err).
//
// A handler that sends from another goroutine after its return must call [Sender.Detach] first, or Serve needs the option
// detached. Without either, the handler's return ends the stream, which then looks complete to the reader. The goroutine's
// sends fail with ErrClosed and the text "its handler returned without Detach"; the first such failure of a service is
// logged too.
type Handler func(ctx context.Context, req *Request, s *Sender) error

// Request is a request for a stream.
type Request struct {
	Subject  string
	ClientID string // empty if the stream belongs to no client
	Data     []byte // the payload; the handler owns it
	sender   *Sender
}

// Header returns the first header of the request with exactly this name. It returns "" if there is none, or if the stream
// has ended and its handler has returned.
func (r *Request) Header(name string) string { return r.sender.header(name) }

// Texts of the errors that requesters receive; the C library uses the same.
const (
	stoppedServing = "the worker stopped serving"
	serverBusy     = "server busy"
	handlerFailed  = "the handler failed"
)

// serveEnded is a status that the C library does not have: Serve's context has ended.
const serveEnded Status = 1

// service is one call of Serve.
type service struct {
	ctx      context.Context
	handler  Handler
	limit    int64          // of handlers that run at once
	detached bool           // as if each handler called Detach
	handlers atomic.Int64   // how many have not returned
	running  sync.WaitGroup // the goroutines of handlers; grows only with conn.mu held and while conn.services has the service
	senders  int            // how many of conn.senders are this service's; protected by conn.mu
	idle     chan struct{}  // holds a token when senders may have become 0
	warn     sync.Once      // logs that a handler returned without Detach
}

// defaultMaxStreams is the C library's limit of streams. Here it limits handlers, which may outlive their streams.
const defaultMaxStreams = 10_000

// Serve serves a subject, which may contain wildcards, until ctx ends. Requests are distributed over all processes that
// serve the subject in the same queue group; with the empty queue each process gets every request. At most max_streams
// streams (see [With]), and as many handlers, run at once; a request beyond that is answered with "server busy".
//
// With the option detached, a handler that returns nil leaves its stream open, as if it had called [Sender.Detach]: each
// stream must be ended with [Sender.End] or [Sender.SendError].
//
// When ctx ends, the context of each handler ends and all streams are cut at that moment, also detached ones: their readers
// get the error "the worker stopped serving", and Send fails with ErrCancelled. This does not wait for any handler.
//
// With the option drain_ms Serve drains first: once ctx ends it takes no more requests, but streams that run, also
// detached ones, go on as if ctx had not ended, until all of them have ended or the time is over. Then the rest is cut as
// described above.
//
// Then Serve waits until its handlers have returned, so they should watch their context or the error of Send. It waits for
// at most stop_timeout_ms, if that is set. If handlers still run after that time, Serve returns ErrTimeout with their
// number; they go on but cannot send, and whatever they use must stay usable.
//
// Otherwise Serve returns nil when ctx ended. If ctx ends while Serve still waits for nats-server to confirm the
// subscription, Serve returns when that has answered or connect_timeout_ms have passed. It returns ErrClosed after
// [Conn.Close], ErrDisconnected when nats-server refuses the subscription or the connection was given up (option
// max_reconnects), ErrInvalid (subject, queue, options), and ErrTimeout when nats-server did not answer.
func (c *Conn) Serve(ctx context.Context, subject, queue string, handler Handler, opts ...ServeOption) error {
	if handler == nil {
		return invalid("handler is nil")
	}
	o, err := serveOptions(opts)
	if err != nil {
		return err
	}
	cSubject, err := cText("subject", subject)
	if err != nil {
		return err
	}
	cQueue, err := cText("queue", queue)
	if err != nil {
		return err
	}
	parent := ctx
	if o.drain > 0 {
		parent = context.WithoutCancel(ctx)
	}
	serving, stop := context.WithCancelCause(parent)
	defer stop(nil)
	defer context.AfterFunc(c.ctx, func() { stop(context.Cause(c.ctx)) })()

	v := &service{
		ctx: serving, handler: handler, detached: o.detached,
		limit: cmp.Or(int64(o.maxStreams), defaultMaxStreams), idle: make(chan struct{}, 1),
	}
	c.mu.Lock()
	c.lastTag++
	tag := c.lastTag
	c.services[tag] = v
	c.mu.Unlock()

	var handle *C.presence_service
	var report C.presence_error
	rc := C.presence_serve(c.handle, c.queue.handle, cSubject, cQueue, C.uint32_t(o.maxStreams), C.uint64_t(tag), &handle, &report)
	err = callError(rc, &report)
	why := err // ends the streams whose requests arrived before presence_serve failed
	if err == nil {
		c.logEvent(Event{Kind: Serving, Text: subject})
		select {
		case <-ctx.Done():
		case <-serving.Done():
		}
		C.presence_service_free(handle)
		c.drain(v, o.drain)
		why = context.Cause(ctx)
	}
	c.mu.Lock()
	delete(c.services, tag)
	c.mu.Unlock()
	stop(why)
	for _, s := range c.sendersOf(v) {
		s.cut()
	}
	late := v.waitForHandlers(o.stopTimeout)
	switch {
	case errors.Is(err, ErrInvalid): // also if ctx has ended
	case ctx.Err() != nil:
		err = nil
	case err == nil:
		err = context.Cause(serving)
	}
	if late == nil || err == nil {
		return cmp.Or(late, err)
	}
	return fmt.Errorf("%w; %w", err, late)
}

// waitForHandlers waits until all handlers have returned, at most for limit unless that is 0.
func (v *service) waitForHandlers(limit time.Duration) error {
	if limit == 0 {
		v.running.Wait()
		return nil
	}
	returned := make(chan struct{})
	go func() {
		v.running.Wait()
		close(returned)
	}()
	select {
	case <-returned:
		return nil
	case <-time.After(limit):
		return &Error{ErrTimeout, fmt.Sprintf("%d handlers still run %v after their context ended", v.handlers.Load(), limit)}
	}
}

// drain waits until all streams and handlers of the service have ended, at most for limit. Requests that the C library
// accepted before the service was stopped still begin meanwhile.
func (c *Conn) drain(v *service, limit time.Duration) {
	expired := time.After(limit)
	for c.isBusy(v) {
		select {
		case <-v.idle:
		case <-v.ctx.Done():
			return
		case <-expired:
			return
		}
	}
}

func (c *Conn) isBusy(v *service) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return v.senders > 0
}

// accept starts a handler for a request.
func (c *Conn) accept(e *C.presence_event) {
	word := (*uint32)(unsafe.Pointer(C.presence_sender_status_word(e.sender)))
	client := string(view(e.client, e.client_len))
	c.mu.Lock()
	v := c.services[uint64(e.tag)]
	if v == nil || atomic.LoadUint32(word) != 0 { // the service has ended, or the client has left already
		c.mu.Unlock()
		refuse(e.sender, stoppedServing)
		return
	}
	if v.handlers.Load() >= v.limit {
		c.mu.Unlock()
		c.busy.Add(1)
		refuse(e.sender, serverBusy)
		return
	}
	s := &Sender{
		conn: c, service: v, client: client, handle: e.sender, word: word,
		writable: make(chan struct{}, 1), ended: make(chan struct{}),
	}
	s.ctx, s.cancel = context.WithCancelCause(v.ctx)
	s.owners.Store(2)
	s.detached.Store(v.detached)
	c.senders[e.sender] = s
	v.senders++
	v.handlers.Add(1)
	v.running.Add(1)
	c.mu.Unlock()
	req := &Request{
		Subject: string(view(e.subject, e.subject_len)), ClientID: client,
		Data: bytes.Clone(view(e.data, e.data_len)), sender: s,
	}
	go s.runHandler(req)
}

func refuse(sender *C.presence_sender, text string) {
	C.presence_sender_error(sender, cString(text), C.size_t(len(text)))
	C.presence_sender_free(sender)
}

func (c *Conn) sendersOf(v *service) (senders []*Sender) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.senders {
		if s.service == v {
			senders = append(senders, s)
		}
	}
	return senders
}

// Sender is the worker's end of one stream. Once ended, it stays ended: a client that comes back has new streams.
type Sender struct {
	conn     *Conn
	service  *service
	client   string
	ctx      context.Context
	cancel   context.CancelCauseFunc
	writable chan struct{} // holds a token when a blocked send should try again
	ended    chan struct{} // closed when the stream has ended
	end      sync.Once     // closes ended
	detached atomic.Bool
	returned atomic.Bool // the handler returned nil without Detach, which ended the stream
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

// Send sends one message of the stream. If the reader is too slow or the send buffer is full, Send blocks the goroutine, but
// no thread, until the message can be sent or the stream ends.
//
// Once the client is offline Send always fails with ErrOffline. It also fails with ErrCancelled (the stream was cancelled,
// or Serve's context ended), ErrPeerGone (the gateway's process is gone), ErrClosed or ErrDisconnected. After ErrTooLarge
// and ErrReserved the stream goes on.
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

// sendResult returns the error of a send. It logs a send that fails because the handler returned without Detach: the reader
// cannot see this defect, since its stream looks complete.
func (s *Sender) sendResult(status Status, size int) error {
	if status == ErrTooLarge {
		return &Error{ErrTooLarge, fmt.Sprintf("message of %d bytes is too large: the limit is %d", size, s.MaxMessage())}
	}
	err := s.statusError(status)
	if status == ErrClosed && s.returned.Load() {
		s.service.warn.Do(func() { s.log(err.Error()) })
	}
	return err
}

func (s *Sender) send(data []byte) Status {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if status := s.state(); status != C.PRESENCE_OK {
		return status
	}
	handle, text := C.uintptr_t(uintptr(unsafe.Pointer(s.handle))), (*C.uint8_t)(unsafe.SliceData(data))
	return Status(C.sender_send(handle, text, C.size_t(len(data))))
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

// SendError ends the stream with an error whose text is sent to the reader as it is: use it for errors that the reader may
// see. It fails with ErrClosed if the stream has ended already, and with the reason if the stream was stopped.
func (s *Sender) SendError(err error) error {
	if err == nil {
		err = errors.New("unknown error")
	}
	return s.endWithError(err.Error())
}

func (s *Sender) endWithError(text string) error {
	text = strings.ToValidUTF8(text, "\uFFFD")
	s.mu.RLock()
	status := s.status
	switch {
	case s.handle == nil:
	case s.wasCut:
		status = serveEnded
	default:
		status = Status(C.presence_sender_error(s.handle, cString(text), C.size_t(len(text))))
	}
	s.mu.RUnlock()
	s.finish()
	return s.statusError(status)
}

// End ends the stream. Calling it again has no effect. It fails with the reason if the stream was stopped. If Serve's
// context has ended, the reader gets an error, because a stream that was cut short must not look complete.
func (s *Sender) End() error {
	if s.ctx.Err() != nil {
		s.cut() // has an effect only if Serve's context has ended
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
	if s.handle != nil && C.presence_sender_error(s.handle, cString(stoppedServing), C.size_t(len(stoppedServing))) == C.PRESENCE_OK {
		s.wasCut = true
	}
	s.mu.Unlock()
	s.finish()
}

// Detach keeps the stream open after its handler has returned nil. You must then end it with End or SendError. Otherwise it
// ends only when the client leaves or Serve's context ends: no finalizer ends the stream of a sender that becomes
// unreachable. The handler's context lasts as long as the stream.
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

func (s *Sender) statusError(status Status) error {
	switch status {
	case C.PRESENCE_OK:
		return nil
	case serveEnded:
		return contextError(s.ctx)
	}
	what := fmt.Sprintf("stream of client %q", s.client)
	if status == ErrClosed && s.returned.Load() {
		return &Error{ErrClosed, what + ": its handler returned without Detach, which ended the stream"}
	}
	return statusError(C.int32_t(status), what)
}

// runHandler runs the handler, and ends the stream according to its result.
func (s *Sender) runHandler(req *Request) {
	failure, isDefect := "the handler did not return: it called runtime.Goexit", true
	defer func() {
		if cause := recover(); cause != nil {
			failure = fmt.Sprintf("the handler panicked: %v\n%s", cause, debug.Stack())
		}
		s.service.handlers.Add(-1) // before the stream's end, after which the requester may request again
		if failure != "" {
			if s.ctx.Err() != nil {
				s.cut() // has an effect only if Serve's context has ended
			}
			// An error that the handler returned because the stream had ended already is not logged.
			if err := s.endWithError(handlerFailed); err == nil || isDefect {
				s.log(failure)
			}
		} else if !s.detached.Load() {
			s.returned.Store(s.Err() == nil)
			s.End()
		}
		s.release()
		s.service.running.Done()
	}()
	err := s.service.handler(s.ctx, req, s)
	failure, isDefect = "", false
	if err != nil {
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

// release is called once by each owner. The last one frees the C sender, after the C calls in progress, which never block.
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
	s.cancel(s.statusError(endStatus)) // has an effect if the stream was stopped but its STOPPED event was not handled yet
}
