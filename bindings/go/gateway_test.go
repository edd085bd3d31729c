package presence

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// echo sends the request's data three times.
func echo(ctx context.Context, req *Request, s *Sender) error {
	for range 3 {
		if err := s.Send(req.Data); err != nil {
			return err
		}
	}
	return nil
}

func TestGatewayOnTheWire(t *testing.T) {
	s := startServer(t)
	gateway, worker := connect(t, s), rawClient(t, s)
	requests := worker.subscribe("wire")
	stream := request(t, gateway, "wire", "wire-gateway", With("header.X-Model", "gpt"))
	req := receive(t, requests)
	for _, header := range []string{"NATS/1.0\r\n", "\r\nConnect-ID: wire-gateway\r\n", "\r\nX-Model: gpt\r\n"} {
		if !strings.Contains(req.header, header) {
			t.Errorf("header %q, want %q in it", req.header, header)
		}
	}
	if req.data != "question" {
		t.Errorf("data %q", req.data)
	}
	checkOnline(t, "wire-gateway", true)
	for _, answer := range []string{"one", "", "__STREAM_", "__STREAM_END__"} {
		worker.publish(req.reply, "", "", answer)
	}
	got, err := read(t, stream)
	if fmt.Sprintf("%q", got) != `["one" "" "__STREAM_"]` || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
	checkOnline(t, "wire-gateway", false)

	stream = request(t, gateway, "wire", "")
	req = receive(t, requests)
	if strings.Contains(req.header, "Connect-ID") {
		t.Errorf("the header of a stream without client is %q", req.header)
	}
	worker.publish(req.reply, "", "", "__STREAM_ERROR__:no such model")
	got, err = read(t, stream)
	var own *Error
	if len(got) != 0 || !errors.Is(err, ErrRemote) || !errors.As(err, &own) || own.Message != "no such model" {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestStreamsDeliverAllMessages(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	serve(t, worker, "echo", echo)
	var messages []string
	for message, err := range request(t, gateway, "echo", "reader").Messages() {
		must(t, err)
		messages = append(messages, string(message))
	}
	if fmt.Sprint(messages) != "[question question question]" {
		t.Error(messages)
	}
	// Many streams at once on one connection.
	var all sync.WaitGroup
	for i := range 200 {
		all.Add(1)
		go func() {
			defer all.Done()
			data := strconv.Itoa(i)
			stream, err := gateway.Request(t.Context(), "echo", []byte(data), "many-"+data)
			if err != nil {
				t.Error(err)
				return
			}
			if got, err := read(t, stream); fmt.Sprint(got) != fmt.Sprint([]string{data, data, data}) || err != nil {
				t.Error(i, got, err)
			}
			if _, err := stream.Next(t.Context()); err != io.EOF {
				t.Error("after the end: ", err)
			}
		}()
	}
	all.Wait()
	eventually(t, "the connection has no stream left", func() bool { return gateway.streamsLeft() == 0 })
}

// Error texts and header values are empty while stacks move and memory is collected.
func TestEmptyErrorsDuringGarbageCollection(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(1))
	s := startServer(t)
	worker := connect(t, s)
	serve(t, worker, "empty", func(ctx context.Context, req *Request, s *Sender) error {
		if req.Header("X-Empty") != "" || len(req.Data) != 0 {
			t.Error("the header or the data is not empty")
		}
		return s.SendError(errors.New(""))
	})
	junk := make([][]byte, 100)
	for n, end := 0, time.Now().Add(time.Second); time.Now().Before(end); {
		gateway := connect(t, s)
		for range 200 {
			stream, err := gateway.Request(t.Context(), "empty", nil, "", With("header.X-Empty", ""))
			must(t, err)
			if got, err := read(t, stream); len(got) != 0 || !errors.Is(err, ErrRemote) {
				t.Fatal(got, err)
			}
			n++
			junk[n%len(junk)] = make([]byte, 4096)
		}
		must(t, closeConn(gateway.Conn))
	}
}

type frame struct {
	next *frame
	text [64]byte
}

var onHeap *frame

// The request's data lies in a struct with pointers, which cgo must not check.
func TestRequestDataMayLieBesidePointers(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	serve(t, worker, "echo", echo)
	onHeap = &frame{next: new(frame)}
	copy(onHeap.text[:], "question")
	stream, err := gateway.Request(t.Context(), "echo", onHeap.text[:8], "framed")
	must(t, err)
	if got, err := read(t, stream); len(got) != 3 || got[0] != "question" || err != nil {
		t.Error(got, err)
	}
}

func TestStreamEndsWithTheReason(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	left := make(chan error, 1)
	serve(t, worker, "error", func(ctx context.Context, req *Request, s *Sender) error {
		must(t, s.Send([]byte("one")))
		if req.ClientID == "failing" {
			return s.SendError(errors.New("no such model"))
		}
		left <- waitForEnd(t, ctx)
		return nil
	})

	var got []string
	for message, err := range request(t, gateway, "error", "failing").Messages() {
		got = append(got, fmt.Sprintf("%s/%v", message, err))
	}
	if fmt.Sprint(got) != "[one/<nil> /presence: no such model]" {
		t.Errorf("%q", got)
	}

	_, err := read(t, request(t, gateway, "unserved", "x"))
	wantError(t, err, ErrNoResponders, "unserved")

	for from, why := range map[*client]Status{gateway: ErrCancelled, connect(t, s, With("lanes", "false")): ErrOffline} {
		got, err = read(t, request(t, from, "error", "waiting", With("timeout_ms", "50")))
		wantError(t, err, ErrTimeout, "")
		if err := receive(t, left); len(got) > 1 || !errors.Is(err, why) {
			t.Error(got, err)
		}
	}

	stream := request(t, gateway, "error", "marked")
	stream.Next(t.Context())
	must(t, MarkClientOffline("marked"))
	_, err = read(t, stream)
	wantError(t, err, ErrOffline, "offline")
	if !errors.Is(receive(t, left), ErrOffline) {
		t.Error("the worker was not notified")
	}

}

// The worker stops without garbage collection.
func TestWorkerStopsHoweverTheReaderLeaves(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	s := startServer(t)
	cause := errors.New("the browser is gone")
	type reader struct {
		t      *testing.T
		stream *Stream
		ctx    context.Context // of the request
		cancel context.CancelCauseFunc
	}
	inGoroutine := func(f func()) {
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			f()
		}()
		<-ended
	}
	for name, leave := range map[string]func(r reader){
		"Next, cancelled while it waits": func(r reader) {
			ctx, cancel := context.WithCancelCause(r.t.Context())
			r.stream.Next(ctx) // the first message
			time.AfterFunc(10*time.Millisecond, func() { cancel(cause) })
			_, err := r.stream.Next(ctx)
			wantError(r.t, err, ErrCancelled, cause.Error())
			if !errors.Is(err, cause) {
				r.t.Error(err)
			}
		},
		"Next, cancelled before, while messages wait": func(r reader) {
			eventually(r.t, "a message waits", func() bool { return r.stream.unreadBytes() > 0 })
			ctx, cancel := context.WithCancelCause(r.t.Context())
			cancel(cause)
			message, err := r.stream.Next(ctx)
			wantError(r.t, err, ErrCancelled, cause.Error())
			if message != nil {
				r.t.Errorf("read %q after the context had ended", message)
			}
		},
		"Next, its deadline passes": func(r reader) {
			ctx, cancel := context.WithTimeout(r.t.Context(), 10*time.Millisecond)
			defer cancel()
			r.stream.NextTimeout(time.Minute) // the first message
			_, err := r.stream.Next(ctx)
			wantError(r.t, err, ErrCancelled, "deadline")
			if !errors.Is(err, context.DeadlineExceeded) {
				r.t.Error(err)
			}
		},
		"the request's context, in Next": func(r reader) {
			time.AfterFunc(10*time.Millisecond, func() { r.cancel(cause) })
			for {
				if _, err := r.stream.Next(r.t.Context()); err != nil {
					wantError(r.t, err, ErrCancelled, cause.Error())
					break
				}
			}
		},
		"the request's context, in NextTimeout": func(r reader) {
			time.AfterFunc(10*time.Millisecond, func() { r.cancel(cause) })
			for {
				if _, err := r.stream.NextTimeout(time.Minute); err != nil {
					wantError(r.t, err, ErrCancelled, cause.Error())
					break
				}
			}
		},
		"the request's context, without a reader": func(r reader) { r.cancel(cause) },
		"the request's context, in range": func(r reader) {
			var last error
			for _, err := range r.stream.Messages() {
				last = err
				r.cancel(cause)
			}
			wantError(r.t, last, ErrCancelled, cause.Error())
		},
		"break": func(r reader) {
			for range r.stream.Messages() {
				break
			}
		},
		"a panic in the loop": func(r reader) {
			defer func() { _ = recover() }()
			for range r.stream.Messages() {
				panic("oh")
			}
		},
		"Goexit in the loop": func(r reader) {
			inGoroutine(func() {
				for range r.stream.Messages() {
					runtime.Goexit()
				}
			})
		},
		"iter.Pull2": func(r reader) {
			next, stop := iter.Pull2(r.stream.Messages())
			next()
			stop()
		},
		"Close": func(r reader) { r.stream.Close() },
	} {
		for _, lanes := range []string{"true", "false"} {
			t.Run(name+", lanes "+lanes, func(t *testing.T) {
				worker, gateway := connect(t, s), connect(t, s, With("lanes", lanes))
				left := make(chan error, 1)
				serve(t, worker, "leave", func(ctx context.Context, req *Request, s *Sender) error {
					must(t, s.Send([]byte("first")))
					left <- waitForEnd(t, ctx)
					return nil
				})
				ctx, cancel := context.WithCancelCause(t.Context())
				defer cancel(nil)
				stream, err := gateway.Request(ctx, "leave", nil, "leaver "+t.Name())
				must(t, err)
				eventually(t, "the stream runs", func() bool { return stream.unreadBytes() > 0 })
				leave(reader{t, stream, ctx, cancel})
				if err := receive(t, left); !errors.Is(err, map[string]Status{"true": ErrCancelled, "false": ErrOffline}[lanes]) {
					t.Error(err)
				}
				// The stream stays cancelled.
				if _, err := stream.Next(t.Context()); !errors.Is(err, ErrCancelled) {
					t.Error(err)
				}
				for message, err := range stream.Messages() {
					if message != nil || !errors.Is(err, ErrCancelled) {
						t.Error(message, err)
					}
				}
			})
		}
	}
}

