package presence

// #include <nats_presence.h>
//
// // With types that cgo need not look behind.
// static inline int32_t request(presence_conn *conn, presence_queue *queue, const char *subject, const uint8_t *data,
//                               size_t len, const char *id, size_t id_len, const presence_config *config, uint64_t tag,
//                               presence_stream **out, presence_error *error) {
//   return presence_request(conn, queue, subject, data, len, id, id_len, config, tag, out, error);
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
	// What a message counts in addition to its bytes.
	messageOverhead = 64
	// How far a worker on a lane may be ahead of the reader, at most, and by default.
	maxWindow     = 4 << 20
	defaultWindow = 256 << 10
	// Messages that came together are kept together, up to this size: what a reader holds on to keeps no more alive.
	maxRun = 64 << 10
	// Before each message in a run: its length.
	prefix = 4
)

// Stream is a stream that this process requested. It must be read to its end or closed, or the context of [Conn.Request]
// must end. Otherwise its worker goes on: a stream that is forgotten is not collected as garbage.
//
// A reader that does not read holds its own worker back, and no other stream. (A worker without this library, or with
// lanes=false, cannot be held back: then the stream ends with ErrFull when more than stream_buffer_bytes wait.)
type Stream struct {
	conn    *Conn
	tag     uint64
	portion int           // how much is read before the library is notified: an eighth of the window
	ready   chan struct{} // a token: look again

	mu     sync.Mutex
	handle *C.presence_stream
	run    []byte   // what is being read: messages, each behind its length
	runs   [][]byte // what waits behind it
	bytes  int      // what was read and the worker not told yet
	weight int      // the same as it counts against the window
	err    error    // why nothing follows what waits; io.EOF after the worker's end
	detach func() bool
}

// Request requests a stream for a client: data goes to one of the workers that serve the subject. It does not wait for
// the worker. The client is online here as long as the stream runs; with the empty id the stream is nobody's, and cannot
// be stopped at the worker.
//
// The stream is cancelled when ctx ends (see [Stream.Close]), and ends with ErrOffline when the client is marked offline.
// Its options timeout_ms, retries, stream_buffer_bytes, … are told at [With].
//
// Fails with ErrInvalid, ErrTooLarge, ErrFull (too much waits to be sent), ErrDisconnected, ErrClosed (the connection),
// ErrCancelled (ctx), ErrOffline (the client is not online here, and the option only_online is set). That nobody serves the subject is an error of the stream: ErrNoResponders.
func (c *Conn) Request(ctx context.Context, subject string, data []byte, clientID string, opts ...Option) (*Stream, error) {
	if ctx.Err() != nil {
		return nil, cancelled(ctx)
	}
	cSubject, err := cText("subject", subject)
	if err != nil {
		return nil, err
	}
	o := collect(opts)
	if slices.ContainsFunc(o.pairs, func(pair [2]string) bool { return pair[0] == "manual_credit" }) {
		return nil, invalid("option manual_credit is not for you: what was not read yet counts as waiting")
	}
	o.pairs = append(o.pairs, [2]string{"manual_credit", "true"})
	config, err := o.config()
	if err != nil {
		return nil, err
	}
	defer C.presence_config_free(config)
	s := &Stream{conn: c, portion: defaultWindow / 8, ready: make(chan struct{}, 1)}
	if limit, err := strconv.Atoi(o.value("stream_buffer_bytes")); err == nil {
		s.portion = min(limit, maxWindow) / 8
	}
	if !c.add(s) {
		return nil, failed(C.PRESENCE_CLOSED, "connection")
	}
	var handle *C.presence_stream
	var report C.presence_error
	rc := C.request(c.handle, c.queue.handle, cSubject, (*C.uint8_t)(unsafe.SliceData(data)), C.size_t(len(data)),
		cString(clientID), C.size_t(len(clientID)), config, C.uint64_t(s.tag), &handle, &report)
	if err := reported(rc, &report); err != nil {
		c.remove(s)
		return nil, err
	}
	s.begin(ctx, handle)
	return s, nil
}

