package presence

// #include <nats_presence.h>
//
// // With types that cgo need not look behind.
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
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"
)

// Handler answers one request. It runs in a goroutine of its own.
//
// ctx ends when the client leaves or the stream is stopped otherwise (context.Cause(ctx) is then ErrOffline, ErrCancelled,
// ErrPeerGone, …), when Serve's context ends, and when the handler has returned. The handler's return ends the
// stream, unless it was ended before: nil as by [Sender.End], an error or a panic with the error "the handler failed". What
// the error or the panic says is not sent, for it may hold what the requester must not see. It is logged, a panic with its
// stack: by the function of [WithLog], or without one by log.Print. A handler that wants the requester to read the text of
// an error returns s.SendError(err).
//
// A handler that answers from another goroutine after its return calls [Sender.Detach] first, or Serve has the option
// detached. Without either its return ends the stream, which looks complete at the reader. What the goroutine sends then
// fails with ErrClosed, whose text says "its handler returned without Detach"; the first time that is logged too.
type Handler func(ctx context.Context, req *Request, s *Sender) error

// Request is what a stream was requested with.
type Request struct {
	Subject  string
	ClientID string // empty: nobody's
	Data     []byte // the handler's own
	sender   *Sender
}

// Header returns a header of the request by its exact name, the first if there are several; "" if there is none, or if
// the stream has ended and its handler has returned.
func (r *Request) Header(name string) string { return r.sender.header(name) }

// What is said to who asks, as the C library says it.
const (
	stoppedServing = "the worker stopped serving"
	serverBusy     = "server busy"
	handlerFailed  = "the handler failed"
)

// serveEnded stands among statuses for what C does not know: Serve's context has ended.
const serveEnded Status = 1

// service is one call of Serve.
type service struct {
	ctx      context.Context
	handler  Handler
	limit    int64          // of handlers at once
	detached bool           // as if each handler called Detach
	handlers atomic.Int64   // how many have not returned
	running  sync.WaitGroup // goroutines of handlers; added to with the connection's mutex held, while it is in its services
	senders  int            // those in the connection's senders, whose mutex it has
	idle     chan struct{}  // a token: senders may be 0
	warn     sync.Once      // logs that a handler returned without Detach
}

// defaultMaxStreams is the C library's, which bounds streams: a handler may run on after its stream's end.
const defaultMaxStreams = 10_000

