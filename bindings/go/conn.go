package presence

// #include <nats_presence.h>
import "C"

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// Option is a setting for [Connect], [Conn.Serve] or [Conn.Request]. What is not set has its default.
type Option func(*options)

type options struct {
	pairs [][2]string
	log   func(Event)
}

// With sets an option by name. Times are whole milliseconds, sizes bytes. An unknown name or a wrong value makes the call
// that gets it fail with ErrInvalid.
//
// For Connect: name, user, password, token, nkey_seed, creds_file, tls_required, tls_first, tls_ca_file, tls_cert_file,
// tls_key_file, connect_timeout_ms (5000), retry_on_initial_connect (false), reconnect_min_ms (50), reconnect_max_ms
// (4000), max_reconnects (0: never give up), ping_interval_ms (20000), inbox_prefix (_INBOX), offline_subject
// (client.offline), announce (always, streams or never), lanes (true), heartbeat_ms (5000), peer_grace_ms (1000, for a
// peer on another nats-server 3000), send_buffer_bytes (4194304), receive_buffer_bytes (67108864), session_grace_ms (0),
// worker_threads (1).
//
// For Request: timeout_ms (0: none), retries (0), retry_delay_ms (100), stream_buffer_bytes (262144, without lanes
// 67108864), only_online (false; true: fail with ErrOffline if the client is not online here), header.NAME (a header for
// the worker). manual_credit is this package's own: what a stream's reader has not read yet counts as waiting.
//
// For Serve: max_streams (0: 10,000), detached (false: a handler's return ends its stream), drain_ms (0: what runs is cut
// when its context ends), stop_timeout_ms (0: none, Serve waits until its handlers have returned).
//
// nats_presence.h describes each.
func With(name, value string) Option {
	return func(o *options) { o.pairs = append(o.pairs, [2]string{name, value}) }
}

// WithLog has [Connect] call f with what happens to the connection: events of kind Connected, Disconnected, Serving and
// Log, errors and panics of handlers among the last. f is called by one goroutine of its own, so it may take its time: 256
// events wait for it, further ones are dropped, and an event of kind Log with ErrFull says how many. For Connect only.
func WithLog(f func(Event)) Option { return func(o *options) { o.log = f } }

func collect(opts []Option) (o options) {
	for _, opt := range opts {
		opt(&o)
	}
	return o
}

// value returns the last value of an option, or "".
func (o *options) value(name string) (value string) {
	for _, pair := range o.pairs {
		if pair[0] == name {
			value = pair[1]
		}
	}
	return value
}

// config makes the C library's set of options, to be freed by the caller; nil if all are defaults.
func (o *options) config() (*C.presence_config, error) {
	if len(o.pairs) == 0 {
		return nil, nil
	}
	config := C.presence_config_new()
	for _, pair := range o.pairs {
		if err := setOption(config, pair[0], pair[1]); err != nil {
			C.presence_config_free(config)
			return nil, err
		}
	}
	return config, nil
}

func setOption(config *C.presence_config, name, value string) error {
	key, err := cText("the name of option "+strconv.Quote(name), name)
	if err != nil {
		return err
	}
	text, err := cText("the value of option "+name, value)
	if err != nil {
		return err
	}
	if C.presence_config_set(config, key, text) == C.PRESENCE_OK {
		return nil
	}
	var report C.presence_error
	return reported(C.presence_config_error(config, &report), &report)
}

// Conn is a connection to nats-server, made anew whenever it is lost, until Close.
type Conn struct {
	handle  *C.presence_conn
	queue   *queue
	ctx     context.Context // ends with the connection; its cause says why
	end     context.CancelCauseFunc
	closing atomic.Bool
	busy    atomic.Uint64 // requests that were refused here, not by C
	drained chan struct{} // closed when the last event was dealt with
	log     chan Event    // nil if nobody wants to know
	unsaid  atomic.Uint64 // events for which log had no room

	mu       sync.Mutex
	lastTag  uint64
	services map[uint64]*service
	streams  map[uint64]*Stream
	senders  map[*C.presence_sender]*Sender
}

