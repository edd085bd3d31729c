package presence

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestConnectRefusesInvalidInput(t *testing.T) {
	s := startServer(t, "--user", "me", "--pass", "secret")
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	closed.Close()
	for _, bad := range []struct {
		url    string
		opts   []ConnectOption
		status Status
		named  string
	}{
		{url: "", status: ErrInvalid, named: ""},
		{url: "nats://\x00", status: ErrInvalid, named: "url"},
		{url: "http://127.0.0.1:1", status: ErrInvalid, named: "http"},
		{url: "nats://127.0.0.1:port", status: ErrInvalid, named: "port"},
		{url: "nats://" + closed.Addr().String(), status: ErrDisconnected, named: closed.Addr().String()},
		{url: s.url, status: ErrDisconnected, named: ""},
		{url: s.url, opts: []ConnectOption{With("user", "me"), With("password", "wr0ng")}, status: ErrDisconnected, named: ""},
		{url: s.url, opts: []ConnectOption{With("no_such", "x")}, status: ErrInvalid, named: "no_such"},
		{url: s.url, opts: []ConnectOption{With("", "x")}, status: ErrInvalid, named: `""`},
		{url: s.url, opts: []ConnectOption{With("announce", "loudly")}, status: ErrInvalid, named: "loudly"},
		{url: s.url, opts: []ConnectOption{With("password", "wr0ng\x00")}, status: ErrInvalid, named: "password"},
		{url: s.url, opts: []ConnectOption{With("tls_required", "maybe")}, status: ErrInvalid, named: "maybe"},
		{url: s.url, opts: []ConnectOption{With("timeout_ms", "1")}, status: ErrInvalid, named: "timeout_ms"},
		{url: s.url, opts: []ConnectOption{With("creds_file", "/no/such/file")}, status: ErrInvalid, named: "/no/such/file"},
	} {
		c, err := Connect(bad.url, bad.opts...)
		if c != nil || err == nil {
			t.Fatalf("%q %v: connected", bad.url, bad.opts)
		}
		wantError(t, err, bad.status, bad.named)
		if strings.Contains(err.Error(), "wr0ng") {
			t.Errorf("%q contains the password", err)
		}
	}
	connect(t, s, With("user", "me"), With("password", "secret"))
	c, err := Connect("nats://me:secret@127.0.0.1:" + s.port + ",nats://" + closed.Addr().String())
	must(t, err)
	must(t, closeConn(c))
}

func TestSlowLogDropsEventsAndReportsHowMany(t *testing.T) {
	s := startServer(t)
	begun, goOn, events := make(chan struct{}, 1), make(chan bool), &events{changed: make(chan struct{}, 1)}
	c, err := Connect(s.url, WithLog(func(e Event) {
		signal(begun)
		<-goOn
		events.add(e)
	}))
	must(t, err)
	defer closeConn(c)
	const lost = 10
	c.logEvent(Event{Kind: Log, Text: "first"})
	receive(t, begun)
	for range cap(c.log) + lost {
		c.logEvent(Event{Kind: Log, Text: "more"})
	}
	close(goOn)
	if event := events.wait(t, Log, fmt.Sprint(lost, " events were dropped")); event.Status != ErrFull {
		t.Error(event)
	}
}

func TestCallsAfterCloseFail(t *testing.T) {
	s := startServer(t)
	c := connect(t, s)
	stream := request(t, c, "unserved", "x")
	must(t, closeConn(c.Conn))
	wantError(t, closeConn(c.Conn), ErrClosed, "connection")
	wantError(t, c.ListenOffline(), ErrClosed, "")
	_, err := c.Request(t.Context(), "x", nil, "x")
	wantError(t, err, ErrClosed, "connection")
	wantError(t, c.Serve(t.Context(), "x", "", echo), ErrClosed, "")
	if stats := c.Stats(); stats != (Stats{}) {
		t.Errorf("%+v", stats)
	}
	must(t, stream.Close())
	if _, err := stream.Next(t.Context()); err == nil || err == io.EOF {
		t.Error(err)
	}
	for range stream.Messages() {
		break
	}
}

