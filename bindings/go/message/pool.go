package message

import (
	"cmp"
	"context"
	"encoding/json"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

// Config is the configuration of a [Pool]. Fields that are 0 have the default in their comment.
type Config struct {
	Servers           []string      // URLs of nats-server, at least one
	IdlePerServer     int           // how many connections are kept for reuse, for each server: 16
	MinIdlePerServer  int           // not used: connections are made when they are needed
	MaxConnections    int           // how many connections there are at once, idle ones included: 128
	DialTimeout       time.Duration // limits one attempt to connect: 5 s
	MaxLife           time.Duration // connections that are older are not reused; 0: no limit
	BackoffMin        time.Duration // the first delay after a failed attempt, which doubles: 500 ms
	BackoffMax        time.Duration // the longest delay: 15 s
	LeakTimeout       time.Duration // a connection that was borrowed for longer may be closed to make place: 30 min
	LeakCheckInterval time.Duration // not used: leaks are looked for when MaxConnections is reached
	NATSOpts          []nats.Option // further options, such as credentials and TLS
	PingInterval      time.Duration // 10 s
	MaxPingsOut       int           // 3
	MaxReconnects     int           // -1: no limit
	ReconnectWait     time.Duration // 500 ms
	AcquireTimeout    time.Duration // limits the wait for a connection if the context has no deadline: 15 s
}

// dialRetries is how often Get tries again after all servers have failed.
const dialRetries = 3

// flushTimeout limits how long a publish waits until nats-server has the message.
const flushTimeout = 2 * time.Second

func (c Config) withDefaults() Config {
	c.IdlePerServer = positive(c.IdlePerServer, 16)
	c.MaxConnections = positive(c.MaxConnections, 128)
	c.DialTimeout = positive(c.DialTimeout, 5*time.Second)
	c.BackoffMin = positive(c.BackoffMin, 500*time.Millisecond)
	c.BackoffMax = positive(c.BackoffMax, 15*time.Second)
	c.LeakTimeout = positive(c.LeakTimeout, 30*time.Minute)
	c.PingInterval = positive(c.PingInterval, 10*time.Second)
	c.MaxPingsOut = positive(c.MaxPingsOut, 3)
	c.MaxReconnects = cmp.Or(c.MaxReconnects, -1)
	c.ReconnectWait = positive(c.ReconnectWait, 500*time.Millisecond)
	c.AcquireTimeout = positive(c.AcquireTimeout, 15*time.Second)
	return c
}

// positive returns value, or the default if value is not positive.
func positive[T cmp.Ordered](value, fallback T) T {
	var zero T
	if value > zero {
		return value
	}
	return fallback
}

// options returns the options of nats.go; those of the caller come last.
func (c Config) options(timeout time.Duration) []nats.Option {
	return append([]nats.Option{
		nats.Timeout(timeout), nats.PingInterval(c.PingInterval), nats.MaxPingsOutstanding(c.MaxPingsOut),
		nats.MaxReconnects(c.MaxReconnects), nats.ReconnectWait(c.ReconnectWait),
	}, c.NATSOpts...)
}

// PoolMetrics says what a [Pool] has done, and which connections of nats.go it has now.
type PoolMetrics struct {
	TotalConnections    int64
	IdleConnections     int64
	BorrowedConnections int64
	FailedDials         int64 // attempts that reached none of the servers
	SuccessfulDials     int64
	ConnectionLeaks     int64 // borrowed connections that were closed because of LeakTimeout
	RetryAttempts       int64
}

// Pool is the gateway's side: connections of nats.go for messages and requests, and one connection of nats-presence for
// streams.
type Pool struct {
	cfg     Config
	streams *streams
	// A token for each connection that is borrowed, or is being made. An idle connection has none: whoever gets a token
	// takes an idle connection first, so there are never more than MaxConnections.
	slots chan struct{}

	mu       sync.Mutex
	closed   bool
	idle     []*pooled
	borrowed map[*nats.Conn]*pooled
	counts   PoolMetrics // the last four fields
}

// pooled is a connection of nats.go.
type pooled struct {
	conn  *nats.Conn
	made  time.Time
	taken time.Time
}

// New makes a pool. It succeeds without a server: connections are made when they are needed, and the one for streams in
// the background. It fails if Servers is empty.
//
// Use one pool for each process: each announces the clients that [MarkClientOffline] marks.
func New(cfg Config) (*Pool, error) {
	if len(cfg.Servers) == 0 {
		return nil, errNoServers
	}
	cfg.Servers = slices.Clone(cfg.Servers)
	cfg = cfg.withDefaults()
	p := &Pool{
		cfg:      cfg,
		slots:    make(chan struct{}, cfg.MaxConnections),
		borrowed: make(map[*nats.Conn]*pooled),
	}
	p.streams = newStreams(strings.Join(cfg.Servers, ","), cfg.options(cfg.DialTimeout), cfg.AcquireTimeout)
	return p, nil
}

// Close closes all connections, borrowed ones included. Streams that run end. It waits until nats-server has what was
// sent, for at most five seconds. Calling Close again has no effect.
func (p *Pool) Close() {
	p.mu.Lock()
	idle, borrowed := p.idle, p.borrowed
	p.closed, p.idle, p.borrowed = true, nil, nil
	p.mu.Unlock()
	for _, c := range idle {
		c.conn.Close()
	}
	for conn := range borrowed {
		conn.Close()
		<-p.slots
	}
	p.streams.close()
}

// GetMetrics returns what the pool has done so far.
func (p *Pool) GetMetrics() PoolMetrics {
	p.mu.Lock()
	defer p.mu.Unlock()
	m := p.counts
	m.IdleConnections, m.BorrowedConnections = int64(len(p.idle)), int64(len(p.borrowed))
	m.TotalConnections = m.IdleConnections + m.BorrowedConnections
	return m
}

// Get borrows a connection, which the caller returns with [Pool.Put]. It waits until there is one: until ctx ends or,
// if ctx has no deadline, for AcquireTimeout. After all servers have failed it tries three times more.
func (p *Pool) Get(ctx context.Context) (*nats.Conn, error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, p.cfg.AcquireTimeout)
		defer cancel()
	}
	backoff := p.cfg.BackoffMin
	for attempt := 0; ; attempt++ {
		conn, err := p.borrow(ctx)
		if err == nil || ctx.Err() != nil || attempt == dialRetries || err == errPoolClosed {
			return conn, err
		}
		select {
		case <-time.After(backoff):
		case <-ctx.Done():
			return nil, err
		}
		backoff = min(2*backoff, p.cfg.BackoffMax)
		p.mu.Lock()
		p.counts.RetryAttempts++
		p.mu.Unlock()
	}
}