// Connect connects to nats-server and returns when it is reached or cannot be. url is one URL or several with commas
// between, as in "nats://a:4222,tls://b:4222"; user and password, or a token, may stand in it.
//
// Fails with ErrInvalid (url, options), ErrDisconnected (cannot be reached, or refuses us) or ErrTimeout.
func Connect(url string, opts ...Option) (*Conn, error) {
	o := collect(opts)
	config, err := o.config()
	if err != nil {
		return nil, err
	}
	defer C.presence_config_free(config)
	text, err := cText("url", url)
	if err != nil {
		return nil, err
	}
	queue, err := newQueue()
	if err != nil {
		return nil, err
	}
	c := &Conn{
		queue:    queue,
		drained:  make(chan struct{}),
		services: make(map[uint64]*service),
		streams:  make(map[uint64]*Stream),
		senders:  make(map[*C.presence_sender]*Sender),
	}
	var report C.presence_error
	if err := reported(C.presence_connect(text, config, &c.handle, &report), &report); err != nil {
		queue.free()
		return nil, err
	}
	if err := failed(C.presence_conn_watch(c.handle, queue.handle, 0), "watch"); err != nil {
		C.presence_close(c.handle, 0)
		queue.free()
		return nil, err
	}
	c.ctx, c.end = context.WithCancelCause(context.Background())
	if o.log != nil {
		c.log = make(chan Event, 256)
		go c.report(o.log)
	}
	go c.dispatch()
	return c, nil
}

// Close closes the connection: each Serve returns ErrClosed, senders and streams that still run end with ErrClosed, the
// other ends are told. Then it waits until the server has all that was sent before: until ctx's deadline, or for five
// seconds if ctx has none. It does not wait for handlers (Serve does), nor for a connection, where there is none.
//
// nil means that the server has it all. With ErrTimeout or ErrDisconnected it may not; the connection is closed all the
// same. ErrClosed: it was closed already, or given up (option max_reconnects).
func (c *Conn) Close(ctx context.Context) error {
	drain := 5 * time.Second
	if deadline, ok := ctx.Deadline(); ok {
		drain = time.Until(deadline)
	}
	if ctx.Err() != nil || drain < 0 {
		drain = 0
	}
	if c.closing.Swap(true) {
		return failed(C.PRESENCE_CLOSED, "connection")
	}
	rc := C.presence_close(c.handle, C.int64_t(drain.Milliseconds()))
	c.end(failed(C.PRESENCE_CLOSED, "connection"))
	c.queue.wake()
	<-c.drained
	return failed(rc, "connection")
}

// ListenOffline applies the offline announcements of other processes in this one, from its return on; without a
// connection now, from the next one on. Serve does it too. Once more is fine. Fails with ErrClosed or ErrTimeout.
func (c *Conn) ListenOffline() error {
	return failed(C.presence_listen_offline(c.handle), "listen for offline announcements")
}

// Stats is what a connection has done since Connect, and what it has in hand.
type Stats struct {
	Connected       bool   // there is a connection to nats-server now
	Connects        uint64 // how often one was made
	Streams         uint64 // running streams that were requested here
	Senders         uint64 // running streams that are served here
	Requests        uint64 // requests that came to the services here
	RequestsBusy    uint64 // requests answered with "server busy"
	RequestsIgnored uint64 // requests not answered, or refused: no usable reply subject, a bad client id
	MessagesOut     uint64 // messages sent, of all kinds
	MessagesIn      uint64 // messages that came in, of all kinds
	MessagesIgnored uint64 // messages that came in for no running stream, or that nobody should have sent
	OfflineOut      uint64 // offline announcements sent
	OfflineIn       uint64 // offline announcements of other processes that came in
	BytesWaiting    uint64 // bytes that wait to be sent; on lanes, to be acknowledged
	Lanes           uint64 // other processes with this library that streams run, or ran, to or from
}

