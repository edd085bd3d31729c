// Package sse sends streams to browsers as server-sent events, which JavaScript reads with EventSource:
//
//	http.HandleFunc("/count", func(w http.ResponseWriter, r *http.Request) {
//		stream, err := conn.Request(r.Context(), "count", nil, rand.Text())
//		if err != nil {
//			http.Error(w, "Bad Gateway", http.StatusBadGateway)
//			return
//		}
//		if err := sse.Serve(w, r, stream); err != nil {
//			log.Print(err)
//		}
//	})
//
// Each message is one event without a name, whatever it contains. After the last message comes an event "end", or an
// event "failure" if the answer is incomplete. The page must then close its EventSource, which would otherwise connect
// again after a few seconds and so request another stream:
//
//	const source = new EventSource("/count")
//	source.onmessage = event => show(event.data)
//	source.addEventListener("end", () => source.close())
//	source.addEventListener("failure", event => { source.close(); complain(event.data) })
//
// A failure is not named "error", because EventSource has an event of that name for lost connections.
//
// Events are text: bytes of a message that are not UTF-8 arrive as U+FFFD, and each line end (CR LF, CR or LF) as LF.
// Encode binary messages, for example as JSON or in base64.
//
// Use a [Writer] to send events of several streams, or events of your own, over one connection.
package sse

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	presence "github.com/nats-presence/nats-presence/bindings/go"
)

// Serve answers a request with the messages of a stream, and returns when the response is complete. It closes the
// stream. The stream is cancelled at once, which stops its worker, when the browser leaves, when the context of the
// request ends, and when the browser accepts no data for the time of [WriteTimeout].
//
// Serve returns nil if it wrote all messages and the end. It returns the error of the stream if that failed, of which
// the browser gets an event, and otherwise the errors of [Writer.Close] and [NewWriter].
func Serve(w http.ResponseWriter, r *http.Request, stream *presence.Stream, opts ...Option) error {
	defer stream.Close()
	out, err := NewWriter(w, r, opts...)
	if err != nil {
		return err
	}
	defer out.Close()
	defer context.AfterFunc(out.Context(), func() { stream.Close() })()
	last := Event{Name: out.end}
	for message, streamErr := range stream.Messages() {
		if err = streamErr; err != nil {
			last = Event{Name: out.failure, Data: []byte(out.failureText(err))}
		} else if out.Send(Event{Data: message}) != nil {
			break
		}
	}
	out.Send(last)
	return cmp.Or(out.Close(), err) // if Close fails, the stream's error is only that it was closed
}

// Option is an option of [Serve] and [NewWriter].
type Option func(*Writer)

// KeepAlive sets how often a comment is sent while there are no events. It keeps proxies from closing the connection,
// and lets the kernel detect a browser that vanished without closing its connection. Default: 15 s. 0 means never.
func KeepAlive(d time.Duration) Option { return func(w *Writer) { w.keepAlive = d } }

// WriteTimeout sets how long the browser may accept no data while there is some to send. After that its connection is
// closed. Default: 30 s. 0 means no limit. It replaces the WriteTimeout of the [http.Server].
func WriteTimeout(d time.Duration) Option { return func(w *Writer) { w.writeTimeout = d } }

// EndName sets the name of the event after the last message. Default: end.
func EndName(name string) Option { return func(w *Writer) { w.end = name } }

// FailureName sets the name of the event after an incomplete answer. Default: failure. Do not use error: JavaScript
// could not distinguish the event from that of a lost connection.
func FailureName(name string) Option { return func(w *Writer) { w.failure = name } }

// FailureText sets the function that returns the data of a failure event. The default returns the description of the
// error's [presence.Status], such as "the process at the other end is gone": the text of a worker, and names of
// subjects, do not reach the browser.
func FailureText(text func(error) string) Option { return func(w *Writer) { w.failureText = text } }

func statusText(err error) string {
	if status := presence.Status(0); errors.As(err, &status) {
		return status.Error()
	}
	return presence.ErrInternal.Error()
}

// Event is a server-sent event. Name and ID must not contain a line end, and ID no NUL.
type Event struct {
	Name string // the type that JavaScript passes to addEventListener; empty for "message"
	ID   string // EventSource sends it back as Last-Event-ID when it connects again; empty for none
	Data []byte
}

