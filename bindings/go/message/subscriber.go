package message

import (
	"cmp"
	"context"
	"errors"
	"log"
	"maps"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	presence "github.com/nats-presence/nats-presence/bindings/go"
	"github.com/nats-presence/nats-presence/bindings/go/message/natsgo"
)

// SubscriberConfig is the configuration of a [Subscriber]. Fields that are 0 have the default of
// [DefaultSubscriberConfig].
type SubscriberConfig struct {
	MaxWorkers    int   // how many handlers of Subscribe and QueueSubscribe run at once
	PendingMsgs   int   // how many messages may wait for the handlers of a subscription; more are dropped
	PendingBytes  int64 // the same in bytes
	MaxStreamJobs int   // how many streams run at once; a request beyond that is answered with "server busy"
	ReconnectWait time.Duration
	MaxReconnects int // -1: no limit
	PingInterval  time.Duration
	MaxPingsOut   int
}

// DefaultSubscriberConfig returns the default configuration.
func DefaultSubscriberConfig() SubscriberConfig {
	return SubscriberConfig{
		MaxWorkers:    runtime.GOMAXPROCS(0) * 32,
		PendingMsgs:   65_536,
		PendingBytes:  64 << 20,
		MaxStreamJobs: runtime.GOMAXPROCS(0) * 32,
		ReconnectWait: 2 * time.Second,
		MaxReconnects: -1,
		PingInterval:  10 * time.Second,
		MaxPingsOut:   3,
	}
}

func (c SubscriberConfig) withDefaults() SubscriberConfig {
	d := DefaultSubscriberConfig()
	return SubscriberConfig{
		MaxWorkers:    positive(c.MaxWorkers, d.MaxWorkers),
		PendingMsgs:   positive(c.PendingMsgs, d.PendingMsgs),
		PendingBytes:  positive(c.PendingBytes, d.PendingBytes),
		MaxStreamJobs: positive(c.MaxStreamJobs, d.MaxStreamJobs),
		ReconnectWait: positive(c.ReconnectWait, d.ReconnectWait),
		MaxReconnects: cmp.Or(c.MaxReconnects, d.MaxReconnects),
		PingInterval:  positive(c.PingInterval, d.PingInterval),
		MaxPingsOut:   positive(c.MaxPingsOut, d.MaxPingsOut),
	}
}

// SubscriberMetrics says what a [Subscriber] has done, and what it does now. Streams are not counted as messages.
type SubscriberMetrics struct {
	ActiveSubscriptions   int64 // subscriptions, and subjects that are served
	TotalMessagesReceived int64
	MessagesProcessed     int64 // handlers that have returned
	MessagesFailed        int64 // handlers that have panicked
	MessagesDropped       int64 // dropped by SubscribeAndDrop
	ProcessingLatency     int64 // the mean time that a handler took, in nanoseconds
	QueueDepth            int64 // messages that wait for a handler; with SubscribeSync also the one that is handled
}

// Subscriber is the worker's side: a connection of nats.go for messages, and one of nats-presence for streams, which is
// made when it is first needed.
type Subscriber struct {
	Conn *nats.Conn // may be used for anything; Close closes it

	config  SubscriberConfig
	url     string
	opts    []nats.Option
	workers chan struct{} // a token for each handler that runs and counts for MaxWorkers
	tasks   tasks         // the handlers that run
	streams atomic.Int64  // the streams that run

	connecting    sync.Mutex // held while presence is made
	mu            sync.Mutex
	closed        bool
	presence      *presence.Conn
	subscriptions []*nats.Subscription
	served        map[*StreamSubscriptionHandle]struct{}

	received, processed, failed, dropped, nanoseconds atomic.Int64
}

// NewSubscriber connects to nats-server, with the default configuration. It fails if it reaches no server.
func NewSubscriber(servers []string, opts ...nats.Option) (*Subscriber, error) {
	return NewSubscriberWithConfig(servers, DefaultSubscriberConfig(), opts...)
}