// borrow takes an idle connection, or makes one.
func (p *Pool) borrow(ctx context.Context) (*nats.Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	select {
	case p.slots <- struct{}{}:
	default:
		p.closeLeaks()
		select {
		case p.slots <- struct{}{}:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if conn, err := p.take(); conn != nil || err != nil {
		return conn, err
	}
	return p.dial(ctx)
}

// take returns an idle connection that can be used, or nil if there is none. If it fails, it frees the slot.
func (p *Pool) take() (*nats.Conn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		<-p.slots
		return nil, errPoolClosed
	}
	for len(p.idle) > 0 {
		last := len(p.idle) - 1
		c := p.idle[last]
		p.idle = p.idle[:last]
		if p.isUsable(c) {
			c.taken = time.Now()
			p.borrowed[c.conn] = c
			return c.conn, nil
		}
		c.conn.Close()
	}
	return nil, nil
}

func (p *Pool) isUsable(c *pooled) bool {
	return c.conn.IsConnected() && (p.cfg.MaxLife <= 0 || time.Since(c.made) < p.cfg.MaxLife)
}

// dial makes a connection. If it fails, it frees the slot.
func (p *Pool) dial(ctx context.Context) (*nats.Conn, error) {
	timeout := p.cfg.DialTimeout
	if deadline, ok := ctx.Deadline(); ok {
		timeout = max(min(timeout, time.Until(deadline)), time.Millisecond)
	}
	type result struct {
		conn *nats.Conn
		err  error
	}
	dialled := make(chan result)
	go func() {
		conn, err := nats.Connect(strings.Join(p.cfg.Servers, ","), p.cfg.options(timeout)...)
		err = p.add(conn, err)
		select {
		case dialled <- result{conn, err}:
		case <-ctx.Done(): // the caller has left
			if err == nil {
				p.Put(conn)
			}
		}
	}()
	select {
	case r := <-dialled:
		return r.conn, r.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// add adds the result of an attempt to connect. A new connection counts as borrowed.
func (p *Pool) add(conn *nats.Conn, err error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case err != nil:
		p.counts.FailedDials++
		<-p.slots
	case p.closed:
		conn.Close()
		<-p.slots
		err = errPoolClosed
	default:
		p.counts.SuccessfulDials++
		p.borrowed[conn] = &pooled{conn: conn, made: time.Now(), taken: time.Now()}
	}
	return err
}

// closeLeaks closes connections that were borrowed for longer than LeakTimeout.
func (p *Pool) closeLeaks() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for conn, c := range p.borrowed {
		if time.Since(c.taken) > p.cfg.LeakTimeout {
			delete(p.borrowed, conn)
			p.counts.ConnectionLeaks++
			conn.Close()
			<-p.slots
		}
	}
}

// Put returns a connection that [Pool.Get] has lent. A connection that was closed or is lost, or of which there are
// enough, is not kept. Putting nil, a connection of another origin or the same one twice has no effect.
func (p *Pool) Put(c *nats.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	own := p.borrowed[c]
	if own == nil {
		return
	}
	delete(p.borrowed, c)
	if p.isUsable(own) && len(p.idle) < p.cfg.IdlePerServer*len(p.cfg.Servers) {
		p.idle = append(p.idle, own)
	} else {
		c.Close()
	}
	<-p.slots
}

// PublishMsg publishes a message. It returns when nats-server has it.
func (p *Pool) PublishMsg(ctx context.Context, msg *nats.Msg) error {
	conn, err := p.Get(ctx)
	if err != nil {
		return err
	}
	defer p.Put(conn)
	if err := conn.PublishMsg(msg); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, flushTimeout)
	defer cancel()
	return conn.FlushWithContext(ctx)
}

// Publish publishes data. It returns when nats-server has it.
func (p *Pool) Publish(ctx context.Context, subj string, data []byte) error {
	return p.PublishMsg(ctx, &nats.Msg{Subject: subj, Data: data})
}

// PublishAny publishes v as JSON.
func (p *Pool) PublishAny(ctx context.Context, subj string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return p.Publish(ctx, subj, data)
}

// RequestMsg sends a request and returns the first response.
func (p *Pool) RequestMsg(ctx context.Context, msg *nats.Msg) (*nats.Msg, error) {
	conn, err := p.Get(ctx)
	if err != nil {
		return nil, err
	}
	defer p.Put(conn)
	return conn.RequestMsgWithContext(ctx, msg)
}

// Request sends data as a request and returns the first response.
func (p *Pool) Request(ctx context.Context, subj string, data []byte) (*nats.Msg, error) {
	return p.RequestMsg(ctx, &nats.Msg{Subject: subj, Data: data})
}

// RequestAny sends v as JSON as a request and returns the first response.
func (p *Pool) RequestAny(ctx context.Context, subj string, v any) (*nats.Msg, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return p.Request(ctx, subj, data)
}