func TestContextEndStopsTheWorkerWhileTheLoopIsBusy(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	left := make(chan error, 1)
	serve(t, worker, "busy", func(ctx context.Context, req *Request, s *Sender) error {
		must(t, s.Send([]byte("first")))
		left <- waitForEnd(t, ctx)
		return nil
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := gateway.Request(ctx, "busy", nil, "busy reader")
	must(t, err)
	for message, err := range stream.Messages() {
		if message == nil {
			wantError(t, err, ErrCancelled, "context canceled")
			break
		}
		cancel()
		wantError(t, receive(t, left), ErrCancelled, "busy reader")
	}
}

func TestNextTimeoutLimitsOnlyTheWait(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	goOn := make(chan struct{})
	serve(t, worker, "late", func(ctx context.Context, req *Request, s *Sender) error {
		receive(t, goOn)
		return s.Send([]byte("late"))
	})
	stream := request(t, gateway, "late", "waiting")
	for _, limit := range []time.Duration{-1, 0, time.Millisecond, 10 * time.Millisecond} {
		if message, err := stream.NextTimeout(limit); message != nil || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error(limit, message, err)
		}
	}
	close(goOn)
	message, err := stream.NextTimeout(testTimeout)
	must(t, err)
	if string(message) != "late" {
		t.Error(string(message))
	}
	for range 2 {
		if _, err := stream.NextTimeout(testTimeout); err != io.EOF {
			t.Error(err)
		}
	}
}

func TestUnreachableStreamGoesOnUntilItsContextEnds(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	left := make(chan error, 1)
	serve(t, worker, "unreachable", func(ctx context.Context, req *Request, s *Sender) error {
		must(t, s.Send([]byte("first")))
		left <- waitForEnd(t, ctx)
		return nil
	})
	ctx, cancel := context.WithCancel(t.Context())
	_, err := gateway.Request(ctx, "unreachable", nil, "client")
	must(t, err)
	eventually(t, "the stream runs", func() bool { return worker.Stats().Senders == 1 })
	for range 3 {
		runtime.GC()
	}
	if gateway.streamsLeft() != 1 || gateway.Stats().Streams != 1 || len(left) != 0 {
		t.Error("the stream was ended")
	}
	cancel()
	wantError(t, receive(t, left), ErrCancelled, "client")
}

// Two texts that the C library sends have statuses of their own; all others are ErrRemote.
func TestErrorTextsOfThePeerHaveStatuses(t *testing.T) {
	s := startServer(t)
	gateway, worker := connect(t, s), rawClient(t, s)
	requests := worker.subscribe("statuses")
	for text, status := range map[string]Status{
		"the client is offline": ErrOffline, "server busy": ErrBusy,
		"the client is offline now": ErrRemote, "Server busy": ErrRemote, "": ErrRemote,
	} {
		stream := request(t, gateway, "statuses", "someone")
		worker.publish(receive(t, requests).reply, "", "", "__STREAM_ERROR__:"+text)
		_, err := read(t, stream)
		wantError(t, err, status, "")
		for _, other := range []Status{ErrOffline, ErrBusy, ErrRemote} {
			if errors.Is(err, other) != (status == other) {
				t.Errorf("%q: errors.Is(%v, %v)", text, err, other)
			}
		}
	}
	// The same on a lane.
	busy := connect(t, s)
	serve(t, busy, "busy", func(ctx context.Context, req *Request, s *Sender) error {
		must(t, s.Send(nil))
		return waitForEnd(t, ctx)
	}, With("max_streams", "1"))
	first := request(t, gateway, "busy", "first")
	_, err := first.Next(t.Context())
	must(t, err)
	_, err = read(t, request(t, gateway, "busy", "second"))
	wantError(t, err, ErrBusy, "")
	first.Close()
}

// A request that arrives after its client has left must not bring the client back.
func TestOnlyOnlineRefusesOfflineClients(t *testing.T) {
	s := startServer(t)
	gateway := connect(t, s)
	serve(t, connect(t, s), "echo", echo)
	const id = "only online"
	request := func(value string) (*Stream, error) {
		return gateway.Request(t.Context(), "echo", nil, id, With("only_online", value))
	}
	for range 2 {
		stream, err := request("true")
		if stream != nil || err == nil {
			t.Fatal("the request for an offline client was accepted")
		}
		wantError(t, err, ErrOffline, id)
		checkOnline(t, id, false)
		eventually(t, "the connection has no stream", func() bool { return gateway.streamsLeft() == 0 })

		must(t, MarkClientOnline(id))
		stream, err = request("true")
		must(t, err)
		if got, err := read(t, stream); len(got) != 3 || err != nil {
			t.Error(got, err)
		}
		must(t, MarkClientOffline(id))
	}
	stream, err := request("false")
	must(t, err)
	if got, err := read(t, stream); len(got) != 3 || err != nil {
		t.Error(got, err)
	}
	_, err = request("perhaps")
	wantError(t, err, ErrInvalid, "only_online")
}

func TestRetriesUntilAWorkerServes(t *testing.T) {
	s := startServer(t)
	gateway := connect(t, s)
	stream := request(t, gateway, "later", "waiting", With("retries", "1000"), With("retry_delay_ms", "10"))
	serve(t, connect(t, s), "later", echo)
	if got, err := read(t, stream); len(got) != 3 || err != nil {
		t.Error(got, err)
	}
}

// A reader that closes a stream before it has read all of it does not get io.EOF, even if the worker has ended the
// stream.
func TestClosedUnreadStreamIsNotComplete(t *testing.T) {
	s := startServer(t)
	gateway, worker := connect(t, s), rawClient(t, s)
	requests := worker.subscribe("unread")
	for _, length := range []int{0, 3} {
		stream, err := gateway.Request(t.Context(), "unread", nil, "")
		must(t, err)
		req := receive(t, requests)
		for range length {
			worker.publish(req.reply, "", "", "message")
		}
		worker.publish(req.reply, "", "", "__STREAM_END__")
		worker.flush()
		eventually(t, "the stream has ended", func() bool {
			stream.mu.Lock()
			defer stream.mu.Unlock()
			return stream.err != nil
		})
		stream.Close()
		_, err = stream.Next(t.Context())
		if length == 0 && err != io.EOF {
			t.Error(err)
		} else if length > 0 {
			wantError(t, err, ErrCancelled, "")
		}
	}
}

func TestCancelOnLevel0AnnouncesTheClientOffline(t *testing.T) {
	s := startServer(t)
	gateway, worker := connect(t, s), rawClient(t, s)
	requests, offline := worker.subscribe("cancel"), worker.subscribe("client.offline")
	cause := errors.New("the browser is gone")
	for name, cancel := range map[string]func(*Stream, context.CancelCauseFunc){
		"leaving the loop": func(s *Stream, _ context.CancelCauseFunc) {
			for range s.Messages() {
				break
			}
		},
		"Close":   func(s *Stream, _ context.CancelCauseFunc) { s.Close() },
		"context": func(_ *Stream, cancel context.CancelCauseFunc) { cancel(cause) },
	} {
		id := "cancel " + name
		ctx, stop := context.WithCancelCause(t.Context())
		stream, err := gateway.Request(ctx, "cancel", nil, id)
		must(t, err)
		req := receive(t, requests)
		worker.publish(req.reply, "", "", "one")
		worker.publish(req.reply, "", "", "two")
		worker.flush()
		cancel(stream, stop)
		if message := receive(t, offline); message.data != id {
			t.Errorf("%s: %q was announced", name, message.data)
		}
		_, err = read(t, stream)
		wantError(t, err, ErrCancelled, "")
		if (name == "context") != errors.Is(err, cause) {
			t.Errorf("%s: %v", name, err)
		}
		worker.publish(req.reply, "", "", "three")
		stream.Close()
		stop(nil)
		checkOnline(t, id, false)
	}
	ctx, stop := context.WithCancel(t.Context())
	stop()
	_, err := gateway.Request(ctx, "cancel", nil, "")
	wantError(t, err, ErrCancelled, "")
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}

	// A client that is marked online stays online when one of its streams ends: only the mark is announced.
	must(t, MarkClientOnline("stays"))
	request(t, gateway, "cancel", "stays").Close()
	must(t, MarkClientOffline("stays"))
	if message := receive(t, offline); message.data != "stays" || len(offline) > 0 {
		t.Error(message)
	}
}

