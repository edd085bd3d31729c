package presence

import (
	"context"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
)

func newClient(t *testing.T, id string) *Client {
	t.Helper()
	c, err := NewClient(id)
	must(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// serveUntilStopped serves a subject with a handler that waits for the end of its stream, whose reason it sends.
func serveUntilStopped(t *testing.T, c *client, subject string) <-chan error {
	t.Helper()
	stopped := make(chan error, 1024)
	serve(t, c, subject, func(ctx context.Context, req *Request, s *Sender) error {
		if err := s.Send([]byte("begun")); err != nil {
			stopped <- err
			return nil
		}
		stopped <- waitForEnd(t, ctx)
		return nil
	})
	return stopped
}

// A client that has left makes no more requests, so that none brings its id back online, even if another client has the
// same id.
func TestClientThatHasLeftCannotRequest(t *testing.T) {
	s := startServer(t)
	worker, gateway, raw := connect(t, s), connect(t, s), rawClient(t, s)
	// Only the worker's connection listens to announcements: a second one could apply the same one a moment later.
	stopped := serveUntilStopped(t, worker, "client")
	for name, leave := range map[string]func(c *Client){
		"closed":    func(c *Client) { must(t, c.Close()) },
		"marked":    func(c *Client) { must(t, MarkClientOffline(c.ID())) },
		"announced": func(c *Client) { raw.publish("client.offline", "", "", c.ID()) },
	} {
		t.Run(name, func(t *testing.T) {
			c := newClient(t, "client-"+name)
			if !c.IsOnline() || c.Context().Err() != nil {
				t.Fatal("the client is not online")
			}
			checkOnline(t, c.ID(), true)
			stream, err := c.Request(t.Context(), gateway.Conn, "client", []byte("question"))
			must(t, err)
			message, err := stream.Next(t.Context())
			if string(message) != "begun" || err != nil {
				t.Fatal(string(message), err)
			}
			leave(c)
			wantError(t, waitForEnd(t, c.Context()), ErrOffline, c.ID())
			_, err = read(t, stream)
			wantError(t, err, ErrOffline, "")
			receive(t, stopped)
			other := newClient(t, c.ID()) // comes back under the same id
			if c.IsOnline() || !other.IsOnline() {
				t.Error("the wrong client is online")
			}
			_, err = c.Request(t.Context(), gateway.Conn, "client", nil)
			wantError(t, err, ErrOffline, c.ID())
			must(t, c.Close())
			must(t, c.Close())
			if other.Context().Err() != nil || !other.IsOnline() {
				t.Error("the other client has left, too")
			}
			must(t, other.Close())
			_, err = other.Request(t.Context(), gateway.Conn, "client", nil)
			wantError(t, err, ErrOffline, c.ID())
			checkOnline(t, c.ID(), false)
		})
	}
}

// A client that comes back at once is another one, whichever of the two the watch sees first.
func TestClientThatComesBackAtOnceIsAnotherOne(t *testing.T) {
	gateway := connect(t, startServer(t))
	for range 200 {
		first := newClient(t, "back at once")
		must(t, MarkClientOffline(first.ID()))
		second := newClient(t, first.ID())
		if first.IsOnline() || !second.IsOnline() {
			t.Fatal("the wrong client is online")
		}
		_, err := first.Request(t.Context(), gateway.Conn, "nobody", nil)
		wantError(t, err, ErrOffline, first.ID())
		wantError(t, waitForEnd(t, first.Context()), ErrOffline, first.ID())
		if second.Context().Err() != nil {
			t.Fatal("the second client has left, too")
		}
		must(t, first.Close())
		must(t, second.Close())
	}
}

func TestClosingAClientEndsOnlyItsOwnStreams(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	stopped := serveUntilStopped(t, worker, "tabs")
	first, second := newClient(t, "tabs"), newClient(t, "tabs")
	var streams []*Stream
	for _, c := range []*Client{first, second} {
		stream, err := c.Request(t.Context(), gateway.Conn, "tabs", nil)
		must(t, err)
		_, err = stream.Next(t.Context())
		must(t, err)
		streams = append(streams, stream)
	}
	must(t, first.Close())
	_, err := read(t, streams[0])
	wantError(t, err, ErrOffline, "tabs")
	wantError(t, receive(t, stopped), ErrCancelled, "tabs") // its stream only
	checkOnline(t, "tabs", true)
	eventually(t, "one stream is left", func() bool { return gateway.Stats().Streams == 1 })
	if second.Context().Err() != nil {
		t.Error("the second client has left, too")
	}
	must(t, second.Close())
	_, err = read(t, streams[1])
	wantError(t, err, ErrOffline, "")
	receive(t, stopped)
	checkOnline(t, "tabs", false)
}

func TestClientOfAnInvalidOrEmptyID(t *testing.T) {
	for name, id := range invalidIDs {
		c, err := NewClient(id)
		if c != nil {
			t.Error(name, " has a client")
		}
		wantError(t, err, ErrInvalid, "client id")
	}
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	stopped := serveUntilStopped(t, worker, "anonymous")
	c := newClient(t, "")
	must(t, MarkClientOffline(""))
	stream, err := c.Request(t.Context(), gateway.Conn, "anonymous", nil)
	must(t, err)
	_, err = stream.Next(t.Context())
	must(t, err)
	must(t, c.Close())
	_, err = read(t, stream)
	wantError(t, err, ErrOffline, "")
	wantError(t, receive(t, stopped), ErrCancelled, "")
}

// Requests race with marks: afterwards the id is not online, and nothing is left.
func TestRequestsThatRaceWithTheClientsEndLeaveNothing(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	serve(t, worker, "race", func(ctx context.Context, req *Request, s *Sender) error {
		waitForEnd(t, ctx)
		return nil
	})
	before := runtime.NumGoroutine()
	var all sync.WaitGroup
	for i := range 100 {
		c := newClient(t, fmt.Sprint("race-", i%10))
		all.Add(2)
		go func() {
			defer all.Done()
			for {
				if _, err := c.Request(context.Background(), gateway.Conn, "race", nil); err != nil {
					if !strings.Contains(err.Error(), "offline") && !strings.Contains(err.Error(), "full") {
						t.Error(err)
					}
					return
				}
			}
		}()
		go func() {
			defer all.Done()
			if i%2 == 0 {
				MarkClientOffline(c.ID())
			}
			c.Close()
		}()
	}
	all.Wait()
	for i := range 10 {
		id := fmt.Sprint("race-", i)
		eventually(t, id+" is not online", func() bool { return !IsClientOnline(id) })
	}
	eventually(t, "no stream is left", func() bool { return gateway.streamsLeft() == 0 && worker.sendersLeft() == 0 })
	eventually(t, "no goroutine is left", func() bool { return runtime.NumGoroutine() <= before })
}
