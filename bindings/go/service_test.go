package presence

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"
)

// listen starts a service that ends with the test.
func listen(t *testing.T, c *client, subject string, opts ...ServeOption) *Service {
	t.Helper()
	v, err := c.Listen(t.Context(), subject, "workers", opts...)
	must(t, err)
	t.Cleanup(func() { v.Close() })
	return v
}

// serveIn calls Serve in a goroutine and returns its result.
func serveIn(v *Service, handler Handler) <-chan error {
	result := make(chan error, 1)
	go func() { result <- v.Serve(handler) }()
	return result
}

func TestListenReturnsWhenRequestsArrive(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	v := listen(t, worker, "listen")
	// Sent before Serve is called: the requests wait for it.
	early := []*Stream{request(t, gateway, "listen", "one"), request(t, gateway, "listen", "two")}
	eventually(t, "the requests have arrived", func() bool { return worker.Stats().Requests == 2 })
	result := serveIn(v, echo)
	for _, stream := range append(early, request(t, gateway, "listen", "three")) {
		if got, err := read(t, stream); len(got) != 3 || err != nil {
			t.Error(got, err)
		}
	}
	worker.events.wait(t, Serving, "listen")
	must(t, v.Close())
	must(t, receive(t, result))
}

func TestRequestThatIsCancelledBeforeServeGetsNoHandler(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	v := listen(t, worker, "early", MaxStreams(1))
	request(t, gateway, "early", "left").Close()
	eventually(t, "the request has ended", func() bool {
		return worker.Stats().Requests == 1 && worker.sendersLeft() == 0 && v.handlers.Load() == 0
	})
	result := serveIn(v, func(ctx context.Context, req *Request, s *Sender) error {
		return s.Send([]byte(req.ClientID))
	})
	stream := request(t, gateway, "early", "stays", Retries(1000), RetryDelay(time.Millisecond))
	if got, err := read(t, stream); fmt.Sprint(got) != "[stays]" || err != nil {
		t.Error(got, err)
	}
	must(t, v.Close())
	must(t, receive(t, result))
}

func TestDrainOfAServiceLetsStreamsFinish(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	v := listen(t, worker, "drain")
	goOn, detached := make(chan struct{}), make(chan *Sender, 1)
	result := serveIn(v, drainedHandler(t, goOn, detached))
	streams := []*Stream{request(t, gateway, "drain", "handled"), request(t, gateway, "drain", "detached")}
	for _, stream := range streams {
		_, err := stream.Next(t.Context())
		must(t, err)
	}
	drains := make(chan error, 2)
	for range cap(drains) {
		go func() { drains <- v.Drain(t.Context()) }()
	}
	eventually(t, "no worker serves the subject", func() bool {
		_, err := read(t, request(t, gateway, "drain", "late", Timeout(100*time.Millisecond)))
		return errors.Is(err, ErrNoResponders)
	})
	close(goOn)
	if got, err := read(t, streams[0]); err != nil || fmt.Sprint(got) != "[last]" {
		t.Error(got, err)
	}
	sender := receive(t, detached)
	must(t, sender.Send([]byte("last")))
	if len(drains) != 0 || len(result) != 0 {
		t.Error("Drain or Serve returned before the detached stream ended")
	}
	must(t, sender.End())
	if got, err := read(t, streams[1]); err != nil || fmt.Sprint(got) != "[last]" {
		t.Error(got, err)
	}
	for range cap(drains) {
		must(t, receive(t, drains))
	}
	must(t, receive(t, result))
	must(t, v.Drain(t.Context()))
}

// What still runs when Drain's context ends, or when the service or the connection is closed, is cut.
func TestDrainOfAServiceCutsTheRest(t *testing.T) {
	s := startServer(t)
	for name, end := range map[string]struct {
		timeout time.Duration
		end     func(*client, *Service)
		status  Status
		serve   error // what Serve returns
	}{
		"deadline":         {50 * time.Millisecond, func(*client, *Service) {}, ErrCancelled, nil},
		"Close":            {testTimeout, func(_ *client, v *Service) { v.Close() }, ErrClosed, nil},
		"connection close": {testTimeout, func(c *client, _ *Service) { closeConn(c.Conn) }, ErrClosed, nil},
	} {
		t.Run(name, func(t *testing.T) {
			worker, gateway := connect(t, s), connect(t, s)
			v := listen(t, worker, "drain")
			result := serveIn(v, func(ctx context.Context, req *Request, s *Sender) error {
				must(t, s.Send([]byte("first")))
				return waitForEnd(t, ctx)
			})
			stream := request(t, gateway, "drain", "cut")
			_, err := stream.Next(t.Context())
			must(t, err)
			ctx, cancel := context.WithTimeout(t.Context(), end.timeout)
			defer cancel()
			drain := make(chan error, 1)
			go func() { drain <- v.Drain(ctx) }()
			eventually(t, "it drains", v.isEnding)
			end.end(worker, v)
			err = receive(t, drain)
			wantError(t, err, end.status, "")
			if errors.Is(err, context.DeadlineExceeded) != (name == "deadline") {
				t.Error(err)
			}
			_, err = read(t, stream)
			wantError(t, err, ErrRemote, "")
			if err := receive(t, result); err != end.serve {
				t.Error(err)
			}
		})
	}
}