func TestListenOfflineAppliesAnnouncements(t *testing.T) {
	s := startServer(t)
	c, other := connect(t, s), rawClient(t, s)
	must(t, c.ListenOffline())
	must(t, c.ListenOffline())
	events := watch(t)
	must(t, MarkClientOnline("listened"))
	other.publish("client.offline", "", "", "listened")
	expectEvents(t, events, "listened", ClientOnline, ClientOffline)
	if stats := c.Stats(); stats.OfflineIn != 1 {
		t.Errorf("%+v", stats)
	}
}

func TestMarksAndEndsOfSessionsAreAnnounced(t *testing.T) {
	s := startServer(t)
	c, worker := connect(t, s), rawClient(t, s)
	offline, requests := worker.subscribe("client.offline"), worker.subscribe("level0")
	must(t, MarkClientOffline("announced"))
	if message := receive(t, offline); message.data != "announced" {
		t.Error(message)
	}
	// The end of a session is announced if the worker cannot be notified on a lane.
	session, err := OpenSession("announced")
	must(t, err)
	stream := request(t, c, "level0", "announced")
	worker.publish(receive(t, requests).reply, "", "", "first")
	_, err = stream.Next(t.Context())
	must(t, err)
	must(t, session.Close())
	_, err = stream.Next(t.Context())
	wantError(t, err, ErrOffline, "")
	if message := receive(t, offline); message.data != "announced" {
		t.Error(message)
	}
}

func TestCloseEndsEachStreamOnceAtBothEnds(t *testing.T) {
	for name, closes := range map[string]struct {
		lanes              string
		worker             bool
		handlers, messages Status
	}{
		"the worker's":           {lanes: "true", worker: true, handlers: ErrClosed, messages: ErrRemote},
		"the gateway's":          {lanes: "true", worker: false, handlers: ErrCancelled, messages: ErrClosed},
		"the worker's, level 0":  {lanes: "false", worker: true, handlers: ErrClosed, messages: ErrRemote},
		"the gateway's, level 0": {lanes: "false", worker: false, handlers: ErrOffline, messages: ErrClosed},
	} {
		t.Run(name, func(t *testing.T) {
			s := startServer(t)
			worker, gateway := connect(t, s), connect(t, s, With("lanes", closes.lanes))
			const n = 50
			var handlers [n]atomic.Int32
			var begun, ended sync.WaitGroup
			serving := serve(t, worker, "flight", func(ctx context.Context, req *Request, s *Sender) error {
				s.Send([]byte("one"))
				begun.Done()
				defer ended.Done()
				if err := waitForEnd(t, ctx); !errors.Is(err, closes.handlers) {
					t.Error("handler: ", err)
				}
				handlers[req.Data[0]].Add(1)
				if err := s.Send([]byte("two")); !errors.Is(err, closes.handlers) {
					t.Error("Send: ", err)
				}
				return s.Err()
			})
			for i := range n {
				begun.Add(2)
				ended.Add(2)
				stream, err := gateway.Request(t.Context(), "flight", []byte{byte(i)}, "flyer")
				must(t, err)
				go func() {
					defer ended.Done()
					var got []any
					for message, err := range stream.Messages() {
						if got = append(got, string(message), err); len(got) == 2 {
							begun.Done()
						}
					}
					err, _ := got[len(got)-1].(error)
					if len(got) != 4 || got[0] != "one" || got[1] != nil || !errors.Is(err, closes.messages) {
						t.Errorf("stream: %q", got)
					}
				}()
			}
			begun.Wait()
			if closes.worker {
				must(t, closeConn(worker.Conn))
				wantError(t, receive(t, serving.result), ErrClosed, "connection")
			} else {
				must(t, closeConn(gateway.Conn))
			}
			ended.Wait()
			for i := range handlers {
				if handlers[i].Load() != 1 {
					t.Errorf("handler %d ended %d times", i, handlers[i].Load())
				}
			}
			eventually(t, "no stream or sender is left", func() bool { return worker.sendersLeft()+gateway.streamsLeft() == 0 })
			eventually(t, "the client is offline", func() bool { return !IsClientOnline("flyer") })
		})
	}
}

