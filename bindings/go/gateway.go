package presence

// #include <nats_presence.h>
//
// // uint8_t in place of void, so that cgo need not search the data for pointers.
// static inline presence_status request(presence_conn *conn, presence_queue *queue, const char *subject, const uint8_t *data,
//                               size_t len, const char *id, size_t id_len, const presence_config *config, uint64_t tag,
//                               presence_stream **out, presence_error *error) {
//   const presence_request_args args = {sizeof args, subject, data, len, id, id_len, tag, config};
//   return presence_request(conn, queue, &args, out, error);
// }
// #cgo noescape request
// #cgo nocallback request
// #cgo noescape presence_stream_consumed
// #cgo nocallback presence_stream_consumed
import "C"

import (
	"context"
	"encoding/binary"
	"io"
	"iter"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"
	"unsafe"
)

const (
	// How much a message counts against the window in addition to its bytes.
	messageOverhead = 64
	// The largest and the default window: how many bytes a worker on a lane may send ahead of the reader.
	maxWindow     = 4 << 20
	defaultWindow = 256 << 10
	// Messages of a stream that arrive together share one allocation of at most this size (a run). The limit bounds how
	// much memory a message that the reader keeps holds in use.
	maxRun = 64 << 10
	// The size of the length before each message in a run.
	prefix = 4
)

// Stream is a stream that this process requested. Read it to its end, close it, or end the context of [Conn.Request].
// Otherwise its worker goes on: no finalizer closes a stream that becomes unreachable.
//
// A slow reader blocks its own worker and no other stream. (A worker without this library, or with lanes=false, cannot
// be blocked: its stream ends with ErrFull when more than stream_buffer_bytes are unread.)
type Stream struct {
	conn    *Conn
	tag     uint64
	portion int           // how much is read before credit is returned: an eighth of the window
	ready   chan struct{} // holds a token when there may be something to read
	trace   StreamTrace

	mu      sync.Mutex
	tracing bool // trace.FirstMessage is being called; put calls trace.Ended after it, if the stream has ended meanwhile
	handle  *C.presence_stream
	run     []byte   // the run being read: messages, each preceded by its length
	runs    [][]byte // the runs after it
	bytes   int      // message bytes that were read since credit was last returned
	weight  int      // the same, with messageOverhead for each message
	err     error    // why no more messages arrive; io.EOF after the worker's end
	detach  func() bool
}

// Request requests a stream for a client: data is sent to one of the workers that serve the subject. It does not wait
// for the worker. The client is online in this process while the stream runs. With the empty id the stream belongs to
// no client and cannot be stopped at the worker.
//
// When ctx ends the stream is cancelled, as by [Stream.Close]. When the client is marked offline the stream ends with
// ErrOffline.
//
// Request fails with ErrInvalid, ErrTooLarge, ErrFull (the send buffer is full), ErrDisconnected, ErrClosed (the
// connection was closed), ErrCancelled (ctx has ended) or ErrOffline (the client is not online here, see [OnlyOnline]).
// If no worker serves the subject, the stream ends with ErrNoResponders.
func (c *Conn) Request(
	ctx context.Context, subject string, data []byte, clientID string, opts ...RequestOption,
) (*Stream, error) {
	if ctx.Err() != nil {
		return nil, contextError(ctx)
	}
	cSubject, err := cText("subject", subject)
	if err != nil {
		return nil, err
	}
	o := collect(opts)
	if slices.ContainsFunc(o.pairs, func(p pair) bool { return p.name == "manual_credit" }) {
		return nil, invalid("option manual_credit is reserved: this package returns credit as messages are read")
	}
	o.pairs = append(o.pairs, pair{"manual_credit", "true"})
	config, err := o.config()
	if err != nil {
		return nil, err
	}
	defer freeConfig(config)
	s := &Stream{conn: c, portion: defaultWindow / 8, ready: make(chan struct{}, 1), trace: o.trace}
	if limit, err := strconv.Atoi(o.value("stream_buffer_bytes")); err == nil {
		s.portion = min(limit, maxWindow) / 8
	}
	if !c.addStream(s) {
		return nil, statusError(C.PRESENCE_CLOSED, "connection")
	}
	var handle *C.presence_stream
	var report C.presence_error
	rc := C.request(c.handle, c.queue.handle, cSubject, (*C.uint8_t)(unsafe.SliceData(data)), C.size_t(len(data)),
		cString(clientID), C.size_t(len(clientID)), config, C.uint64_t(s.tag), &handle, &report)
	if err := callError(rc, &report); err != nil {
		c.removeStream(s)
		return nil, err
	}
	s.attach(ctx, handle)
	return s, nil
}