// Serve serves a subject, which may have wildcards, until ctx ends. Requests are spread over all processes that serve the
// subject in the same queue; with the empty queue each of them gets every request. At most max_streams streams (see
// [With]), and as many handlers, run at once; a request beyond is answered with "server busy".
//
// With the option detached a handler that returns nil leaves its stream open, as if it had called [Sender.Detach]: each
// stream must be ended with [Sender.End] or [Sender.SendError].
//
// When ctx ends, the context of each handler ends too, and all streams end at that moment, detached ones too: their readers
// get the error "the worker stopped serving", and Send fails with ErrCancelled. Serve does not wait for handlers to do that.
//
// With the option drain_ms Serve ends gracefully: once ctx ends it takes no more requests, but what runs, detached streams
// too, goes on as if ctx had not ended, until all of it is done or that time is over. Then the rest ends as without.
//
// Then Serve waits until its handlers have returned, so they should look at their context or at Send's error. It waits for
// at most stop_timeout_ms, if that is set. If handlers still run then, it returns ErrTimeout with their number; they go on,
// but cannot send, and whatever they use must stay usable.
//
// Otherwise it returns nil when ctx ended: while it still waits for the server to hear of the subject, when that has answered or
// connect_timeout_ms are over. Else: ErrClosed after [Conn.Close], ErrDisconnected when the connection was given up (option
// max_reconnects), ErrInvalid (subject, queue, options), ErrTimeout when the server did not answer.
func (c *Conn) Serve(ctx context.Context, subject, queue string, handler Handler, opts ...Option) error {
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
	err = reported(rc, &report)
	why := err // it ends what came while the server was waited for, in vain
	if err == nil {
		c.tell(Event{Kind: Serving, Text: subject})
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
	late := v.wait(o.stopTimeout)
	switch {
	case errors.Is(err, ErrInvalid): // nothing was served
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

// wait waits until all handlers have returned; if limit is not 0, no longer than that.
func (v *service) wait(limit time.Duration) error {
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
		return &Error{ErrTimeout, fmt.Sprintf("handlers that still run %v after their context ended: %d", limit, v.handlers.Load())}
	}
}

// serveSettings are the options of Serve.
type serveSettings struct {
	maxStreams         uint64
	drain, stopTimeout time.Duration
	detached           bool
}

func serveOptions(opts []Option) (s serveSettings, err error) {
	o := collect(opts)
	for _, pair := range o.pairs {
		if pair[0] == "detached" {
			if s.detached = pair[1] == "true"; !s.detached && pair[1] != "false" {
				return s, invalid("value %q of option detached is neither true nor false", pair[1])
			}
			continue
		}
		n, err := strconv.ParseUint(pair[1], 10, 32)
		switch pair[0] {
		case "max_streams":
			s.maxStreams = n
		case "drain_ms":
			s.drain = time.Duration(n) * time.Millisecond
		case "stop_timeout_ms":
			s.stopTimeout = time.Duration(n) * time.Millisecond
		default:
			return s, invalid("option %q is not one of Serve: max_streams, detached, drain_ms and stop_timeout_ms are", pair[0])
		}
		if err != nil {
			return s, invalid("value %q of option %s is not a number from 0 to 4294967295", pair[1], pair[0])
		}
	}
	return s, nil
}

// drain waits, at most so long, until nothing of the service runs. What C took before it was stopped still begins meanwhile.
func (c *Conn) drain(v *service, limit time.Duration) {
	over := time.After(limit)
	for c.isBusy(v) {
		select {
		case <-v.idle:
		case <-v.ctx.Done():
			return
		case <-over:
			return
		}
	}
}

func (c *Conn) isBusy(v *service) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return v.senders > 0
}

// accept begins to answer a request.
func (c *Conn) accept(e *C.presence_event) {
	word := (*uint32)(unsafe.Pointer(C.presence_sender_status_word(e.sender)))
	client := string(view(e.client, e.client_len))
	c.mu.Lock()
	v := c.services[uint64(e.tag)]
	if v == nil || atomic.LoadUint32(word) != 0 { // Serve has ended, or the client has left already
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
		writable: make(chan struct{}, 1), over: make(chan struct{}),
	}
	s.ctx, s.cancel = context.WithCancelCause(v.ctx)
	s.holders.Store(2)
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
	go s.serve(req)
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

// Sender is the worker's end of one stream. Whatever ends it, it stays ended: a client who comes back has new streams.
type Sender struct {
	conn     *Conn
	service  *service
	client   string
	ctx      context.Context
	cancel   context.CancelCauseFunc
	writable chan struct{} // a token: there may be room again
	over     chan struct{} // closed when it may send no more
	end      sync.Once     // closes over
	detached atomic.Bool
	returned atomic.Bool // its handler returned nil without Detach, and so ended the stream
	// The stream, until it is over, and the handler, until it has returned, hold the C sender; the last one frees it.
	holders atomic.Int32

	mu     sync.RWMutex       // held for reading while C is called, and for writing to free
	wasCut bool               // Serve has ended the stream
	handle *C.presence_sender // nil once freed; then the last three fields tell
	word   *uint32            // C's status word: 0 while it may send
	status Status             // why it may send no more
	ended  Status             // what another End gives
	count  uint64
}

// Send sends one message of the stream. Where there is no room, because the reader is slow or much waits to be sent, it
// waits, without a thread, until there is or the stream ends.
//
// Once the client is offline it fails with ErrOffline, for ever. Others: ErrCancelled (the stream was cancelled, or Serve's
// context ended), ErrPeerGone (the gateway's process is gone), ErrClosed, ErrDisconnected; and, after which the stream goes
// on, ErrTooLarge and ErrReserved.
func (s *Sender) Send(data []byte) error { return s.SendContext(context.Background(), data) }

// SendContext is Send, but when ctx ends first it sends nothing and returns ctx's cause, and the stream goes on.
func (s *Sender) SendContext(ctx context.Context, data []byte) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	status := s.send(data)
	for status == ErrFull {
		select {
		case <-s.writable:
		case <-s.over:
		case <-s.ctx.Done():
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if status = s.send(data); status != ErrFull {
			signal(s.writable) // for others who wait too
		}
	}
	return s.sent(status, len(data))
}

// TrySend is Send, but fails with ErrFull where Send would wait.
func (s *Sender) TrySend(data []byte) error { return s.sent(s.send(data), len(data)) }

// MaxMessage returns how large a message may be, in bytes: the max_payload of the present nats-server, less 64. It is 0 after
// the stream's end.
func (s *Sender) MaxMessage() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return int(C.presence_sender_max_message(s.handle))
}

// sent is the result of a send. One that comes too late because the handler did not detach is a defect that the reader
// cannot see: it has a stream that looks complete.
func (s *Sender) sent(status Status, size int) error {
	if status == ErrTooLarge {
		return &Error{ErrTooLarge, fmt.Sprintf("message of %d bytes is too large: the limit is %d", size, s.MaxMessage())}
	}
	err := s.failed(status)
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

// state tells why it may send no more, 0 while it may. The mutex is held.
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

// SendError ends the stream with an error, whose text the reader gets as it is: for errors that are meant for it. Fails with ErrClosed if it has ended already, with
// why it was stopped if it was.
func (s *Sender) SendError(err error) error {
	if err == nil {
		err = errors.New("unknown error")
	}
	return s.sendError(err.Error())
}

func (s *Sender) sendError(text string) error {
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
	return s.failed(status)
}

// End ends the stream. Once more is fine. Fails with why the stream was stopped if it was; if that was Serve's context, the
// reader gets an error, for a stream that was cut short must not look complete.
func (s *Sender) End() error {
	if s.ctx.Err() != nil {
		s.cut() // if it was Serve's context
	}
	s.mu.RLock()
	status := s.ended
	switch {
	case s.handle == nil:
	case s.wasCut:
		status = serveEnded
	default:
		status = Status(C.presence_sender_end(s.handle))
	}
	s.mu.RUnlock()
	s.finish()
	return s.failed(status)
}

// cut ends the stream because Serve ends, unless it has ended already.
func (s *Sender) cut() {
	s.mu.Lock() // for writing, so that no call sees the stream's end without its reason
	if s.handle != nil && C.presence_sender_error(s.handle, cString(stoppedServing), C.size_t(len(stoppedServing))) == C.PRESENCE_OK {
		s.wasCut = true
	}
	s.mu.Unlock()
	s.finish()
}

// Detach lets the stream go on after its handler has returned nil: whoever has the sender now must end it, with End or
// SendError. Otherwise it ends only when the client leaves or Serve's context ends: a sender that is forgotten is not
// collected as garbage. Its context lives on as long as the stream.
func (s *Sender) Detach() { s.detached.Store(true) }

// IsClosed reports whether the sender may send no more, for whatever reason. It costs a few nanoseconds.
func (s *Sender) IsClosed() bool { return s.Err() != nil }

// Err returns why the sender may send no more, as Send would: ErrOffline, ErrClosed, …; nil while it may. While it may
// it costs a few nanoseconds: no call of C, no lookup.
func (s *Sender) Err() error {
	s.mu.RLock()
	status := s.state()
	s.mu.RUnlock()
	return s.failed(status)
}

// SendCount returns how many messages were sent so far.
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

func (s *Sender) failed(status Status) error {
	switch status {
	case C.PRESENCE_OK:
		return nil
	case serveEnded:
		return cancelled(s.ctx)
	}
	what := fmt.Sprintf("stream of client %q", s.client)
	if status == ErrClosed && s.returned.Load() {
		return &Error{ErrClosed, what + ": its handler returned without Detach, which ended the stream"}
	}
	return failed(C.int32_t(status), what)
}

// serve runs the handler and ends the stream as it says.
func (s *Sender) serve(req *Request) {
	failure, isDefect := "the handler did not return: it called runtime.Goexit", true
	defer func() {
		if cause := recover(); cause != nil {
			failure = fmt.Sprintf("the handler panicked: %v\n%s", cause, debug.Stack())
		}
		s.service.handlers.Add(-1) // first: who hears of the end may ask again
		if failure != "" {
			if s.ctx.Err() != nil {
				s.cut() // if it was Serve's context
			}
			// An error that a handler returns because its stream has ended already is no news.
			if err := s.sendError(handlerFailed); err == nil || isDefect {
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

// log reports something about the stream to WithLog, or to the standard logger without it.
func (s *Sender) log(text string) {
	if s.conn.log == nil {
		log.Print("presence: ", text)
	}
	s.conn.tell(Event{Kind: Log, ClientID: s.client, Text: text})
}

// stopped hears that the stream has ended for another reason than the handler's word.
func (s *Sender) stopped() {
	if err := s.Err(); err != nil {
		s.cancel(err)
		s.finish()
	}
}

// finish is called when the stream is over.
func (s *Sender) finish() {
	s.end.Do(func() {
		close(s.over)
		s.release()
	})
}

// release frees the C sender for the last of its holders. A call that is under way is waited for; none of them blocks.
func (s *Sender) release() {
	if s.holders.Add(-1) > 0 {
		return
	}
	s.conn.mu.Lock()
	delete(s.conn.senders, s.handle)
	s.service.senders--
	s.conn.mu.Unlock()
	signal(s.service.idle)
	s.mu.Lock()
	s.status = Status(atomic.LoadUint32(s.word))
	s.ended = Status(C.presence_sender_end(s.handle))
	if s.wasCut {
		s.status, s.ended = serveEnded, serveEnded
	}
	s.count = uint64(C.presence_sender_send_count(s.handle))
	C.presence_sender_free(s.handle)
	s.handle, s.word = nil, nil
	ended := s.ended
	s.mu.Unlock()
	s.cancel(s.failed(ended)) // why it was stopped, should nobody have told the handler's context yet
}