// Nothing hangs when the connection closes while many goroutines request, read and send.
func TestCloseDuringRequestsAndSends(t *testing.T) {
	s := startServer(t)
	for range 5 {
		c := connect(t, s)
		serving := serve(t, c, "all", func(ctx context.Context, req *Request, s *Sender) error {
			for s.Send([]byte("x")) == nil {
			}
			return nil
		})
		var all sync.WaitGroup
		var once sync.Once
		running := make(chan struct{})
		for range 8 {
			all.Add(1)
			go func() {
				defer all.Done()
				for {
					stream, err := c.Request(context.Background(), "all", nil, "busy")
					if err != nil {
						return
					}
					n := 0
					for range stream.Messages() {
						if n++; n == 20 {
							once.Do(func() { close(running) })
							break
						}
					}
				}
			}()
		}
		receive(t, running)
		must(t, closeConn(c.Conn))
		all.Wait()
		wantError(t, receive(t, serving.result), ErrClosed, "connection")
	}
}

func TestCloseCanBeCalledFromHandlerAndLog(t *testing.T) {
	s := startServer(t)
	var c *Conn
	closed := make(chan error, 1)
	connected := make(chan struct{})
	c, err := Connect(s.url, WithLog(func(Event) {
		<-connected
		closed <- c.Close(context.Background())
	}))
	must(t, err)
	close(connected)
	result := make(chan error, 1)
	go func() { result <- c.Serve(context.Background(), "x", "", echo) }() // emits the event Serving
	must(t, receive(t, closed))
	wantError(t, receive(t, result), ErrClosed, "connection")

	other := connect(t, s)
	serving := serve(t, other, "close.me", func(ctx context.Context, req *Request, s *Sender) error {
		closed <- closeConn(other.Conn)
		return ctx.Err()
	})
	request(t, other, "close.me", "")
	must(t, receive(t, closed))
	wantError(t, receive(t, serving.result), ErrClosed, "connection")
}

func TestCloseTimesOutWhenTheServerDoesNotAnswer(t *testing.T) {
	s := startServer(t)
	c := connect(t, s)
	s.pause(t)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	begin := time.Now()
	wantError(t, c.Close(ctx), ErrTimeout, "connection")
	if took := time.Since(begin); took > testTimeout/2 {
		t.Errorf("took %v", took)
	}
	receive(t, c.drained)
}

func TestCloseLeavesNoGoroutines(t *testing.T) {
	s := startServer(t)
	before := runtime.NumGoroutine()
	for range 10 {
		c := connect(t, s)
		ctx, stop := context.WithCancel(context.Background())
		_, err := Watch(ctx)
		must(t, err)
		serving := serve(t, c, "leak", echo)
		for range 10 {
			_, err := read(t, request(t, c, "leak", "leaker"))
			must(t, err)
		}
		stop()
		must(t, closeConn(c.Conn))
		receive(t, serving.result)
	}
	eventually(t, "all goroutines have ended", func() bool { return runtime.NumGoroutine() <= before })
	checkOnline(t, "leaker", false)
}

// Handlers that still run after Serve's context has ended have lost their streams, and do not delay Close.
func TestCloseDoesNotWaitForHandlers(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	begun, release := make(chan *Sender, 1), make(chan struct{})
	serving := serve(t, worker, "slow.end", func(ctx context.Context, req *Request, s *Sender) error {
		begun <- s
		<-release
		return s.Err()
	})
	defer close(release)
	stream := request(t, gateway, "slow.end", "ender")
	sender := receive(t, begun)
	serving.stop()
	eventually(t, "the service has ended", func() bool {
		worker.mu.Lock()
		defer worker.mu.Unlock()
		return len(worker.services) == 0
	})
	_, err := read(t, stream)
	wantError(t, err, ErrRemote, stoppedServing)
	must(t, closeConn(worker.Conn))
	wantError(t, sender.Err(), ErrCancelled, "context canceled")
}