const (
	// The size of the events that may wait while the browser does not read. One larger event may wait, too.
	maxWaiting = 16 << 10
	// How many bytes are written with one deadline. A slow but reading browser must accept them in time.
	maxWrite = 16 << 10
	comment  = ": keep-alive\n\n"
)

// Writer writes events to one browser, for any number of goroutines. A goroutine of its own writes all events that
// wait at once, and flushes them. Call [Writer.Close] before the handler of the request returns.
type Writer struct {
	keepAlive, writeTimeout time.Duration
	end, failure            string
	failureText             func(error) string

	w      http.ResponseWriter
	out    *http.ResponseController
	ctx    context.Context // ends with the Writer
	cancel context.CancelCauseFunc
	detach func() // from the request's context
	ready  chan struct{}
	done   chan struct{} // closed when nothing is written any more

	mu      sync.Mutex
	space   sync.Cond // signalled when there is space again
	waiting []byte    // encoded events
	err     error     // why no event can be sent
	closing bool
}

var errClosed = fmt.Errorf("sse: %w: the Writer was closed", presence.ErrClosed)

// NewWriter begins to answer a request with events: it writes the response's headers. If the response cannot be
// flushed, because a middleware hides the method, it writes an error with status 500 and returns
// [errors.ErrUnsupported]. Middleware must not compress the response.
func NewWriter(w http.ResponseWriter, r *http.Request, opts ...Option) (*Writer, error) {
	s := &Writer{
		keepAlive: 15 * time.Second, writeTimeout: 30 * time.Second,
		end: "end", failure: "failure", failureText: statusText,
		w: w, out: http.NewResponseController(w), ready: make(chan struct{}, 1), done: make(chan struct{}),
	}
	for _, option := range opts {
		option(s)
	}
	s.space.L = &s.mu
	h := w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("Cache-Control", "no-store, no-transform") // no-transform: proxies do not compress, which would delay events
	h.Set("X-Accel-Buffering", "no")                 // nginx forwards each event at once
	h.Del("Content-Length")
	if r.ProtoMajor == 1 {
		h.Set("Connection", "close") // a later request on this connection must not inherit the deadlines
	}
	err := cmp.Or(checkText("the name of the end event", s.end), checkText("the name of the failure event", s.failure))
	if err == nil {
		s.extendDeadline()
		err = s.out.Flush()
	}
	if errors.Is(err, errors.ErrUnsupported) || errors.Is(err, presence.ErrInvalid) {
		http.Error(w, "Internal Server Error", http.StatusInternalServerError)
		return nil, fmt.Errorf("sse: events cannot be sent: %w", err)
	}
	if err != nil {
		return nil, fmt.Errorf("sse: the browser has left: %w", err)
	}
	s.ctx, s.cancel = context.WithCancelCause(context.WithoutCancel(r.Context()))
	ended := make(chan struct{})
	stop := context.AfterFunc(r.Context(), func() {
		defer close(ended)
		s.fail(fmt.Errorf("sse: %w: the browser has left: %w", presence.ErrCancelled, context.Cause(r.Context())))
	})
	s.detach = sync.OnceFunc(func() {
		if !stop() {
			<-ended
		}
	})
	go s.run()
	return s, nil
}

// Context returns a context that ends when the browser has left, when it accepts no data for the time of
// [WriteTimeout], and when the Writer is closed. It has the values of the request's context.
func (w *Writer) Context() context.Context { return w.ctx }

// Send sends an event. It returns when the event waits to be written, which means that it blocks while the browser does
// not read. When the browser has left, Send fails at once with an error that wraps [presence.ErrCancelled]; when the
// browser accepts no data, with [os.ErrDeadlineExceeded]; after Close with [presence.ErrClosed].
func (w *Writer) Send(e Event) error {
	if err := cmp.Or(checkText("the name of an event", e.Name), checkText("the id of an event", e.ID)); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.err == nil && !w.closing && len(w.waiting) > 0 && len(w.waiting)+len(e.Data) > maxWaiting {
		w.space.Wait()
	}
	if w.err != nil {
		return w.err
	}
	if w.closing {
		return errClosed
	}
	w.waiting = e.append(w.waiting)
	w.wake()
	return nil
}

