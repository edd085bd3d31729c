package presence

// #include <nats_presence.h>
import "C"

import (
	"context"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// Conn is a connection to nats-server. It reconnects whenever the connection is lost, until Close.
type Conn struct {
	handle  *C.presence_conn
	queue   *queue
	ctx     context.Context // ends with the connection; its cause says why
	end     context.CancelCauseFunc
	closing atomic.Bool
	busy    atomic.Uint64 // requests that this package refused, not the C library
	drained chan struct{} // closed when the last event was handled
	log     chan Event    // nil without WithLog
	dropped atomic.Uint64 // events that were dropped because log was full
	release func()        // frees what the options need as long as the connection exists

	mu       sync.Mutex
	lastTag  uint64
	services map[uint64]*Service
	streams  map[uint64]*Stream
	senders  map[*C.presence_sender]*Sender
}

// Connect connects to nats-server. It returns when the connection is made or has failed. url is one URL, or several
// separated by commas, such as "nats://a:4222,tls://b:4222"; a URL may contain user and password, or a token.
//
// It fails with ErrInvalid (url, options), ErrDisconnected (nats-server cannot be reached, or refuses the connection)
// or ErrTimeout.
func Connect(url string, opts ...ConnectOption) (*Conn, error) {
	o := collect(opts)
	release, err := o.prepare()
	if err != nil {
		return nil, err
	}
	c, err := connectWith(url, &o)
	if err != nil {
		release()
		return nil, err
	}
	c.release = release
	return c, nil
}

func connectWith(url string, o *options) (*Conn, error) {
	config, err := o.config()
	if err != nil {
		return nil, err
	}
	defer freeConfig(config)
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
		services: make(map[uint64]*Service),
		streams:  make(map[uint64]*Stream),
		senders:  make(map[*C.presence_sender]*Sender),
	}
	var report C.presence_error
	if err := callError(C.presence_connect(text, config, &c.handle, &report), &report); err != nil {
		queue.free()
		return nil, err
	}
	if err := statusError(C.presence_conn_watch(c.handle, queue.handle, 0), "watch"); err != nil {
		C.presence_close(c.handle, 0)
		queue.free()
		return nil, err
	}
	c.ctx, c.end = context.WithCancelCause(context.Background())
	if o.log != nil {
		c.log = make(chan Event, 256)
		go c.runLog(o.log)
	}
	go c.dispatch()
	return c, nil
}

// Close closes the connection: each Serve returns ErrClosed, senders and streams that still run end with ErrClosed, and
// their peers are notified. Then it waits until nats-server has received everything that was sent: until ctx's
// deadline, or for five seconds if ctx has none. It does not wait for handlers (Serve does), nor for a reconnect.
//
// Close returns nil if nats-server has received everything. With ErrTimeout or ErrDisconnected it may not have; the
// connection is closed all the same. ErrClosed means that it was closed before, or given up (option max_reconnects).
func (c *Conn) Close(ctx context.Context) error {
	drain := 5 * time.Second
	if deadline, ok := ctx.Deadline(); ok {
		drain = time.Until(deadline)
	}
	if ctx.Err() != nil || drain < 0 {
		drain = 0
	}
	if c.closing.Swap(true) {
		return statusError(C.PRESENCE_CLOSED, "connection")
	}
	rc := C.presence_close(c.handle, C.int64_t(drain.Milliseconds()))
	c.end(statusError(C.PRESENCE_CLOSED, "connection"))
	c.queue.wake()
	<-c.drained
	c.release()
	return statusError(rc, "connection")
}

// ListenOffline applies the offline announcements of other processes in this one: from its return on or, if there is no
// connection now, from the next one on. Serve does this too. Calling it again has no effect. It fails with ErrClosed or
// ErrTimeout.
func (c *Conn) ListenOffline() error {
	return statusError(C.presence_listen_offline(c.handle), "listen for offline announcements")
}

// Stats counts what a connection has done since Connect, and what it holds now.
type Stats struct {
	Connected       bool   // there is a connection to nats-server now
	Connects        uint64 // how often a connection was made
	Streams         uint64 // running streams that were requested here
	Senders         uint64 // running streams that are served here
	Requests        uint64 // requests that arrived at the services here
	RequestsBusy    uint64 // requests answered with "server busy"
	RequestsIgnored uint64 // requests not answered, or refused: no usable reply subject, an invalid client id
	MessagesOut     uint64 // messages sent, of all kinds
	MessagesIn      uint64 // messages received, of all kinds
	MessagesIgnored uint64 // messages received for no running stream, or not expected from any peer
	OfflineOut      uint64 // offline announcements sent
	OfflineIn       uint64 // offline announcements received from other processes
	BytesWaiting    uint64 // bytes not sent yet; on lanes, not acknowledged yet
	Lanes           uint64 // lanes: peers with this library that streams run, or ran, to or from
}

// Stats returns the connection's statistics. All are zero once it is closed.
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

// dispatch handles the events of all services and streams. It never waits for a reader or a handler.
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
	// Close has ended all streams, with an event for each. A stream that was requested too late for that ends here.
	c.mu.Lock()
	streams := c.streams
	c.streams = nil
	c.mu.Unlock()
	for _, stream := range streams {
		stream.finish(statusError(C.PRESENCE_CLOSED, "stream"), false)
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
			text := string(view(e.data, e.data_len))
			s.finish(&Error{Status: Status(e.status), Message: text, Code: int(e.error_code)}, false)
		}
	case C.PRESENCE_EVENT_CONNECTED, C.PRESENCE_EVENT_DISCONNECTED, C.PRESENCE_EVENT_LOG:
		event := newEvent(e)
		if event.Kind == Disconnected && event.Subject == "" && event.Status == ErrClosed && !c.closing.Load() {
			c.end(&Error{Status: ErrDisconnected, Message: "the connection was given up: " + event.Text})
		}
		c.logEvent(event)
	}
}

// runLog calls the function of WithLog for each event.
func (c *Conn) runLog(log func(Event)) {
	for {
		select {
		case event := <-c.log:
			log(event)
			if n := c.dropped.Swap(0); n > 0 {
				text := fmt.Sprintf("%d events were dropped; the limit is %d waiting events", n, cap(c.log))
				log(Event{Kind: Log, Status: ErrFull, Text: text})
			}
		case <-c.drained:
			for len(c.log) > 0 {
				log(<-c.log)
			}
			return
		}
	}
}

// logEvent passes an event to the function of WithLog, if there is one. It does not block: the event may be dropped.
func (c *Conn) logEvent(event Event) {
	if c.log != nil {
		select {
		case c.log <- event:
		default:
			c.dropped.Add(1)
		}
	}
}

// signal wakes one goroutine that receives from c, or the next one to do so.
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