func TestSlowReaderOnLevel0EndsWithFull(t *testing.T) {
	s := startServer(t)
	gateway, worker := connect(t, s), rawClient(t, s)
	requests := worker.subscribe("slow")
	const limit, size = 10000, 100
	slow := request(t, gateway, "slow", "slow", With("stream_buffer_bytes", strconv.Itoa(limit)))
	other := request(t, gateway, "slow", "other")
	first, second := receive(t, requests), receive(t, requests)
	for range 2 * limit / size {
		worker.publish(first.reply, "", "", strings.Repeat("x", size))
	}
	worker.publish(second.reply, "", "", "__STREAM_END__")
	if got, err := read(t, other); len(got) != 0 || err != nil {
		t.Error(got, err)
	}
	got, err := read(t, slow)
	wantError(t, err, ErrFull, "slow")
	if len(got) != limit/(size+64) {
		t.Errorf("%d messages were read", len(got))
	}
	gateway.events.wait(t, Log, "slow")
	checkOnline(t, "slow", false)

	// A reader that keeps up gets any number of messages.
	quick := request(t, gateway, "slow", "quick", With("stream_buffer_bytes", strconv.Itoa(limit)))
	req := receive(t, requests)
	for i := range 1000 {
		worker.publish(req.reply, "", "", strings.Repeat("x", size))
		if i%20 == 0 {
			for range 20 {
				if i > 0 {
					if _, err := quick.Next(t.Context()); err != nil {
						t.Fatal(i, err)
					}
				}
			}
		}
	}
}