func TestCloseOfAServiceCutsStreams(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	v := listen(t, worker, "close")
	goOn := make(chan struct{})
	result := serveIn(v, func(ctx context.Context, req *Request, s *Sender) error {
		must(t, s.Send([]byte("first")))
		wantError(t, waitForEnd(t, ctx), ErrClosed, "close")
		receive(t, goOn)
		wantError(t, s.Send(nil), ErrCancelled, "")
		return nil
	})
	stream := request(t, gateway, "close", "cut")
	_, err := stream.Next(t.Context())
	must(t, err)
	must(t, v.Close())
	_, err = read(t, stream)
	wantError(t, err, ErrRemote, stoppedServing)
	if len(result) != 0 {
		t.Error("Serve returned before its handler")
	}
	close(goOn)
	must(t, receive(t, result))
	_, err = read(t, request(t, gateway, "close", "late"))
	wantError(t, err, ErrNoResponders, "")

	// After the end.
	must(t, v.Close())
	wantError(t, v.Serve(echo), ErrClosed, "close")
	wantError(t, v.Drain(t.Context()), ErrClosed, "close")
	eventually(t, "all senders are freed", func() bool { return worker.sendersLeft() == 0 })
}

func TestServiceThatIsNeverServed(t *testing.T) {
	s := startServer(t)
	gateway := connect(t, s)
	for name, end := range map[string]func(c *client, v *Service, cancel func()){
		"Close":            func(_ *client, v *Service, _ func()) { must(t, v.Close()) },
		"Drain":            func(_ *client, v *Service, _ func()) { wantError(t, v.Drain(t.Context()), ErrClosed, "") },
		"context":          func(_ *client, _ *Service, cancel func()) { cancel() },
		"connection close": func(c *client, _ *Service, _ func()) { must(t, closeConn(c.Conn)) },
	} {
		t.Run(name, func(t *testing.T) {
			worker := connect(t, s)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			v, err := worker.Listen(ctx, "unserved", "", Detached())
			must(t, err)
			stream := request(t, gateway, "unserved", "waiting")
			eventually(t, "the request waits", func() bool { return v.handlers.Load() == 1 })
			end(worker, v, cancel)
			_, err = read(t, stream)
			wantError(t, err, ErrRemote, "")
			receive(t, v.done)
			if worker.sendersLeft() != 0 || v.handlers.Load() != 0 {
				t.Error(worker.sendersLeft(), v.handlers.Load())
			}
		})
	}
}

func TestServeOfAServiceTwiceFails(t *testing.T) {
	v := listen(t, connect(t, startServer(t)), "twice")
	wantError(t, v.Serve(nil), ErrInvalid, "handler")
	result := serveIn(v, echo)
	receive(t, v.begun)
	wantError(t, v.Serve(echo), ErrBusy, "twice")
	must(t, v.Close())
	must(t, receive(t, result))
}

func TestServiceEndsWithTheContextOfListen(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	type key struct{}
	for _, drain := range []time.Duration{0, 50 * time.Millisecond} {
		ctx, cancel := context.WithCancel(context.WithValue(t.Context(), key{}, "value"))
		v, err := worker.Listen(ctx, "context", "", DrainTimeout(drain))
		must(t, err)
		result := serveIn(v, func(ctx context.Context, req *Request, s *Sender) error {
			if ctx.Value(key{}) != "value" {
				t.Error("the handler's context lacks the values of Listen's")
			}
			must(t, s.Send([]byte("first")))
			return waitForEnd(t, ctx)
		})
		stream := request(t, gateway, "context", "cut")
		_, err = stream.Next(t.Context())
		must(t, err)
		begin := time.Now()
		cancel()
		_, err = read(t, stream)
		wantError(t, err, ErrRemote, stoppedServing)
		must(t, receive(t, result))
		if took := time.Since(begin); took < drain {
			t.Error("drained for ", took)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	v, err := worker.Listen(ctx, "context", "")
	if wantError(t, err, ErrCancelled, "context canceled"); v != nil {
		t.Error("listens with a context that has ended")
	}
}

func TestListenStopsWaitingWhenItsContextEnds(t *testing.T) {
	c := connect(t, &server{url: unresponsiveServer(t, "vain")}, ConnectTimeout(300*time.Millisecond))
	t.Cleanup(func() {
		ctx, stop := context.WithCancel(t.Context())
		stop()
		c.Close(ctx) // without waiting for the server
	})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	v, err := c.Listen(ctx, "vain", "")
	if wantError(t, err, ErrCancelled, "deadline"); v != nil {
		t.Error("a service in spite of the error")
	}
	eventually(t, "the request that arrived meanwhile is refused", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(c.services) == 0 && len(c.senders) == 0
	})
	v, err = c.Listen(t.Context(), "vain", "")
	if wantError(t, err, ErrTimeout, ""); v != nil {
		t.Error("a service in spite of the error")
	}
}

func TestListenRefusesInvalidInput(t *testing.T) {
	s := startServer(t)
	c := connect(t, s)
	for _, bad := range []struct {
		subject, queue string
		opts           []ServeOption
		named          string
	}{
		{subject: "", named: "subject"},
		{subject: "a b", named: `"a b"`},
		{subject: "a\x00b", named: "subject"},
		{subject: "a", queue: "b c", named: `"b c"`},
		{subject: "a", queue: "b\x00", named: "queue"},
		{subject: "a", opts: []ServeOption{MaxStreams(-1)}, named: `"-1"`},
		{subject: "a", opts: []ServeOption{With("timeout_ms", "1")}, named: `"timeout_ms"`},
	} {
		v, err := c.Listen(t.Context(), bad.subject, bad.queue, bad.opts...)
		if v != nil || err == nil {
			t.Fatalf("%+v is served", bad)
		}
		wantError(t, err, ErrInvalid, bad.named)
	}
	must(t, closeConn(c.Conn))
	_, err := c.Listen(t.Context(), "a", "")
	wantError(t, err, ErrClosed, "")
}