// Messages yields the stream's messages. If the stream ended for any other reason than the worker's end, it then yields
// one error: ErrRemote (the worker's own), ErrOffline, ErrBusy (the worker has no capacity), ErrCancelled, ErrPeerGone,
// ErrNoResponders, ErrDisconnected, ErrTimeout, ErrFull, …. Leaving the loop early closes the stream: by break, return,
// a panic or runtime.Goexit. When the context of [Conn.Request] ends, the stream is cancelled at that moment, whatever
// the loop is doing, and the loop gets ErrCancelled next.
//
// The reader owns each message. Small messages that arrived together share memory: clone a message that you keep for
// long.
func (s *Stream) Messages() iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		defer s.Close()
		for {
			message, err := s.Next(context.Background())
			if err == io.EOF || !yield(message, err) || err != nil {
				return
			}
		}
	}
}

// Next waits for the stream's next message. It returns io.EOF once the worker has ended the stream, and otherwise the
// errors that [Stream.Messages] lists.
//
// When ctx ends, by cancellation or at its deadline, the stream is cancelled as by [Stream.Close], and Next returns
// ErrCancelled with ctx's cause: a reader that has left stops its worker. To limit only the wait, use
// [Stream.NextTimeout].
func (s *Stream) Next(ctx context.Context) ([]byte, error) {
	for {
		select {
		case <-ctx.Done():
			s.finish(contextError(ctx), true)
		default:
		}
		message, err, ok := s.take()
		if ok {
			return message, err
		}
		select {
		case <-s.ready:
		case <-ctx.Done():
		}
	}
}

// NextTimeout is like Next but waits at most for limit. After that it returns [os.ErrDeadlineExceeded], and the stream
// goes on.
func (s *Stream) NextTimeout(limit time.Duration) ([]byte, error) {
	var expired <-chan time.Time
	for {
		message, err, ok := s.take()
		if ok {
			return message, err
		}
		if expired == nil {
			expired = time.After(limit)
		}
		select {
		case <-s.ready:
		case <-expired:
			return nil, os.ErrDeadlineExceeded
		}
	}
}

// Close cancels the stream if it still runs, and discards its unread messages; from then on Next returns ErrCancelled.
// It always returns nil. Calling Close again has no effect.
//
// This stops the sender of this stream, with ErrCancelled, and nothing else. A worker on level 0 (one without this
// library, or with lanes=false) can be stopped only by announcing the client offline, which also stops the client's
// streams at other gateways. The announcement is made unless another stream, a session or a mark keeps the client
// online here. If the worker has not answered yet, it is made after the worker's first answer, or after 5 seconds
// without one.
func (s *Stream) Close() error {
	s.finish(statusError(C.PRESENCE_CANCELLED, "stream"), true)
	return nil
}

// addStream gives the stream its tag. It returns false if the connection is closed.
func (c *Conn) addStream(s *Stream) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.streams == nil {
		return false
	}
	c.lastTag++
	s.tag = c.lastTag
	c.streams[s.tag] = s
	return true
}

func (c *Conn) removeStream(s *Stream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.streams, s.tag)
}

