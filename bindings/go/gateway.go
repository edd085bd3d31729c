package presence

// #include <nats_presence.h>
// #cgo noescape presence_request
// #cgo nocallback presence_request
import "C"

import (
	"context"
	"fmt"
	"io"
	"iter"
	"strconv"
	"sync"
	"unsafe"
)

// What may wait for a stream's reader, as the C library counts it.
const (
	defaultBuffer   = 64 << 20
	messageOverhead = 64
)

// Stream is a stream that this process requested. It must be read to its end or closed, else it holds what arrives.
type Stream struct {
	conn  *Conn
	tag   uint64
	limit int
	ready chan struct{} // a token: look again

	mu       sync.Mutex
	handle   *C.presence_stream
	messages [][]byte
	bytes    int   // in messages, as they count against limit
	err      error // why nothing follows messages; io.EOF after the worker's end
	detach   func() bool
}

// Request requests a stream for a client: data goes to one of the workers that serve the subject. It does not wait for
// the worker. The client is online here as long as the stream runs; with the empty id the stream is nobody's, and cannot
// be stopped at the worker.
//
// The stream is cancelled when ctx ends (see [Stream.Close]), and ends with ErrOffline when the client is marked offline.
// Its options timeout_ms, retries, stream_buffer_bytes, … are told at [With].
//
// Fails with ErrInvalid, ErrTooLarge, ErrFull (too much waits to be sent), ErrDisconnected, ErrClosed (the connection),
// ErrCancelled (ctx). That nobody serves the subject is an error of the stream: ErrNoResponders.
func (c *Conn) Request(ctx context.Context, subject string, data []byte, clientID string, opts ...Option) (*Stream, error) {
	if ctx.Err() != nil {
		return nil, cancelled(ctx)
	}
	cSubject, err := cText("subject", subject)
	if err != nil {
		return nil, err
	}
	o := collect(opts)
	config, err := o.config()
	if err != nil {
		return nil, err
	}
	defer C.presence_config_free(config)
	s := &Stream{conn: c, limit: defaultBuffer, ready: make(chan struct{}, 1)}
	if limit, err := strconv.Atoi(o.value("stream_buffer_bytes")); err == nil {
		s.limit = limit
	}
	if !c.add(s) {
		return nil, failed(C.PRESENCE_CLOSED, "connection")
	}
	var handle *C.presence_stream
	var report C.presence_error
	rc := C.presence_request(c.handle, c.queue.handle, cSubject, unsafe.Pointer(unsafe.SliceData(data)), C.size_t(len(data)),
		cString(clientID), C.size_t(len(clientID)), config, C.uint64_t(s.tag), &handle, &report)
	if err := reported(rc, &report); err != nil {
		c.remove(s)
		return nil, err
	}
	s.begin(ctx, handle)
	return s, nil
}

// Messages yields the stream's messages, and then, unless the worker ended it, one error as the last: ErrRemote (the
// worker's own), ErrOffline, ErrCancelled, ErrNoResponders, ErrDisconnected, ErrTimeout, ErrFull (this reader was too
// slow), …. Leaving the loop early closes the stream.
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

// Next waits for the stream's next message. It returns io.EOF once the worker has ended the stream, and the errors that
// [Stream.Messages] tells. ctx limits this wait only: when it ends Next returns its cause, and the stream goes on.
func (s *Stream) Next(ctx context.Context) ([]byte, error) {
	for {
		message, err, ok := s.take()
		if ok {
			return message, err
		}
		select {
		case <-s.ready:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// Close cancels the stream if it still runs, and drops what was not read; Next returns ErrCancelled then. The worker is
// told that the client left, unless another stream, a session or a mark keeps it online here; then the worker goes on.
// Once more has no effect. It returns nil.
func (s *Stream) Close() error {
	s.finish(failed(C.PRESENCE_CANCELLED, "stream"), true)
	return nil
}

// add gives the stream its tag; false when the connection is closed.
func (c *Conn) add(s *Stream) bool {
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

func (c *Conn) remove(s *Stream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.streams, s.tag)
}

// begin completes a stream that was requested, whose events may have come already.
func (s *Stream) begin(ctx context.Context, handle *C.presence_stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		C.presence_stream_free(handle)
		return
	}
	s.handle = handle
	s.detach = context.AfterFunc(ctx, func() { s.finish(cancelled(ctx), true) })
}

// handleEvent takes an event of the stream; it does not wait for the reader.
func (s *Stream) handleEvent(e *C.presence_event) {
	switch e.kind {
	case C.PRESENCE_EVENT_DATA:
		if !s.put(view(e.data, e.data_len)) {
			text := fmt.Sprintf("the reader of a stream was too slow: more than %d bytes waited for it", s.limit)
			s.finish(&Error{ErrFull, text}, false)
			s.conn.tell(Event{Kind: Log, Status: ErrFull, Text: text})
		}
	case C.PRESENCE_EVENT_END:
		s.finish(io.EOF, false)
	default:
		s.finish(&Error{Status(e.status), string(view(e.data, e.data_len))}, false)
	}
}

// put copies a message for the reader; false when there is no room.
func (s *Stream) put(data []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return true
	}
	if s.bytes+len(data)+messageOverhead > s.limit {
		return false
	}
	s.bytes += len(data) + messageOverhead
	s.messages = append(s.messages, append(make([]byte, 0, len(data)), data...))
	signal(s.ready)
	return true
}

// take gives the reader what there is: a message, or why there is none any more.
func (s *Stream) take() (message []byte, err error, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.messages) > 0 {
		message = s.messages[0]
		s.messages[0] = nil
		s.messages = s.messages[1:]
		s.bytes -= len(message) + messageOverhead
	} else if s.err == nil {
		return nil, nil, false
	} else {
		err = s.err
	}
	if len(s.messages) > 0 || s.err != nil {
		signal(s.ready) // for others who wait too
	}
	return message, err, true
}

// finish ends the stream, once; one that still runs is cancelled.
func (s *Stream) finish(err error, drop bool) {
	s.mu.Lock()
	if drop {
		s.messages, s.bytes = nil, 0
	}
	if s.err != nil {
		s.mu.Unlock()
		return
	}
	s.err = err
	handle, detach := s.handle, s.detach
	s.mu.Unlock()
	signal(s.ready)
	s.conn.remove(s)
	if handle != nil {
		detach()
		C.presence_stream_free(handle)
	}
}