// Close writes the events that wait, and ends the Writer. It returns nil if everything was written to the connection,
// and otherwise the error of [Writer.Send]. It does not wait longer than the browser may accept no data.
func (w *Writer) Close() error {
	w.mu.Lock()
	w.closing = true
	w.space.Broadcast()
	w.mu.Unlock()
	w.wake()
	<-w.done
	w.detach()
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

func (w *Writer) wake() {
	select {
	case w.ready <- struct{}{}:
	default:
	}
}

// fail ends the Writer. A write in progress returns.
func (w *Writer) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	// A write that timed out ends the request's context, too: its error replaces what that says.
	if w.err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		w.err = err
	}
	w.waiting = nil
	w.cancel(err)
	w.out.SetWriteDeadline(time.Unix(1, 0))
	w.space.Broadcast()
}

// run writes events until the Writer ends.
func (w *Writer) run() {
	defer close(w.done)
	silent := time.NewTimer(w.keepAlive)
	defer silent.Stop()
	if w.keepAlive <= 0 {
		silent.Stop()
	}
	var events, spare []byte
	for {
		isSilent := false
		select {
		case <-w.ready:
		case <-silent.C:
			isSilent = true
		case <-w.ctx.Done():
			return
		}
		w.mu.Lock()
		events, w.waiting = w.waiting, spare[:0]
		closing := w.closing
		w.space.Broadcast()
		w.mu.Unlock()
		if len(events) == 0 && isSilent {
			events = append(events, comment...)
		}
		if err := w.write(events); err != nil {
			w.fail(err)
			return
		}
		if closing {
			w.cancel(errClosed)
			return
		}
		if spare = events; cap(spare) > 2*maxWaiting {
			spare = nil // do not hold the memory of a large event
		}
		if w.keepAlive > 0 {
			silent.Reset(w.keepAlive)
		}
	}
}

// write writes events to the connection.
func (w *Writer) write(events []byte) error {
	for len(events) > 0 {
		n := min(len(events), maxWrite)
		if err := w.extendDeadline(); err != nil {
			return err
		}
		begin := time.Now()
		_, err := w.w.Write(events[:n])
		if err == nil {
			err = w.out.Flush()
		}
		switch {
		case err == nil:
		case w.writeTimeout > 0 && time.Since(begin) >= w.writeTimeout && errors.Is(err, os.ErrDeadlineExceeded):
			return fmt.Errorf("sse: the browser accepted no data for %v: %w", w.writeTimeout, os.ErrDeadlineExceeded)
		default:
			return fmt.Errorf("sse: %w: the browser has left: %v", presence.ErrCancelled, err)
		}
		events = events[n:]
	}
	return nil
}

// extendDeadline gives the next write its time. It fails if the Writer has failed.
func (w *Writer) extendDeadline() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return w.err
	}
	deadline := time.Time{}
	if w.writeTimeout > 0 {
		deadline = time.Now().Add(w.writeTimeout)
	}
	w.out.SetWriteDeadline(deadline) // a ResponseWriter without deadlines, of a test, returns ErrUnsupported
	return nil
}

func checkText(what, text string) error {
	if strings.ContainsAny(text, "\r\n\x00") {
		return fmt.Errorf("sse: %w: %s contains a line end or NUL: %.80q", presence.ErrInvalid, what, text)
	}
	return nil
}

// append appends the event's text. Each line of the data has a field of its own, so that the data cannot end the event.
func (e *Event) append(to []byte) []byte {
	if e.Name != "" {
		to = append(append(append(to, "event: "...), e.Name...), '\n')
	}
	if e.ID != "" {
		to = append(append(append(to, "id: "...), e.ID...), '\n')
	}
	for rest := e.Data; ; {
		to = append(to, "data: "...)
		end := bytes.IndexAny(rest, "\r\n")
		if end < 0 {
			return append(append(to, rest...), "\n\n"...)
		}
		to = append(append(to, rest[:end]...), '\n')
		if bytes.HasPrefix(rest[end:], []byte("\r\n")) {
			end++
		}
		rest = rest[end+1:]
	}
}
