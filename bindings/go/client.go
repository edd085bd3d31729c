package presence

// #include <nats_presence.h>
import "C"

import (
	"context"
	"fmt"
	"sync"
)

// Client is one connection of a client to this process, such as one of two tabs of a browser: a [Session] with a
// context, and with the streams that are requested through it. Close it when the connection ends.
type Client struct {
	id      string
	session *Session
	ctx     context.Context // ends with the client; its cause is ErrOffline
	end     context.CancelCauseFunc
}

// NewClient makes a client, which is online in this process until [Client.Close], or until it is marked offline here or
// announced offline by another process. It fails only for an invalid id, with ErrInvalid. The empty id stands for no
// client, which is always online.
//
// While a process has clients, one thread of the operating system watches for offline marks.
func NewClient(id string) (*Client, error) {
	c := &Client{id: id}
	c.ctx, c.end = context.WithCancelCause(context.Background())
	if err := clients.add(c); err != nil {
		return nil, err
	}
	return c, nil
}

// ID returns the client's id.
func (c *Client) ID() string { return c.id }

// Context returns a context that ends when the client is closed, and soon after it was marked offline. Its cause is
// then ErrOffline.
func (c *Client) Context() context.Context { return c.ctx }

// IsOnline reports whether the client was neither closed nor marked offline. It remains offline even if another client
// with the same id comes online.
func (c *Client) IsOnline() bool { return c.ctx.Err() == nil && c.session.isOpen() }

// Request is like [Conn.Request], for this client: it fails with ErrOffline once the client was closed or marked
// offline, so that a late request cannot bring the client back online. The stream ends with ErrOffline when the client
// is closed or marked offline.
func (c *Client) Request(
	ctx context.Context, conn *Conn, subject string, data []byte, opts ...RequestOption,
) (*Stream, error) {
	if !c.IsOnline() {
		return nil, c.offline()
	}
	s, err := conn.Request(ctx, subject, data, c.id, append(opts[:len(opts):len(opts)], OnlyOnline())...)
	if err != nil {
		return nil, err
	}
	// If the session is open now, it was open when the request was made: it does not open again.
	if !c.IsOnline() {
		s.Close()
		return nil, c.offline()
	}
	s.endWith(c.ctx)
	return s, nil
}

// Close ends the client: its context, its session, and the streams that were requested through it. If it was the
// client's last connection to this process, all streams that this process requested for the client end, as
// [Session.Close] describes. Calling Close again has no effect. It always returns nil.
func (c *Client) Close() error {
	c.session.Close()
	c.end(c.offline())
	clients.remove(c)
	return nil
}

func (c *Client) offline() error {
	text := fmt.Sprintf("client %q is offline: it was closed or marked offline", c.id)
	return &Error{Status: ErrOffline, Message: text}
}

// endWith ends the stream when the context of its client ends.
func (s *Stream) endWith(client context.Context) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return
	}
	detach, leave := s.detach, context.AfterFunc(client, func() { s.finish(context.Cause(client), true) })
	s.detach = func() bool {
		leave()
		return detach()
	}
}

// clients are the open clients of this process. While there are any, a watch ends the contexts of those that are marked
// offline.
var clients clientTable

type clientTable struct {
	mu   sync.Mutex
	open map[string]map[*Client]struct{}
	stop context.CancelFunc // ends the watch
}

// add opens a client's session.
func (t *clientTable) add(c *Client) (err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.open) == 0 {
		ctx, stop := context.WithCancel(context.Background())
		events, err := Watch(ctx)
		if err != nil {
			stop()
			return err
		}
		t.open, t.stop = make(map[string]map[*Client]struct{}), stop
		go t.watch(events)
	}
	if c.session, err = OpenSession(c.id); err == nil {
		if t.open[c.id] == nil {
			t.open[c.id] = make(map[*Client]struct{})
		}
		t.open[c.id][c] = struct{}{}
	}
	t.stopIfUnused()
	return err
}

func (t *clientTable) remove(c *Client) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.open[c.id], c)
	if len(t.open[c.id]) == 0 {
		delete(t.open, c.id)
	}
	t.stopIfUnused()
}

func (t *clientTable) stopIfUnused() {
	if len(t.open) == 0 && t.stop != nil {
		t.stop()
		t.stop = nil
	}
}

func (t *clientTable) watch(events <-chan Event) {
	for event := range events {
		switch event.Kind {
		case ClientOffline:
			t.endOffline(event.ClientID)
		case Log: // events were dropped
			t.endOffline("")
		}
	}
}

// endOffline ends the clients with this id, or with any id if it is empty, whose session is over. Others with the same
// id may have come online since.
func (t *clientTable) endOffline(id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for other, clients := range t.open {
		if id != "" && id != other {
			continue
		}
		for c := range clients {
			if !c.session.isOpen() {
				c.end(c.offline())
			}
		}
	}
}