// NewSubscriberWithConfig connects to nats-server. It fails if it reaches no server. Options in opts replace what the
// configuration says.
func NewSubscriberWithConfig(servers []string, config SubscriberConfig, opts ...nats.Option) (*Subscriber, error) {
	if len(servers) == 0 {
		return nil, errNoServers
	}
	config = config.withDefaults()
	url := strings.Join(servers, ",")
	opts = append([]nats.Option{
		nats.ReconnectWait(config.ReconnectWait), nats.MaxReconnects(config.MaxReconnects),
		nats.PingInterval(config.PingInterval), nats.MaxPingsOutstanding(config.MaxPingsOut),
	}, opts...)
	conn, err := nats.Connect(url, opts...)
	if err != nil {
		return nil, err
	}
	return &Subscriber{
		Conn: conn, config: config, url: url, opts: opts,
		workers: make(chan struct{}, config.MaxWorkers),
		served:  make(map[*StreamSubscriptionHandle]struct{}),
	}, nil
}

// connection returns the connection for streams, and makes it if there is none.
func (s *Subscriber) connection() (*presence.Conn, error) {
	s.connecting.Lock()
	defer s.connecting.Unlock()
	conn, isClosed := s.current()
	if isClosed {
		return nil, errSubscriberClosed
	}
	if conn != nil {
		return conn, nil
	}
	opts, err := natsgo.ConnectOptions(s.opts...)
	if err != nil {
		return nil, err
	}
	// A gateway's Pool announces the clients that go offline in this process, and each announcement must be made once
	// only: a second one could meet a client that has come back since the first.
	opts = append(opts, presence.Announce("never"), presence.WithLog(logEvent))
	conn, err = presence.Connect(s.url, opts...)
	if (errors.Is(err, presence.ErrDisconnected) || errors.Is(err, presence.ErrTimeout)) && !s.Conn.IsConnected() {
		// Like the connection of nats.go, which is lost as well, it is made in the background.
		conn, err = presence.Connect(s.url, append(opts, presence.RetryOnInitialConnect())...)
	}
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		go conn.Close(context.Background())
		return nil, errSubscriberClosed
	}
	s.presence = conn
	return conn, nil
}

func (s *Subscriber) current() (conn *presence.Conn, isClosed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.presence, s.closed
}

// Close takes no more messages and requests, and waits until the handlers have returned: as long as ctx, whose error it
// then returns. Then streams that still run are ended with an error, and the connections are closed. Calling Close
// again has no effect and returns nil.
//
// A stream whose handler has returned, and that another goroutine goes on to answer, is not waited for.
func (s *Subscriber) Close(ctx context.Context) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	own, served := s.presence, slices.Collect(maps.Keys(s.served))
	s.mu.Unlock()
	drained, cut := context.WithCancel(ctx)
	defer cut()
	var ending sync.WaitGroup
	for _, handle := range served {
		ending.Add(1)
		go func() {
			defer ending.Done()
			handle.drain(drained)
		}()
	}
	closed := s.Conn.StatusChanged(nats.CLOSED)
	if s.Conn.Drain() == nil { // what has arrived is still handled
		select {
		case <-closed:
		case <-ctx.Done():
		}
	}
	s.Conn.Close()
	err := s.tasks.wait(ctx)
	cut()
	ending.Wait()
	if own != nil {
		limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
		defer cancel()
		own.Close(limited)
	}
	return err
}

