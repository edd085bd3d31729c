package presence

// #include <nats_presence.h>
import "C"

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"
)

// Texts of the errors that requesters receive; the C library uses the same.
const (
	stoppedServing = "the worker stopped serving"
	serverBusy     = "server busy"
	handlerFailed  = "the handler failed"
)

// Service is a subject that this process serves, made by [Conn.Listen]. Requests that arrive before Serve is called
// wait for it; they count as running streams.
type Service struct {
	conn     *Conn
	tag      uint64
	subject  string
	cSubject *C.char
	cQueue   *C.char
	handle   *C.presence_service
	settings serveSettings
	parent   context.Context // of Listen or Serve: its end ends the service
	ctx      context.Context // the parent of the handlers' contexts
	stop     context.CancelCauseFunc
	detach   func() bool // from the connection's context

	handler atomic.Pointer[Handler]
	begun   chan struct{} // closed when there is a handler
	ending  chan struct{} // closed by Close and Drain
	endOnce sync.Once     // closes ending
	cut     chan struct{} // closed when all streams have ended
	done    chan struct{} // closed when all handlers have returned, or stop_timeout_ms have passed
	drained bool          // all streams ended by themselves; set before cut is closed
	err     error         // the result of Serve; set before done is closed

	handlers atomic.Int64   // how many have not returned
	running  sync.WaitGroup // the goroutines of handlers; grows only with conn.mu held and the service in conn.services
	senders  int            // how many of conn.senders are this service's; protected by conn.mu
	idle     chan struct{}  // holds a token when senders may have become 0
	warn     sync.Once      // logs that a handler returned without Detach
}

// defaultMaxStreams is the C library's limit of streams. Here it limits handlers, which may outlive their streams.
const defaultMaxStreams = 10_000

// Serve serves a subject, which may contain wildcards, until ctx ends. Requests are distributed over all processes that
// serve the subject in the same queue group; with the empty queue each process gets every request. At most [MaxStreams]
// streams, and as many handlers, run at once; a request beyond that is answered with "server busy".
//
// When ctx ends, the context of each handler ends and all streams are cut at that moment, also detached ones: their
// readers get the error "the worker stopped serving", and Send fails with ErrCancelled. This does not wait for any
// handler.
//
// With the option [DrainTimeout] Serve drains first: once ctx ends it takes no more requests, but streams that run,
// also detached ones, go on as if ctx had not ended, until all of them have ended or the time is over. Then the rest is
// cut as described above.
//
// Then Serve waits until its handlers have returned, so they should watch their context or the error of Send. It waits
// for at most [StopTimeout], if that is set. If handlers still run after that time, Serve returns ErrTimeout with their
// number; they go on but cannot send, and whatever they use must stay usable.
//
// Otherwise Serve returns nil when ctx ended. If ctx ends while Serve still waits for nats-server to confirm the
// subscription, Serve returns when that has answered or [ConnectTimeout] has passed. It returns ErrClosed after
// [Conn.Close], ErrDisconnected when nats-server refuses the subscription or the connection was given up (option
// [MaxReconnects]), ErrInvalid (subject, queue, options), and ErrTimeout when nats-server did not answer.
//
// Use [Conn.Listen] to wait until the service is ready, or to drain it with a deadline of its own.
func (c *Conn) Serve(ctx context.Context, subject, queue string, handler Handler, opts ...ServeOption) error {
	if handler == nil {
		return invalid("handler is nil")
	}
	v, err := c.newService(ctx, subject, queue, opts)
	if err != nil {
		return err
	}
	v.begin(handler)
	v.run(v.listen())
	return v.err
}