// attach gives a requested stream its handle. Events of the stream may have arrived already.
func (s *Stream) attach(ctx context.Context, handle *C.presence_stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		C.presence_stream_free(handle)
		return
	}
	s.handle = handle
	s.detach = context.AfterFunc(ctx, func() { s.finish(contextError(ctx), true) })
}

// runOf returns how many of the first events are messages of one stream that fit into one run, and the size of that
// run.
func runOf(events []C.presence_event) (n, size int) {
	for i := range events {
		e := &events[i]
		if e.kind != C.PRESENCE_EVENT_DATA || e.tag != events[0].tag || n > 0 && size+prefix+int(e.data_len) > maxRun {
			break
		}
		n++
		size += prefix + int(e.data_len)
	}
	return n, size
}

// put copies messages into a run for the reader. It does not wait for the reader.
func (s *Stream) put(events []C.presence_event, size int) {
	run := make([]byte, 0, size)
	for i := range events {
		data := view(events[i].data, events[i].data_len)
		run = binary.NativeEndian.AppendUint32(run, uint32(len(data)))
		run = append(run, data...)
	}
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		return
	}
	s.runs = append(s.runs, run)
	first := s.trace.FirstMessage
	s.trace.FirstMessage, s.tracing = nil, first != nil
	s.mu.Unlock()
	signal(s.ready)
	if first == nil {
		return
	}
	first()
	s.mu.Lock()
	s.tracing = false
	err := s.err
	s.mu.Unlock()
	if err != nil {
		s.traceEnd(err)
	}
}

func (s *Stream) traceEnd(err error) {
	if s.trace.Ended == nil {
		return
	}
	if err == io.EOF {
		err = nil
	}
	s.trace.Ended(err)
}

// take returns the next message, or the error that ended the stream; ok is false if there is neither yet. It returns
// credit for what was read when the reader is about to wait, and after each eighth of the window.
func (s *Stream) take() (message []byte, err error, ok bool) {
	s.mu.Lock()
	if len(s.run) == 0 && len(s.runs) > 0 {
		s.run, s.runs[0] = s.runs[0], nil
		s.runs = s.runs[1:]
	}
	switch {
	case len(s.run) > 0:
		end := prefix + int(binary.NativeEndian.Uint32(s.run))
		message, s.run = s.run[prefix:end:end], s.run[end:]
		s.bytes += len(message)
		s.weight += len(message) + messageOverhead
		ok = true
	case s.err != nil:
		err, ok = s.err, true
	}
	read, returnsCredit := s.bytes, s.err == nil && s.weight > 0 && (!ok || s.weight >= s.portion && s.bytes > 0)
	if returnsCredit {
		s.bytes, s.weight = 0, 0
	}
	if len(s.run) > 0 || len(s.runs) > 0 || s.err != nil {
		signal(s.ready) // wakes other goroutines that wait to read
	}
	handle := s.handle
	s.mu.Unlock()
	if returnsCredit {
		C.presence_stream_consumed(handle, C.size_t(read)) // CLOSED if the stream has just ended: no credit needed
	}
	return message, err, ok
}

// finish ends the stream, once; a stream that still runs is cancelled. With discard, unread messages are discarded and
// the reader gets err, even if the worker had ended the stream: what was not read must not look complete.
func (s *Stream) finish(err error, discard bool) {
	s.mu.Lock()
	isUnread := len(s.run) > 0 || len(s.runs) > 0
	if discard {
		s.run, s.runs = nil, nil
	}
	if s.err != nil {
		if discard && isUnread {
			s.err = err
		}
		s.mu.Unlock()
		return
	}
	s.err = err
	handle, detach, tracing := s.handle, s.detach, s.tracing
	s.mu.Unlock()
	signal(s.ready)
	if !tracing {
		s.traceEnd(err)
	}
	s.conn.removeStream(s)
	if handle != nil {
		detach()
		C.presence_stream_free(handle)
	}
}