// GetMetrics returns what the subscriber has done so far.
func (s *Subscriber) GetMetrics() SubscriberMetrics {
	m := SubscriberMetrics{
		TotalMessagesReceived: s.received.Load(),
		MessagesProcessed:     s.processed.Load(),
		MessagesFailed:        s.failed.Load(),
		MessagesDropped:       s.dropped.Load(),
	}
	if handled := m.MessagesProcessed + m.MessagesFailed; handled > 0 {
		m.ProcessingLatency = s.nanoseconds.Load() / handled
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	m.ActiveSubscriptions = int64(len(s.served))
	for _, sub := range s.subscriptions {
		if sub.IsValid() {
			m.ActiveSubscriptions++
			if waiting, _, err := sub.Pending(); err == nil {
				m.QueueDepth += int64(waiting)
			}
		}
	}
	return m
}

// QueueSubscribeSync is like [Subscriber.SubscribeSync], for a queue group.
func (s *Subscriber) QueueSubscribeSync(subj, queue string, h nats.MsgHandler) error {
	return s.subscribe(subj, queue, func(m *nats.Msg) { s.handle(subj, m, h) })
}

// SubscribeSync calls h with each message, one after the other, in the order in which they arrive.
func (s *Subscriber) SubscribeSync(subj string, h nats.MsgHandler) error {
	return s.QueueSubscribeSync(subj, "", h)
}

// QueueSubscribe is like [Subscriber.Subscribe], for a queue group.
func (s *Subscriber) QueueSubscribe(subj, queue string, h nats.MsgHandler) error {
	return s.subscribe(subj, queue, func(m *nats.Msg) {
		s.workers <- struct{}{}
		s.start(subj, m, h, true)
	})
}

// Subscribe calls h with each message, in a goroutine of its own. At most MaxWorkers of them run at once; further
// messages wait.
func (s *Subscriber) Subscribe(subj string, h nats.MsgHandler) error {
	return s.QueueSubscribe(subj, "", h)
}

// QueueSubscribeGo is like [Subscriber.SubscribeGo], for a queue group.
func (s *Subscriber) QueueSubscribeGo(subj, queue string, h nats.MsgHandler) error {
	return s.subscribe(subj, queue, func(m *nats.Msg) { s.start(subj, m, h, false) })
}

// SubscribeGo is like [Subscriber.Subscribe], without the limit.
func (s *Subscriber) SubscribeGo(subj string, h nats.MsgHandler) error {
	return s.QueueSubscribeGo(subj, "", h)
}

// SubscribeAndDrop is like [Subscriber.Subscribe], but drops messages beyond MaxWorkers.
func (s *Subscriber) SubscribeAndDrop(subj string, h nats.MsgHandler) error {
	return s.subscribe(subj, "", func(m *nats.Msg) {
		select {
		case s.workers <- struct{}{}:
			s.start(subj, m, h, true)
		default:
			s.dropped.Add(1)
			s.tasks.done()
		}
	})
}

// subscribe calls deliver with each message, which counts as a task: deliver ends the task.
func (s *Subscriber) subscribe(subj, queue string, deliver nats.MsgHandler) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errSubscriberClosed
	}
	sub, err := s.Conn.QueueSubscribe(subj, queue, func(m *nats.Msg) {
		s.received.Add(1)
		s.tasks.begin()
		deliver(m)
	})
	if err != nil {
		return err
	}
	s.subscriptions = append(s.subscriptions, sub)
	return sub.SetPendingLimits(s.config.PendingMsgs, int(s.config.PendingBytes))
}

func (s *Subscriber) start(subj string, m *nats.Msg, h nats.MsgHandler, isLimited bool) {
	go func() {
		if isLimited {
			defer func() { <-s.workers }()
		}
		s.handle(subj, m, h)
	}()
}

// handle calls h. A panic of h is logged.
func (s *Subscriber) handle(subj string, m *nats.Msg, h nats.MsgHandler) {
	defer s.tasks.done()
	begun, outcome := time.Now(), &s.failed
	defer func() {
		if cause := recover(); cause != nil {
			log.Printf("message: the handler of %s panicked: %v\n%s", subj, cause, debug.Stack())
		}
		s.nanoseconds.Add(int64(time.Since(begun)))
		outcome.Add(1)
	}()
	h(m)
	outcome = &s.processed
}

// tasks counts running tasks. Unlike with a sync.WaitGroup, a task may begin while another goroutine waits.
type tasks struct {
	mu      sync.Mutex
	running int
	idle    chan struct{} // closed when nothing runs any more; nil if nobody waits
}

func (t *tasks) begin() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.running++
}

func (t *tasks) done() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.running--
	if t.running == 0 && t.idle != nil {
		close(t.idle)
		t.idle = nil
	}
}

// wait waits until nothing runs, or ctx ends, whose error it returns.
func (t *tasks) wait(ctx context.Context) error {
	t.mu.Lock()
	if t.running == 0 {
		t.mu.Unlock()
		return nil
	}
	if t.idle == nil {
		t.idle = make(chan struct{})
	}
	idle := t.idle
	t.mu.Unlock()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