// Messages yields the stream's messages, and then, unless the worker ended it, one error as the last: ErrRemote (the
// worker's own), ErrOffline, ErrBusy (the worker has no capacity), ErrCancelled, ErrPeerGone, ErrNoResponders,
// ErrDisconnected, ErrTimeout, ErrFull, ….
// Leaving the loop early closes the stream: by break, return, a panic or runtime.Goexit. When the context of [Conn.Request]
// ends the stream is cancelled at that moment, whatever the loop is doing, and the loop gets ErrCancelled next.
//
// Each message is the reader's own. Small ones that came together share memory: clone one that is to be kept for long.
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
// [Stream.Messages] tells.
//
// When ctx ends, by cancellation or its deadline, the stream is cancelled as by [Stream.Close], and Next returns ErrCancelled
// with ctx's cause: a reader that has left stops its worker. To wait for some time only, use [Stream.NextTimeout].
func (s *Stream) Next(ctx context.Context) ([]byte, error) {
	for {
		select {
		case <-ctx.Done():
			s.finish(cancelled(ctx), true)
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

// NextTimeout is Next with a limit of time for this wait. When it is over NextTimeout returns [os.ErrDeadlineExceeded], and
// the stream goes on.
func (s *Stream) NextTimeout(limit time.Duration) ([]byte, error) {
	var over <-chan time.Time
	for {
		message, err, ok := s.take()
		if ok {
			return message, err
		}
		if over == nil {
			over = time.After(limit)
		}
		select {
		case <-s.ready:
		case <-over:
			return nil, os.ErrDeadlineExceeded
		}
	}
}

// Close cancels the stream if it still runs, and drops what was not read; Next returns ErrCancelled then. It returns nil.
// Once more has no effect.
//
// This stops the stream's sender, with ErrCancelled, and nothing else. A worker on level 0 (without this library, or with
// lanes=false) can be stopped only by announcing the client offline, which also stops the client's streams at other gateways.
// That is done unless another stream, a session or a mark keeps the client online here. Where the worker has not answered
// yet, it is done after its first answer, or 5 seconds without one.
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

// runOf tells how many events at the beginning are messages of the same stream, to be kept together, and in how many bytes.
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

// put copies messages for the reader, whom it does not wait for.
func (s *Stream) put(events []C.presence_event, size int) {
	run := make([]byte, 0, size)
	for i := range events {
		data := view(events[i].data, events[i].data_len)
		run = binary.NativeEndian.AppendUint32(run, uint32(len(data)))
		run = append(run, data...)
	}
	s.mu.Lock()
	if s.err == nil {
		s.runs = append(s.runs, run)
	}
	s.mu.Unlock()
	signal(s.ready)
}

// take gives the reader what there is: a message, or why there is none any more. Before the reader has to wait, and after
// each eighth of the window, the library is notified of what was read.
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
	used, tell := s.bytes, s.err == nil && s.weight > 0 && (!ok || s.weight >= s.portion && s.bytes > 0)
	if tell {
		s.bytes, s.weight = 0, 0
	}
	if len(s.run) > 0 || len(s.runs) > 0 || s.err != nil {
		signal(s.ready) // for others who wait too
	}
	handle := s.handle
	s.mu.Unlock()
	if tell {
		C.presence_stream_consumed(handle, C.size_t(used)) // CLOSED if it has just ended: then there is nobody to tell
	}
	return message, err, ok
}

// finish ends the stream, once; one that still runs is cancelled. With drop nothing more is read of it, and a reader who
// has not read all yet must not take it for complete.
func (s *Stream) finish(err error, drop bool) {
	s.mu.Lock()
	isUnread := len(s.run) > 0 || len(s.runs) > 0
	if drop {
		s.run, s.runs = nil, nil
	}
	if s.err != nil {
		if drop && isUnread {
			s.err = err
		}
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
