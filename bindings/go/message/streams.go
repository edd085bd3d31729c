package message

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	presence "github.com/nats-presence/nats-presence/bindings/go"
	"github.com/nats-presence/nats-presence/bindings/go/message/natsgo"
)

// closeTimeout limits how long Close waits until nats-server has everything.
const closeTimeout = 5 * time.Second

// streams is the connection on which a pool requests streams. It is made in the background.
type streams struct {
	conn   *presence.Conn
	err    error         // why there is no connection, and never will be
	limit  time.Duration // of the wait for a connection
	closed atomic.Bool

	mu        sync.Mutex
	connected chan struct{} // closed when the connection is made
	lost      string        // why it was lost last, or why the last attempt has failed
}

func newStreams(url string, opts []nats.Option, limit time.Duration) *streams {
	s := &streams{limit: limit, connected: make(chan struct{})}
	own, err := natsgo.ConnectOptions(opts...)
	if err == nil {
		own = append(own, presence.RetryOnInitialConnect(), presence.WithLog(s.handleEvent))
		s.conn, err = presence.Connect(url, own...)
	}
	s.err = err
	return s
}

func (s *streams) handleEvent(event presence.Event) {
	logEvent(event)
	s.mu.Lock()
	defer s.mu.Unlock()
	switch event.Kind {
	case presence.Connected:
		select {
		case <-s.connected:
		default:
			close(s.connected)
		}
	case presence.Disconnected:
		s.lost = event.Text
	}
}

// nextConnected returns a channel that is closed when the connection is made the next time.
func (s *streams) nextConnected() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.connected:
		s.connected = make(chan struct{})
	default:
	}
	return s.connected
}

// unavailable is the error if there was no connection for too long.
func (s *streams) unavailable() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	text := unavailableText
	if s.lost != "" {
		text += ": " + s.lost
	}
	return &textError{text, presence.ErrDisconnected}
}

func (s *streams) close() {
	if s.closed.Swap(true) || s.conn == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	s.conn.Close(ctx)
}

// request requests a stream. Without a connection it waits for one: until ctx ends, for at most limit.
func (s *streams) request(
	ctx context.Context, subject string, data []byte, id string, limit time.Duration,
) (*presence.Stream, error) {
	var connected <-chan struct{}
	var expired <-chan time.Time
	for {
		// Not with ctx: whoever gets the stream decides what the end of ctx does.
		stream, err := s.conn.Request(context.Background(), subject, data, id)
		if !errors.Is(err, presence.ErrDisconnected) {
			return stream, err
		}
		if connected == nil {
			connected = s.nextConnected()
			continue // the connection may have been made just before
		}
		if expired == nil {
			expired = time.After(limit)
		}
		select {
		case <-connected:
			connected = nil
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-expired:
			return nil, s.unavailable()
		}
	}
}

// run requests a stream and gives its messages to f.
func (s *streams) run(
	ctx context.Context, subject string, data []byte, id string, limit time.Duration, f func(*nats.Msg) bool,
) error {
	if s.closed.Load() {
		return errPoolClosed
	}
	if s.err != nil {
		return s.err
	}
	if ctx.Err() != nil {
		presence.MarkClientOffline(id)
		return ctx.Err()
	}
	stream, err := s.request(ctx, subject, data, id, limit)
	if err != nil {
		if ctx.Err() != nil {
			presence.MarkClientOffline(id)
			return ctx.Err()
		}
		return s.failure(err, subject, id, f)
	}
	defer stream.Close()
	// When ctx ends, whatever f is doing, the client is marked offline, with the stream running: so the request cannot
	// bring the client back online after the mark.
	left := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(left)
		presence.MarkClientOffline(id)
		stream.Close()
	})
	defer stop()
	err = s.read(ctx, stream, subject, id, f)
	if !stop() {
		<-left
	}
	return err
}

// read gives the messages of a stream to f, until the stream ends, f returns false, or ctx ends: then f is not called
// any more.
func (s *streams) read(
	ctx context.Context, stream *presence.Stream, subject, id string, f func(*nats.Msg) bool,
) error {
	for {
		data, err := stream.Next(context.Background())
		if ctx.Err() != nil {
			return ctx.Err()
		}
		switch err {
		case nil:
			if !f(&nats.Msg{Subject: subject, Data: data}) {
				return nil
			}
		case io.EOF:
			f(&nats.Msg{Subject: subject, Data: []byte(endMarker)})
			return nil
		default:
			return s.failure(err, subject, id, f)
		}
	}
}