// Listen begins to serve a subject, as [Conn.Serve] does, and returns when nats-server has the subscription: a request
// that is sent after that arrives here. Without a connection now it returns at once, and subscribes later. Call
// [Service.Serve] next, to handle the requests.
//
// The service ends with [Service.Close], [Service.Drain], [Conn.Close] or ctx: ctx must last as long as the service.
// When ctx ends, the service ends as Serve describes.
//
// Listen fails like Serve, and with ErrCancelled if ctx ends first.
func (c *Conn) Listen(ctx context.Context, subject, queue string, opts ...ServeOption) (*Service, error) {
	if ctx.Err() != nil {
		return nil, contextError(ctx)
	}
	v, err := c.newService(ctx, subject, queue, opts)
	if err != nil {
		return nil, err
	}
	listening := make(chan error, 1)
	go func() {
		err := v.listen()
		listening <- err
		v.run(err)
	}()
	select {
	case err := <-listening:
		if err != nil {
			return nil, err
		}
		return v, nil
	case <-ctx.Done():
		return nil, contextError(ctx)
	}
}

// Serve calls handler for each request, in a goroutine of its own, until the service has ended. It returns what
// [Conn.Serve] would: nil after Close, Drain or the end of Listen's context, once all handlers have returned.
//
// Serve fails with ErrBusy if it was called before, and with ErrClosed if it is called after Close or Drain.
func (v *Service) Serve(handler Handler) error {
	if handler == nil {
		return invalid("handler is nil")
	}
	select {
	case <-v.ending:
		return v.statusError(ErrClosed)
	default:
	}
	if !v.begin(handler) {
		return &Error{Status: ErrBusy, Message: fmt.Sprintf("service %q: Serve was called before", v.subject)}
	}
	<-v.done
	return v.err
}

// Drain ends the service gracefully: it takes no more requests, and waits until all streams that run, also detached
// ones, have ended and their handlers have returned. When ctx ends, the rest is cut as by Close. If Serve was never
// called, the requests that wait for it are cut at once.
//
// Drain returns nil if no stream was cut, ErrCancelled with ctx's cause if ctx ended first, and ErrClosed if Close or
// [Conn.Close] cut streams meanwhile.
func (v *Service) Drain(ctx context.Context) error {
	v.endOnce.Do(func() { close(v.ending) })
	if v.handler.Load() == nil {
		v.stop(v.statusError(ErrClosed))
	}
	select {
	case <-v.done:
	case <-ctx.Done():
		v.stop(context.Cause(ctx))
		<-v.cut
		if !v.drained {
			return contextError(ctx)
		}
	}
	switch {
	case v.drained:
		return nil
	case v.conn.closing.Load():
		return statusError(C.PRESENCE_CLOSED, "connection")
	}
	return context.Cause(v.ctx)
}

// Close ends the service at once: it takes no more requests, and all streams that run are cut, as [Conn.Serve]
// describes. It does not wait for handlers; Serve does. It always returns nil. Calling Close again has no effect.
func (v *Service) Close() error {
	v.endOnce.Do(func() { close(v.ending) })
	v.stop(v.statusError(ErrClosed))
	<-v.cut
	return nil
}

func (v *Service) statusError(status Status) error {
	return statusError(C.presence_status(status), fmt.Sprintf("service %q", v.subject))
}

func (c *Conn) newService(ctx context.Context, subject, queue string, opts []ServeOption) (*Service, error) {
	settings, err := serveOptions(opts)
	if err != nil {
		return nil, err
	}
	v := &Service{
		conn: c, subject: subject, settings: settings, parent: ctx,
		begun: make(chan struct{}), ending: make(chan struct{}), cut: make(chan struct{}), done: make(chan struct{}),
		idle: make(chan struct{}, 1),
	}
	if v.cSubject, err = cText("subject", subject); err != nil {
		return nil, err
	}
	if v.cQueue, err = cText("queue", queue); err != nil {
		return nil, err
	}
	if settings.drain > 0 {
		ctx = context.WithoutCancel(ctx)
	}
	v.ctx, v.stop = context.WithCancelCause(ctx)
	v.detach = context.AfterFunc(c.ctx, func() { v.stop(context.Cause(c.ctx)) })
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lastTag++
	v.tag = c.lastTag
	c.services[v.tag] = v
	return v, nil
}