// Stats returns the connection's figures; all zero once it is closed.
func (c *Conn) Stats() Stats {
	var s C.presence_stats
	if C.presence_conn_stats(c.handle, &s) != C.PRESENCE_OK {
		return Stats{}
	}
	return Stats{
		s.connected != 0, uint64(s.connects), uint64(s.streams), uint64(s.senders),
		uint64(s.requests), uint64(s.requests_busy) + c.busy.Load(), uint64(s.requests_ignored),
		uint64(s.messages_out), uint64(s.messages_in), uint64(s.messages_ignored),
		uint64(s.offline_out), uint64(s.offline_in), uint64(s.bytes_waiting), uint64(s.lanes),
	}
}

// dispatch takes the events of all services and streams out of the queue. Nothing in it waits for a reader or a handler.
func (c *Conn) dispatch() {
	defer close(c.drained)
	for {
		events, err := c.queue.wait()
		if err != nil {
			c.end(err)
			break
		}
		if len(events) == 0 && c.closing.Load() {
			break
		}
		for len(events) > 0 {
			if n, size := runOf(events); n > 0 {
				if s := c.stream(uint64(events[0].tag)); s != nil {
					s.put(events[:n], size)
				}
				events = events[n:]
			} else {
				c.handleEvent(&events[0])
				events = events[1:]
			}
		}
	}
	// Close has ended all streams, with an event for each; whoever came too late for that must not wait for ever.
	c.mu.Lock()
	streams := c.streams
	c.streams = nil
	c.mu.Unlock()
	for _, stream := range streams {
		stream.finish(failed(C.PRESENCE_CLOSED, "stream"), false)
	}
	c.queue.free()
}

func (c *Conn) handleEvent(e *C.presence_event) {
	switch e.kind {
	case C.PRESENCE_EVENT_REQUEST:
		c.accept(e)
	case C.PRESENCE_EVENT_STOPPED:
		if s := c.sender(e.sender); s != nil {
			s.stopped()
		}
	case C.PRESENCE_EVENT_WRITABLE:
		if s := c.sender(e.sender); s != nil {
			signal(s.writable)
		}
	case C.PRESENCE_EVENT_END:
		if s := c.stream(uint64(e.tag)); s != nil {
			s.finish(io.EOF, false)
		}
	case C.PRESENCE_EVENT_ERROR:
		if s := c.stream(uint64(e.tag)); s != nil {
			s.finish(&Error{Status(e.status), string(view(e.data, e.data_len))}, false)
		}
	case C.PRESENCE_EVENT_CONNECTED, C.PRESENCE_EVENT_DISCONNECTED, C.PRESENCE_EVENT_LOG:
		event := exported(e)
		if event.Kind == Disconnected && event.Subject == "" && event.Status == ErrClosed && !c.closing.Load() {
			c.end(&Error{ErrDisconnected, "the connection was given up: " + event.Text})
		}
		c.tell(event)
	}
}

// report gives events to the option WithLog's function.
func (c *Conn) report(log func(Event)) {
	for {
		select {
		case event := <-c.log:
			log(event)
			if n := c.unsaid.Swap(0); n > 0 {
				log(Event{Kind: Log, Status: ErrFull, Text: fmt.Sprintf("%d events were dropped: %d waited already", n, cap(c.log))})
			}
		case <-c.drained:
			for len(c.log) > 0 {
				log(<-c.log)
			}
			return
		}
	}
}

// tell gives the event to the log, if there is one and it has room.
func (c *Conn) tell(event Event) {
	if c.log != nil {
		select {
		case c.log <- event:
		default:
			c.unsaid.Add(1)
		}
	}
}

// signal leaves a token for whoever waits, or for the next one who would.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (c *Conn) sender(handle *C.presence_sender) *Sender {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.senders[handle]
}

func (c *Conn) stream(tag uint64) *Stream {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.streams[tag]
}