func TestRequestRefusesInvalidInput(t *testing.T) {
	s := startServer(t)
	c, worker := connect(t, s), rawClient(t, s)
	requests := worker.subscribe(">")
	long := strings.Repeat("x", 1<<20)
	for _, bad := range []struct {
		subject, data, id string
		opts              []RequestOption
		status            Status
		named             string
	}{
		{subject: "", named: "subject"},
		{subject: "a b", named: `"a b"`},
		{subject: "a\r\nPUB b 0\r\n\r\n", named: "subject"},
		{subject: "a\x00", named: "subject"},
		{subject: "a\xff", named: "subject"},
		{subject: "a.*", named: `"a.*"`},
		{subject: "a.>", named: `"a.>"`},
		{subject: "a", data: long + "x", status: ErrTooLarge, named: "1048576"},
		{subject: "a", data: long, id: "x", status: ErrTooLarge, named: "1048576"},
		{subject: "a", opts: []RequestOption{With("timeout", "1")}, named: `"timeout"`},
		{subject: "a", opts: []RequestOption{With("timeout_ms", "soon")}, named: "timeout_ms"},
		{subject: "a", opts: []RequestOption{With("timeout_ms", "1\x00")}, named: "timeout_ms"},
		{subject: "a", opts: []RequestOption{With("timeout_ms\x00", "1")}, named: "timeout_ms"},
		{subject: "a", opts: []RequestOption{With("user", "u")}, named: "user"},
		{subject: "a", opts: []RequestOption{With("lanes", "false")}, named: "lanes"},
		{subject: "a", opts: []RequestOption{With("manual_credit", "false")}, named: "manual_credit"},
		{subject: "a", opts: []RequestOption{With("header.X", "a\r\nb")}, named: "X"},
		{subject: "a", opts: []RequestOption{With("header.Connect-ID", "y")}, named: "Connect-ID"},
	} {
		if bad.status == 0 {
			bad.status = ErrInvalid
		}
		stream, err := c.Request(t.Context(), bad.subject, []byte(bad.data), bad.id, bad.opts...)
		if stream != nil || err == nil {
			t.Fatalf("%.40q %q: the request was accepted", bad.subject, bad.id)
		}
		wantError(t, err, bad.status, bad.named)
	}
	for name, id := range invalidIDs {
		stream, err := c.Request(t.Context(), "a", nil, id)
		if stream != nil || err == nil {
			t.Fatalf("%s: the request was accepted", name)
		}
		wantError(t, err, ErrInvalid, "client id")
	}
	worker.flush()
	if len(requests) != 0 || c.streamsLeft() != 0 || c.Stats().Streams != 0 {
		t.Errorf("a request was sent: %q", (<-requests).data)
	}
}