// begin sets the handler. It returns false if there is one already.
func (v *Service) begin(handler Handler) bool {
	if !v.handler.CompareAndSwap(nil, &handler) {
		return false
	}
	close(v.begun)
	return true
}

// callHandler waits until there is a handler and calls it, unless the stream ends first.
func (v *Service) callHandler(s *Sender, req *Request) error {
	select {
	case <-v.begun:
	case <-s.ctx.Done():
	}
	if handler := v.handler.Load(); handler != nil {
		return (*handler)(s.ctx, req, s)
	}
	return nil
}

// listen subscribes to the subject.
func (v *Service) listen() error {
	var report C.presence_error
	rc := C.presence_serve(v.conn.handle, v.conn.queue.handle, v.cSubject, v.cQueue,
		C.uint32_t(v.settings.maxStreams), C.uint64_t(v.tag), &v.handle, &report)
	if err := callError(rc, &report); err != nil {
		return err
	}
	v.conn.logEvent(Event{Kind: Serving, Text: v.subject})
	return nil
}

// run waits until the service ends, and ends it. err is the result of listen; if it failed, run ends the streams whose
// requests arrived before.
func (v *Service) run(err error) {
	defer v.detach()
	why := err
	if err == nil {
		select {
		case <-v.parent.Done():
		case <-v.ctx.Done():
		case <-v.ending:
		}
		C.presence_service_free(v.handle)
		v.drained = v.drain()
		why = context.Cause(v.parent)
	}
	v.conn.mu.Lock()
	delete(v.conn.services, v.tag)
	v.conn.mu.Unlock()
	v.stop(why)
	for _, s := range v.conn.sendersOf(v) {
		s.cut()
	}
	close(v.cut)
	late := v.waitForHandlers()
	switch {
	case errors.Is(err, ErrInvalid): // also if the context has ended
	case v.parent.Err() != nil || v.isEnding():
		err = nil
	case err == nil:
		err = context.Cause(v.ctx)
	}
	if late != nil && err != nil {
		err = fmt.Errorf("%w; %w", err, late)
	}
	v.err = cmp.Or(err, late)
	close(v.done)
}

func (v *Service) isEnding() bool {
	select {
	case <-v.ending:
		return true
	default:
		return false
	}
}

// waitForHandlers waits until all handlers have returned, at most for stop_timeout_ms unless that is 0.
func (v *Service) waitForHandlers() error {
	limit := v.settings.stopTimeout
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
		text := fmt.Sprintf("%d handlers still run %v after their context ended", v.handlers.Load(), limit)
		return &Error{Status: ErrTimeout, Message: text}
	}
}

// drain waits until all streams and handlers of the service have ended, at most for drain_ms after the end of the
// parent context. Requests that the C library accepted before the service was stopped still begin meanwhile. It returns
// false if streams have to be cut, or were cut already.
func (v *Service) drain() bool {
	parentEnd, expired := v.parent.Done(), (<-chan time.Time)(nil)
	for v.isBusy() {
		select {
		case <-v.idle:
		case <-parentEnd:
			parentEnd, expired = nil, time.After(v.settings.drain)
		case <-v.ctx.Done():
			return false
		case <-expired:
			return false
		}
	}
	return v.ctx.Err() == nil && !v.conn.closing.Load()
}

func (v *Service) isBusy() bool {
	v.conn.mu.Lock()
	defer v.conn.mu.Unlock()
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
	if v.handlers.Load() >= cmp.Or(int64(v.settings.maxStreams), defaultMaxStreams) {
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
	s.detached.Store(v.settings.detached)
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

func (c *Conn) sendersOf(v *Service) (senders []*Sender) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.senders {
		if s.service == v {
			senders = append(senders, s)
		}
	}
	return senders
}