// failure returns the error for a stream that ended with err. An error that the worker reports is given to f first, as
// the message that it is on level 0 of the wire.
func (s *streams) failure(err error, subject, id string, f func(*nats.Msg) bool) error {
	var own *presence.Error
	if !errors.As(err, &own) {
		return err
	}
	text := own.Message
	switch own.Status {
	case presence.ErrOffline:
		text = offlineText + id
		fallthrough
	case presence.ErrRemote, presence.ErrBusy:
		f(&nats.Msg{Subject: subject, Data: []byte(errorMarker + text)})
		return &textError{streamErrorText + text, err}
	case presence.ErrClosed:
		if s.closed.Load() {
			return errPoolClosed
		}
	case presence.ErrDisconnected:
		return &textError{unavailableText + ": " + text, err}
	case presence.ErrNoResponders:
		return fmt.Errorf("%w: %w", nats.ErrNoResponders, err)
	case presence.ErrTooLarge:
		return fmt.Errorf("%w: %w", nats.ErrMaxPayload, err)
	}
	return err
}

// StreamRequest requests a stream without a client, and calls responseHandler with each of its messages, one after the
// other. The last one is the end marker "__STREAM_END__", after which StreamRequest returns nil, or an error marker
// that begins with "__STREAM_ERROR__:", after which it returns an error with the marker's text. (The errors of this
// process, such as a lost connection, have no marker.) If responseHandler returns false, the worker stops, and
// StreamRequest returns nil.
//
// When ctx ends, the worker stops at once, also while responseHandler runs, and StreamRequest returns ctx's error.
//
// The Subject of the messages is that of the request. A slow responseHandler slows its own worker down; no message is
// lost. The errors contain those of the package presence: presence.ErrBusy, presence.ErrNoResponders (and
// nats.ErrNoResponders), presence.ErrPeerGone if the worker's process was killed, and so on. Without a connection the
// request waits for one, for at most AcquireTimeout.
func (p *Pool) StreamRequest(
	ctx context.Context, subject string, requestData []byte, responseHandler func(*nats.Msg) bool,
) error {
	return p.streams.run(ctx, subject, requestData, "", p.streams.limit, responseHandler)
}

// StreamRequestWithTimeout is like [Pool.StreamRequest], with limits: requestTimeout for the wait for a connection,
// and streamTimeout for the whole call, which then returns context.DeadlineExceeded.
func (p *Pool) StreamRequestWithTimeout(
	ctx context.Context, subject string, requestData []byte, requestTimeout, streamTimeout time.Duration,
	responseHandler func(*nats.Msg) bool,
) error {
	ctx, cancel := context.WithTimeout(ctx, streamTimeout)
	defer cancel()
	return p.streams.run(ctx, subject, requestData, "", requestTimeout, responseHandler)
}

// StreamRequestWithRetry is like [Pool.StreamRequest], but after any error it waits for retryDelay and requests the
// stream again, from the start, up to maxRetries times. The end of ctx ends it at once, with ctx's error.
func (p *Pool) StreamRequestWithRetry(
	ctx context.Context, subject string, requestData []byte, maxRetries int, retryDelay time.Duration,
	responseHandler func(*nats.Msg) bool,
) error {
	for attempt := 0; ; attempt++ {
		err := p.StreamRequest(ctx, subject, requestData, responseHandler)
		if err == nil || ctx.Err() != nil || err == errPoolClosed {
			return err
		}
		if attempt >= maxRetries {
			return fmt.Errorf(retriesUsedUp, maxRetries, err)
		}
		select {
		case <-time.After(retryDelay):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// StreamRequestWithClient is like [Pool.StreamRequest], for a client: the request tells the worker its id, in the
// header Connect-ID. The client is online in this process as long as the stream runs.
//
// When ctx ends, the client is marked offline, as by [MarkClientOffline]: all its streams end, and the offline
// announcement is sent to all processes. [Pool.Close] waits until nats-server has it. If the client is marked offline
// by someone else, the error's text is "流式响应错误: 客户端已离线: " and the id, and errors.Is finds presence.ErrOffline
// in it.
func (p *Pool) StreamRequestWithClient(
	ctx context.Context, subject string, requestData []byte, connectID string, responseHandler func(*nats.Msg) bool,
) error {
	return p.streams.run(ctx, subject, requestData, connectID, p.streams.limit, responseHandler)
}
