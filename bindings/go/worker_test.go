package presence

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log"
	"math"
	"net"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// waitForEnd waits for a context's end and returns its cause.
func waitForEnd(t *testing.T, ctx context.Context) error {
	t.Helper()
	receive(t, ctx.Done())
	return context.Cause(ctx)
}

// readAnswers returns the messages that a raw requester gets, including the one that ends the stream.
func readAnswers(t *testing.T, from <-chan rawMessage) (messages []string) {
	t.Helper()
	for {
		message := receive(t, from)
		messages = append(messages, message.data)
		if strings.HasPrefix(message.data, "__STREAM_") {
			return messages
		}
	}
}

func TestWorkerOnTheWire(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), rawClient(t, s)
	serve(t, worker, "wire.*", func(ctx context.Context, req *Request, s *Sender) error {
		if s.IsClosed() || s.Err() != nil {
			t.Error("closed when the handler begins: ", s.Err())
		}
		for _, text := range []string{req.Subject, req.ClientID, req.Header("X-Model"), req.Header("x\x00"), string(req.Data), ""} {
			if err := s.Send([]byte(text)); err != nil {
				t.Error(err)
			}
		}
		if s.SendCount() != 6 {
			t.Error("count ", s.SendCount())
		}
		switch string(req.Data) {
		case "fail":
			return errors.New("no such model")
		case "panic":
			panic("oh")
		case "goexit":
			runtime.Goexit()
		case "send":
			return s.SendError(errors.New("sent text"))
		}
		return nil
	})
	for data, end := range map[string]string{
		"go\r\non": "__STREAM_END__",
		"fail":     "__STREAM_ERROR__:the handler failed",
		"panic":    "__STREAM_ERROR__:the handler failed",
		"goexit":   "__STREAM_ERROR__:the handler failed",
		"send":     "__STREAM_ERROR__:sent text",
	} {
		inbox := "_INBOX.wire." + strings.Fields(data)[0]
		from := gateway.subscribe(inbox)
		gateway.publish("wire.x", inbox, "X-Model: gpt\r\nConnect-ID: wire-worker", data)
		got := readAnswers(t, from)
		want := []string{"wire.x", "wire-worker", "gpt", "", data, "", end}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: got %q, want %q", data, got, want)
		}
	}
	got := readAnswers(t, gateway.request("wire.x", "", "anonymous"))
	if got[1] != "" || got[6] != "__STREAM_END__" {
		t.Errorf("anonymous: %q", got)
	}
	worker.events.wait(t, Log, "the handler panicked: oh\n") // with its stack
	eventually(t, "all senders are freed", func() bool { return worker.sendersLeft() == 0 })
	checkOnline(t, "wire-worker", false)
}

func TestRequestHasAllHeadersAndTheReplySubject(t *testing.T) {
	s := startServer(t)
	worker, raw, gateway := connect(t, s), rawClient(t, s), connect(t, s)
	requests := make(chan *Request, 2)
	serve(t, worker, "headers", func(ctx context.Context, req *Request, s *Sender) error {
		requests <- req
		<-ctx.Done()
		return nil
	})
	raw.publish("headers", "_INBOX.headers.1", "X-Model: small\r\nConnect-ID: headers-1\r\nX-Model: large\r\nX-Empty:", "")
	req := receive(t, requests)
	want := map[string][]string{"Connect-ID": {"headers-1"}, "X-Model": {"small", "large"}, "X-Empty": {""}}
	if got := req.Headers(); !reflect.DeepEqual(got, want) || req.Reply() != "_INBOX.headers.1" {
		t.Errorf("headers %q, reply %q", got, req.Reply())
	}
	must(t, MarkClientOffline("headers-1"))
	eventually(t, "the sender is freed", func() bool { return worker.sendersLeft() == 0 })
	if req.Headers() != nil || req.Reply() != "" {
		t.Errorf("after the end: headers %q, reply %q", req.Headers(), req.Reply())
	}
	stream := request(t, gateway, "headers", "")
	req = receive(t, requests)
	if req.Headers() != nil || !strings.HasPrefix(req.Reply(), "_INBOX.") { // Presence-Lane is not shown
		t.Errorf("without a client: headers %q, reply %q", req.Headers(), req.Reply())
	}
	must(t, stream.Close())
}

type badError struct{ secret *string }

func (b *badError) Error() string { return *b.secret } // panics if there is none

// The text of a failing handler is not sent to the requester, except by SendError. All texts are logged.
func TestFailureTextsAreLoggedAndNotSent(t *testing.T) {
	const secret = "password=hunter2"
	s := startServer(t)
	for _, lanes := range []string{"true", "false"} {
		t.Run("lanes "+lanes, func(t *testing.T) {
			worker, gateway := connect(t, s, With("lanes", lanes)), connect(t, s)
			serve(t, worker, "secret", func(ctx context.Context, req *Request, s *Sender) error {
				switch req.ClientID {
				case "error":
					return errors.New(secret)
				case "wrapped":
					return fmt.Errorf("%w: %w", ErrRemote, &Error{Status: ErrRemote, Message: secret})
				case "detached":
					s.Detach()
					return errors.New(secret)
				case "panic":
					panic(secret)
				case "panic with an error":
					panic(errors.New(secret))
				case "index":
					_ = []string{secret}[len(req.Data)]
				case "nil error":
					return (*badError)(nil)
				case "goexit":
					defer func() { _ = recover() }()
					runtime.Goexit()
				case "sent":
					return s.SendError(errors.New("no such model"))
				}
				return nil
			})
			for id, logged := range map[string]string{
				"error": secret, "wrapped": secret, "detached": secret, "panic": secret, "panic with an error": secret,
				"index": "index out of range", "nil error": "returned an error", "goexit": "runtime.Goexit",
			} {
				_, err := read(t, request(t, gateway, "secret", id))
				wantError(t, err, ErrRemote, handlerFailed)
				if err.Error() != "presence: "+handlerFailed {
					t.Errorf("%s: the requester reads %q", id, err)
				}
				eventually(t, id+" is logged", func() bool {
					worker.events.mu.Lock()
					defer worker.events.mu.Unlock()
					for _, event := range worker.events.all {
						if event.Kind == Log && event.ClientID == id && strings.Contains(event.Text, logged) {
							return true
						}
					}
					return false
				})
			}
			_, err := read(t, request(t, gateway, "secret", "sent"))
			wantError(t, err, ErrRemote, "no such model")
		})
	}
}

// What Errorf makes reaches the requester, its code too, and is not logged. What wraps it stays here.
func TestErrorfReachesTheRequesterWithItsCode(t *testing.T) {
	const secret = "password=hunter2"
	cause := errors.New("no such model")
	s := startServer(t)
	for _, lanes := range []string{"true", "false"} {
		t.Run("lanes "+lanes, func(t *testing.T) {
			worker, gateway := connect(t, s, With("lanes", lanes)), connect(t, s)
			serve(t, worker, "codes", func(ctx context.Context, req *Request, s *Sender) error {
				switch req.ClientID {
				case "returned":
					return Errorf(404, "%w: %q", cause, req.Data)
				case "wrapped":
					return fmt.Errorf("%s: %w", secret, Errorf(404, "%w", cause))
				case "joined":
					return errors.Join(errors.New(secret), Errorf(math.MaxInt32, "no such model"))
				case "detached":
					s.Detach()
					return Errorf(1, "no such model")
				case "sent":
					return s.SendError(fmt.Errorf("sorry: %w", Errorf(404, "no such model")))
				case "busy":
					return Errorf(7, "server busy")
				case "too large":
					code := int64(math.MaxInt32) + 1
					return Errorf(int(code), "no such model")
				case "negative":
					return Errorf(-1, "no such model")
				case "upstream": // what another worker has sent to this process
					return &Error{Status: ErrRemote, Message: secret, Code: 500}
				case "ended":
					must(t, s.End())
					return Errorf(404, "too late")
				case "panic":
					panic(Errorf(404, secret))
				case "nil error":
					return (*badError)(nil)
				}
				return Errorf(0, "no such model")
			})
			for id, want := range map[string]Error{
				"returned":  {ErrRemote, `no such model: "gpt"`, 404},
				"wrapped":   {ErrRemote, "no such model", 404},
				"joined":    {ErrRemote, "no such model", math.MaxInt32},
				"detached":  {ErrRemote, "no such model", 1},
				"sent":      {ErrRemote, "sorry: no such model", 404},
				"busy":      {ErrBusy, "server busy", 7},
				"too large": {ErrRemote, "no such model", 0},
				"negative":  {ErrRemote, "no such model", 0},
				"zero":      {ErrRemote, "no such model", 0},
				"upstream":  {ErrRemote, handlerFailed, 0},
				"panic":     {ErrRemote, handlerFailed, 0},
				"nil error": {ErrRemote, handlerFailed, 0},
			} {
				stream, err := gateway.Request(t.Context(), "codes", []byte("gpt"), id)
				must(t, err)
				_, err = read(t, stream)
				var got *Error
				if !errors.As(err, &got) || *got != want {
					t.Errorf("%s: the requester gets %#v", id, err)
				}
			}
			if got, err := read(t, request(t, gateway, "codes", "ended")); len(got) != 0 || err != nil {
				t.Errorf("an error after the end: %q, %v", got, err)
			}
			eventually(t, "all streams have ended", func() bool { return worker.sendersLeft() == 0 })
			worker.events.mu.Lock()
			defer worker.events.mu.Unlock()
			for _, event := range worker.events.all {
				if event.Kind == Log && !slices.Contains([]string{"upstream", "panic", "nil error"}, event.ClientID) {
					t.Errorf("logged: %+v", event)
				}
			}
		})
	}
	err := Errorf(404, "%w: %d", cause, 5)
	if err.Error() != "no such model: 5" || !errors.Is(err, cause) || errors.Is(err, ErrRemote) {
		t.Errorf("%#v", err)
	}
}

func TestErrorAfterTheClientLeftIsNotLogged(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	serve(t, worker, "leave", func(ctx context.Context, req *Request, s *Sender) error {
		if req.ClientID == "last" {
			return errors.New("logged")
		}
		s.Send([]byte("first"))
		return waitForEnd(t, ctx)
	})
	stream := request(t, gateway, "leave", "leaver")
	_, err := stream.Next(t.Context())
	must(t, err)
	must(t, stream.Close())
	eventually(t, "the handler has returned", func() bool { return worker.sendersLeft() == 0 })
	read(t, request(t, gateway, "leave", "last"))
	worker.events.wait(t, Log, "logged")
	worker.events.mu.Lock()
	defer worker.events.mu.Unlock()
	for _, event := range worker.events.all {
		if event.ClientID == "leaver" {
			t.Error(event.Text)
		}
	}
}

func TestSenderStopsWhenTheClientLeaves(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), rawClient(t, s)
	type end struct{ cause, send, end, fail error }
	ends := make(chan end, 1)
	serve(t, worker, "leave", func(ctx context.Context, req *Request, s *Sender) error {
		must(t, s.Send([]byte("first")))
		e := end{cause: waitForEnd(t, ctx)}
		e.send, e.fail, e.end = s.Send([]byte("more")), s.SendError(errors.New("late")), s.End()
		if !s.IsClosed() || !errors.Is(s.Err(), ErrOffline) || s.SendCount() != 1 {
			t.Error(s.IsClosed(), s.Err(), s.SendCount())
		}
		if req.Header("Connect-ID") != "leaver" {
			t.Error("no header after the client left")
		}
		ends <- e
		return ctx.Err()
	})
	from := gateway.request("leave", "leaver", "")
	receive(t, from)
	checkOnline(t, "leaver", true)
	gateway.publish("client.offline", "", "", "leaver")
	e := receive(t, ends)
	for _, err := range []error{e.cause, e.send, e.end, e.fail} {
		wantError(t, err, ErrOffline, `"leaver"`)
	}
	checkOnline(t, "leaver", false)
	if got := readAnswers(t, from); len(got) != 1 || !strings.HasPrefix(got[0], "__STREAM_ERROR__:") {
		t.Errorf("after the client left: %q", got)
	}

	// A new stream of the same client is not stopped.
	receive(t, gateway.request("leave", "leaver", ""))
	must(t, MarkClientOffline("leaver"))
	if e := receive(t, ends); !errors.Is(e.cause, ErrOffline) {
		t.Error(e)
	}
	eventually(t, "all senders are freed", func() bool { return worker.sendersLeft() == 0 })
}

func TestDetachedStreamOutlivesItsHandler(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), rawClient(t, s)
	type job struct {
		ctx context.Context
		req *Request
		*Sender
	}
	jobs := make(chan job, 1)
	serving := serve(t, worker, "detach", func(ctx context.Context, req *Request, s *Sender) error {
		s.Detach()
		jobs <- job{ctx, req, s}
		if string(req.Data) == "fail" {
			return errors.New("failed although detached")
		}
		return nil
	})
	begin := func(data string) (job, <-chan rawMessage) {
		from := gateway.request("detach", "detacher", data)
		return receive(t, jobs), from
	}

	j, from := begin("")
	serving.waitForHandlers(t, worker)
	for i := range 3 {
		must(t, j.Send(fmt.Append(nil, i)))
	}
	if j.ctx.Err() != nil || j.req.Header("Connect-ID") != "detacher" {
		t.Error("the stream ended with its handler: ", j.ctx.Err())
	}
	must(t, j.End())
	must(t, j.End())
	if got := readAnswers(t, from); fmt.Sprint(got) != "[0 1 2 __STREAM_END__]" {
		t.Errorf("got %q", got)
	}
	// The C sender is freed, and the results stay the same.
	eventually(t, "the sender is freed", func() bool { return worker.sendersLeft() == 0 })
	waitForEnd(t, j.ctx)
	must(t, j.End())
	wantError(t, j.Send(nil), ErrClosed, "detacher")
	wantError(t, j.TrySend(nil), ErrClosed, "detacher")
	wantError(t, j.Err(), ErrClosed, "detacher")
	wantError(t, j.SendError(nil), ErrClosed, "detacher")
	if !j.IsClosed() || j.SendCount() != 3 || j.req.Header("Connect-ID") != "" {
		t.Error(j.IsClosed(), j.SendCount())
	}

	j, from = begin("")
	must(t, j.SendError(errors.New("sorry")))
	if got := readAnswers(t, from); fmt.Sprint(got) != "[__STREAM_ERROR__:sorry]" {
		t.Errorf("got %q", got)
	}

	j, _ = begin("")
	serving.waitForHandlers(t, worker)
	gateway.publish("client.offline", "", "", "detacher")
	wantError(t, waitForEnd(t, j.ctx), ErrOffline, "detacher")
	eventually(t, "the sender is freed", func() bool { return worker.sendersLeft() == 0 })
	wantError(t, j.Send(nil), ErrOffline, "detacher")
	wantError(t, j.End(), ErrOffline, "detacher")

	j, from = begin("fail")
	if got := readAnswers(t, from); fmt.Sprint(got) != "[__STREAM_ERROR__:the handler failed]" {
		t.Errorf("got %q", got)
	}
	waitForEnd(t, j.ctx)

	j, from = begin("")
	serving.stop()
	must(t, receive(t, serving.result))
	if got := readAnswers(t, from); fmt.Sprint(got) != "[__STREAM_ERROR__:the worker stopped serving]" {
		t.Errorf("got %q", got)
	}
	wantError(t, j.Send(nil), ErrCancelled, "context canceled")
	wantError(t, j.SendError(nil), ErrCancelled, "context canceled")
	wantError(t, j.End(), ErrCancelled, "context canceled")
	waitForEnd(t, j.ctx)
	eventually(t, "the sender is freed", func() bool { return worker.sendersLeft() == 0 })
	wantError(t, j.Send(nil), ErrCancelled, "context canceled")
	wantError(t, j.SendError(nil), ErrCancelled, "context canceled")
	wantError(t, j.End(), ErrCancelled, "context canceled")
}

func TestSendAfterReturnWithoutDetachFailsAndIsLoggedOnce(t *testing.T) {
	s := startServer(t)
	for _, lanes := range []string{"true", "false"} {
		t.Run("lanes "+lanes, func(t *testing.T) {
			worker, gateway := connect(t, s, With("lanes", lanes)), connect(t, s)
			senders := make(chan *Sender, 1)
			serve(t, worker, "undetached", func(ctx context.Context, req *Request, s *Sender) error {
				if req.ClientID == "ended" {
					must(t, s.End())
				}
				senders <- s
				return nil
			})
			const why = "its handler returned without Detach"
			for range 2 {
				if got, err := read(t, request(t, gateway, "undetached", "undetached")); len(got) > 0 || err != nil {
					t.Error(got, err)
				}
				sender := receive(t, senders)
				eventually(t, "the sender is freed", func() bool { return worker.sendersLeft() == 0 })
				for _, err := range []error{
					sender.Send(nil), sender.TrySend(nil), sender.SendContext(t.Context(), nil), sender.Err(), sender.SendError(nil),
				} {
					wantError(t, err, ErrClosed, why)
				}
				must(t, sender.End())
			}
			worker.events.wait(t, Log, why)
			// The error differs for a stream that the handler ended itself.
			_, err := read(t, request(t, gateway, "undetached", "ended"))
			must(t, err)
			if err := receive(t, senders).Send(nil); !errors.Is(err, ErrClosed) || strings.Contains(err.Error(), why) {
				t.Error(err)
			}
			logged := 0
			worker.events.mu.Lock()
			defer worker.events.mu.Unlock()
			for _, event := range worker.events.all {
				if strings.Contains(event.Text, why) {
					logged++
				}
			}
			if logged != 1 {
				t.Errorf("logged %d times", logged)
			}
		})
	}
}

// With the option detached, a handler's goroutine goes on sending after the handler's return.
func TestOptionDetachedKeepsStreamsOpen(t *testing.T) {
	s := startServer(t)
	for _, lanes := range []string{"true", "false"} {
		t.Run("lanes "+lanes, func(t *testing.T) {
			worker, gateway := connect(t, s, With("lanes", lanes)), connect(t, s)
			running := make(chan *Sender, 1)
			serving := serve(t, worker, "later", func(ctx context.Context, req *Request, s *Sender) error {
				switch req.ClientID {
				case "error":
					return errors.New("refused")
				case "panic":
					panic("oh")
				case "sent":
					return s.SendError(errors.New("no such model"))
				case "unreachable": // nothing refers to the sender any more
					must(t, s.Send([]byte("first")))
					return nil
				}
				returned := make(chan struct{})
				defer close(returned)
				go func() {
					<-returned
					if ctx.Err() != nil {
						t.Error("the stream ended with its handler: ", context.Cause(ctx))
					}
					for i := range 3 {
						must(t, s.Send(fmt.Append(nil, i)))
					}
					if req.ClientID == "leaver" || req.ClientID == "cut" {
						running <- s
						return
					}
					must(t, s.End())
				}()
				return nil
			}, With("detached", "true"))

			if got, err := read(t, request(t, gateway, "later", "whole")); err != nil || fmt.Sprint(got) != "[0 1 2]" {
				t.Error(got, err)
			}
			for id, text := range map[string]string{"error": handlerFailed, "panic": handlerFailed, "sent": "no such model"} {
				_, err := read(t, request(t, gateway, "later", id))
				wantError(t, err, ErrRemote, text)
			}
			eventually(t, "all streams have ended", func() bool { return worker.sendersLeft() == 0 })

			stream := request(t, gateway, "later", "leaver")
			sender := receive(t, running)
			must(t, stream.Close())
			waitForEnd(t, sender.ctx)
			if err := sender.Send(nil); !errors.Is(err, ErrCancelled) && !errors.Is(err, ErrOffline) {
				t.Error(err)
			}

			// No finalizer ends a stream whose sender is unreachable.
			unreachable := request(t, gateway, "later", "unreachable")
			_, err := unreachable.Next(t.Context())
			must(t, err)
			serving.waitForHandlers(t, worker)
			for range 3 {
				runtime.GC()
			}
			if worker.Stats().Senders != 1 {
				t.Error("the stream was ended: ", worker.Stats())
			}

			stream = request(t, gateway, "later", "cut")
			receive(t, running)
			serving.stop()
			must(t, receive(t, serving.result))
			for _, stream := range []*Stream{stream, unreachable} {
				_, err := read(t, stream)
				wantError(t, err, ErrRemote, stoppedServing)
			}
		})
	}
}

// waitForHandlers waits until no handler runs.
func (s *serving) waitForHandlers(t *testing.T, c *client) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, v := range c.services {
		v.running.Wait()
	}
}

func TestServeEndsWithItsContext(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), rawClient(t, s)
	begun := make(chan struct{})
	var returned sync.WaitGroup
	returned.Add(1)
	serving := serve(t, worker, "stop", func(ctx context.Context, req *Request, s *Sender) error {
		defer returned.Done()
		close(begun)
		waitForEnd(t, ctx)
		err := s.Send([]byte("too late"))
		wantError(t, err, ErrCancelled, "context canceled")
		if !errors.Is(err, context.Canceled) || !errors.Is(s.Err(), ErrCancelled) || !s.IsClosed() {
			t.Error(err, s.Err())
		}
		return err
	})
	from := gateway.request("stop", "stopped", "")
	receive(t, begun)
	serving.stop()
	must(t, receive(t, serving.result))
	returned.Wait() // returns at once: Serve has waited for the handler
	if got := readAnswers(t, from); len(got) != 1 || got[0] != "__STREAM_ERROR__:"+stoppedServing {
		t.Errorf("got %q", got)
	}
	// No worker serves the subject any more.
	if got := receive(t, gateway.request("stop", "stopped", "")); !strings.Contains(got.header, "503") {
		t.Errorf("got %q", got)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	must(t, worker.Serve(ctx, "stop", "", func(context.Context, *Request, *Sender) error { return nil }))
}

// Their handlers return nil or call End.
func TestStreamsCutByStopDoNotLookComplete(t *testing.T) {
	s := startServer(t)
	for _, lanes := range []string{"true", "false"} {
		for name, end := range map[string]func(ctx context.Context, s *Sender) error{
			"return at Send's error": func(ctx context.Context, s *Sender) error {
				for s.Send([]byte("x")) == nil {
					time.Sleep(time.Millisecond)
				}
				return nil
			},
			"return at the context's end": func(ctx context.Context, s *Sender) error {
				waitForEnd(t, ctx)
				return nil
			},
			"End": func(ctx context.Context, s *Sender) error {
				waitForEnd(t, ctx)
				err := s.End()
				wantError(t, err, ErrCancelled, "context canceled")
				if !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
				return nil
			},
			"End elsewhere": func(ctx context.Context, s *Sender) error {
				s.Detach()
				context.AfterFunc(ctx, func() { s.End() })
				return nil
			},
		} {
			t.Run(name+", lanes "+lanes, func(t *testing.T) {
				worker, gateway := connect(t, s, With("lanes", lanes)), connect(t, s)
				serving := serve(t, worker, "cut", func(ctx context.Context, req *Request, s *Sender) error {
					must(t, s.Send([]byte("first")))
					return end(ctx, s)
				})
				stream := request(t, gateway, "cut", "cut short")
				_, err := stream.Next(t.Context())
				must(t, err)
				serving.stop()
				_, err = read(t, stream)
				wantError(t, err, ErrRemote, stoppedServing)
				must(t, receive(t, serving.result))
			})
		}
	}
}

// A handler that ignores its context delays the return of Serve, but not the end of the stream.
func TestStopDoesNotWaitForHandlers(t *testing.T) {
	s := startServer(t)
	for _, lanes := range []string{"true", "false"} {
		for _, drain := range []string{"0", "50"} {
			t.Run("lanes "+lanes+", drain "+drain, func(t *testing.T) {
				worker, gateway := connect(t, s, With("lanes", lanes)), connect(t, s)
				goOn := make(chan struct{})
				serving := serve(t, worker, "ignore", func(ctx context.Context, req *Request, s *Sender) error {
					must(t, s.Send([]byte("first")))
					receive(t, goOn)
					wantError(t, s.Send(nil), ErrCancelled, "context canceled")
					wantError(t, s.End(), ErrCancelled, "context canceled")
					wantError(t, s.End(), ErrCancelled, "context canceled")
					return nil
				}, With("drain_ms", drain))
				stream := request(t, gateway, "ignore", "reader")
				_, err := stream.Next(t.Context())
				must(t, err)
				serving.stop()
				_, err = read(t, stream)
				wantError(t, err, ErrRemote, stoppedServing)
				if len(serving.result) != 0 {
					t.Error("Serve returned before its handler")
				}
				close(goOn)
				must(t, receive(t, serving.result))
			})
		}
	}
}

// Serve returns while handlers still run, and reports how many.
func TestStopTimeoutLimitsTheWaitForHandlers(t *testing.T) {
	s := startServer(t)
	for name, end := range map[string]func(*client, *serving){
		"context": func(c *client, s *serving) { s.stop() },
		"Close":   func(c *client, s *serving) { closeConn(c.Conn) },
	} {
		t.Run(name, func(t *testing.T) {
			worker, gateway := connect(t, s), connect(t, s)
			goOn, returned := make(chan struct{}), make(chan *Sender, 2)
			serving := serve(t, worker, "ignore", func(ctx context.Context, req *Request, s *Sender) error {
				must(t, s.Send([]byte("first")))
				receive(t, goOn)
				s.Send(nil)
				s.End()
				returned <- s
				return nil
			}, With("stop_timeout_ms", "50"))
			for _, id := range []string{"one", "two"} {
				_, err := request(t, gateway, "ignore", id).Next(t.Context())
				must(t, err)
			}
			end(worker, serving)
			err := receive(t, serving.result)
			if name == "context" {
				wantError(t, err, ErrTimeout, "2 handlers still run 50ms")
			} else if !errors.Is(err, ErrTimeout) || !errors.Is(err, ErrClosed) || !strings.Contains(err.Error(), "2 handlers still run") {
				t.Error(err)
			}
			closeConn(worker.Conn)
			close(goOn)
			for range 2 {
				if sender := receive(t, returned); sender.Err() == nil {
					t.Error("the sender can still send")
				}
			}
			eventually(t, "all senders are freed", func() bool { return worker.sendersLeft() == 0 })
		})
	}
	// Serve reports nothing if all handlers return in time.
	worker := connect(t, s)
	serving := serve(t, worker, "quick", func(ctx context.Context, req *Request, s *Sender) error { return nil }, With("stop_timeout_ms", "60000"))
	_, err := read(t, request(t, connect(t, s), "quick", ""))
	must(t, err)
	serving.stop()
	must(t, receive(t, serving.result))
}

type lineWriter chan string

func (w lineWriter) Write(text []byte) (int, error) {
	w <- string(text)
	return len(text), nil
}

func TestPanicIsPrintedWithoutWithLog(t *testing.T) {
	s := startServer(t)
	c, err := Connect(s.url)
	must(t, err)
	defer closeConn(c)
	lines := make(lineWriter, 10)
	defer log.SetOutput(log.Writer())
	log.SetOutput(lines)
	go c.Serve(t.Context(), "panic", "", func(context.Context, *Request, *Sender) error { panic("oh") })
	_, err = read(t, request(t, &client{Conn: c}, "panic", "", With("retries", "1000"), With("retry_delay_ms", "10")))
	wantError(t, err, ErrRemote, handlerFailed)
	if text := receive(t, lines); !strings.Contains(text, "presence: the handler panicked: oh\n") || !strings.Contains(text, "TestPanicIsPrintedWithoutWithLog") {
		t.Error(text)
	}
}

// drainedHandler returns a handler that sends a message, waits for goOn, and sends another one. The client "detached"
// gets a detached sender in place of the second message.
func drainedHandler(t *testing.T, goOn chan struct{}, detached chan *Sender) Handler {
	return func(ctx context.Context, req *Request, s *Sender) error {
		if err := s.Send([]byte("first")); err != nil { // a late request
			return err
		}
		if req.ClientID == "detached" {
			s.Detach()
			detached <- s
			return nil
		}
		receive(t, goOn)
		if req.ClientID == "handled" && ctx.Err() != nil { // a late request may have been given up meanwhile
			t.Error(context.Cause(ctx))
		}
		return s.Send([]byte("last"))
	}
}

// With drain_ms, streams that run when Serve's context ends are completed, and no other stream begins.
func TestDrainCompletesRunningStreams(t *testing.T) {
	s := startServer(t)
	for _, lanes := range []string{"true", "false"} {
		t.Run("lanes "+lanes, func(t *testing.T) {
			worker, gateway := connect(t, s, With("lanes", lanes)), connect(t, s)
			goOn, detached := make(chan struct{}), make(chan *Sender, 1)
			serving := serve(t, worker, "drain", drainedHandler(t, goOn, detached), With("drain_ms", "60000"))
			streams := []*Stream{request(t, gateway, "drain", "handled"), request(t, gateway, "drain", "detached")}
			for _, stream := range streams {
				_, err := stream.Next(t.Context())
				must(t, err)
			}
			serving.stop()
			eventually(t, "no worker serves the subject", func() bool {
				_, err := read(t, request(t, gateway, "drain", "late", With("timeout_ms", "100")))
				return errors.Is(err, ErrNoResponders)
			})
			close(goOn)
			sender := receive(t, detached)
			must(t, sender.Err())
			if got, err := read(t, streams[0]); err != nil || fmt.Sprint(got) != "[last]" {
				t.Error(got, err)
			}
			must(t, sender.Send([]byte("last")))
			if len(serving.result) != 0 {
				t.Error("Serve did not wait for the detached stream")
			}
			must(t, sender.End())
			if got, err := read(t, streams[1]); err != nil || fmt.Sprint(got) != "[last]" {
				t.Error(got, err)
			}
			must(t, receive(t, serving.result))
		})
	}
}

// Streams that still run after drain_ms, or when the connection is closed, are cut.
func TestDrainEndsAtItsTimeoutOrClose(t *testing.T) {
	s := startServer(t)
	for name, end := range map[string]struct {
		drain string
		end   func(*client)
		cause error
	}{
		"time":  {"100", func(*client) {}, context.Canceled},
		"Close": {"60000", func(c *client) { closeConn(c.Conn) }, ErrClosed},
	} {
		t.Run(name, func(t *testing.T) {
			worker, gateway := connect(t, s), connect(t, s)
			causes := make(chan error, 1)
			serving := serve(t, worker, "drain", func(ctx context.Context, req *Request, s *Sender) error {
				must(t, s.Send([]byte("first")))
				causes <- waitForEnd(t, ctx)
				return nil
			}, With("drain_ms", end.drain))
			stream := request(t, gateway, "drain", "cut")
			_, err := stream.Next(t.Context())
			must(t, err)
			begin := time.Now()
			serving.stop()
			end.end(worker)
			if err := receive(t, causes); !errors.Is(err, end.cause) {
				t.Error(err)
			}
			if took := time.Since(begin); name == "time" && took < 100*time.Millisecond {
				t.Error("took only ", took)
			}
			_, err = read(t, stream)
			wantError(t, err, ErrRemote, "")
			must(t, receive(t, serving.result))
		})
	}
}

// unresponsiveServer is a NATS server that sends a request to the first subscriber of a subject, and answers nothing
// after that.
func unresponsiveServer(t *testing.T, subject string) (url string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { listener.Close() })
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		fmt.Fprint(conn, "INFO {\"server_id\":\"x\",\"version\":\"2.10.0\",\"proto\":1,\"headers\":true,\"max_payload\":1048576}\r\n")
		sids, isSilent := make(map[string]string), false // sids by the prefixes of their subjects
		for lines := bufio.NewScanner(conn); lines.Scan(); {
			words := append(strings.Fields(lines.Text()), "", "")
			name, sid := words[1], words[max(len(words)-3, 0)]
			switch words[0] {
			case "PING":
				fmt.Fprint(conn, "PONG\r\n")
			case "SUB":
				sids[strings.TrimSuffix(name, "*")] = sid
				if name == subject {
					isSilent = true
					fmt.Fprintf(conn, "MSG %s %s _INBOX.someone.1 1\r\nq\r\n", name, sid)
				}
			case "PUB":
				for prefix, sid := range sids {
					if !isSilent && strings.HasPrefix(name, prefix) {
						fmt.Fprintf(conn, "MSG %s %s 0\r\n\r\n", name, sid)
					}
				}
			}
		}
	}()
	return "nats://" + listener.Addr().String()
}

// A request arrives while Serve waits for the server. Its handler has returned before Serve does.
func TestServeEndsEarlyRequestsWhenTheServerDoesNotAnswer(t *testing.T) {
	for name, cancel := range map[string]bool{"timeout": false, "context": true} {
		t.Run(name, func(t *testing.T) {
			c := connect(t, &server{url: unresponsiveServer(t, "vain")}, With("connect_timeout_ms", "300"))
			t.Cleanup(func() {
				ctx, stop := context.WithCancel(t.Context())
				stop()
				c.Close(ctx) // without waiting for the server
			})
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			var begun, ended atomic.Int32
			err := c.Serve(ctx, "vain", "", func(ctx context.Context, req *Request, s *Sender) error {
				s.Detach()
				begun.Add(1)
				if cancel {
					stop()
				}
				waitForEnd(t, ctx)
				time.Sleep(50 * time.Millisecond)
				ended.Add(1)
				return nil
			})
			if cancel {
				must(t, err)
			} else {
				wantError(t, err, ErrTimeout, "")
			}
			if begun.Load() != 1 || ended.Load() != 1 || c.sendersLeft() != 0 {
				t.Errorf("%d handlers began, %d ended, %d streams are left", begun.Load(), ended.Load(), c.sendersLeft())
			}
		})
	}
}

func TestRequestBeyondMaxStreamsIsRefused(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), rawClient(t, s)
	serve(t, worker, "busy", func(ctx context.Context, req *Request, s *Sender) error {
		s.Send([]byte("mine"))
		return waitForEnd(t, ctx)
	}, With("max_streams", "1"))
	receive(t, gateway.request("busy", "first", ""))
	if got := readAnswers(t, gateway.request("busy", "second", "")); fmt.Sprint(got) != "[__STREAM_ERROR__:server busy]" {
		t.Errorf("got %q", got)
	}
	gateway.publish("client.offline", "", "", "first")
	eventually(t, "the first stream has ended", func() bool { return worker.sendersLeft() == 0 })
	receive(t, gateway.request("busy", "third", ""))
	if stats := worker.Stats(); stats.Requests != 3 || stats.RequestsBusy != 1 || stats.Senders != 1 || !stats.Connected {
		t.Errorf("%+v", stats)
	}
}

func TestHandlersThatOutliveTheirStreamsCountForMaxStreams(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	release := make(chan struct{})
	serve(t, worker, "busy", func(ctx context.Context, req *Request, s *Sender) error {
		if req.ClientID == "quick" {
			return nil
		}
		must(t, s.Send([]byte("mine")))
		<-release // ignores ctx
		return nil
	}, With("max_streams", "1"))
	for i := range 20 {
		stream := request(t, gateway, "busy", fmt.Sprint("slow ", i))
		_, err := stream.Next(t.Context())
		if i == 0 {
			must(t, err)
		} else {
			wantError(t, err, ErrBusy, "server busy")
		}
		stream.Close()
		eventually(t, "the stream has ended", func() bool { return worker.Stats().Senders == 0 })
	}
	if stats := worker.Stats(); stats.Requests != 20 || stats.RequestsBusy != 19 {
		t.Errorf("%+v", stats)
	}
	close(release)
	eventually(t, "the handler has returned", func() bool { return worker.sendersLeft() == 0 })
	if got, err := read(t, request(t, gateway, "busy", "quick")); len(got) > 0 || err != nil {
		t.Error(got, err)
	}
}

func TestSendRefusesTooLargeAndReservedPayloads(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), rawClient(t, s)
	largest := strings.Repeat("x", 1<<20-64)
	serve(t, worker, "payload", func(ctx context.Context, req *Request, s *Sender) error {
		wantError(t, s.Send([]byte(largest+"x")), ErrTooLarge, "message of 1048513 bytes is too large: the limit is 1048512")
		for _, reserved := range []string{"__STREAM_END__", "__STREAM_ERROR__", "__STREAM_ERROR__:x"} {
			wantError(t, s.Send([]byte(reserved)), ErrReserved, "payload")
		}
		if s.SendCount() != 0 {
			t.Error("refused sends were counted")
		}
		must(t, s.Send(nil))
		return s.Send([]byte(largest))
	})
	got := readAnswers(t, gateway.request("payload", "payloads", ""))
	if len(got) != 3 || got[0] != "" || got[1] != largest || got[2] != "__STREAM_END__" {
		t.Errorf("got %d messages, the last is %.40q", len(got), got[len(got)-1])
	}
}

// fillBuffer sends until the buffer or the window is full, and returns how many messages were sent.
func fillBuffer(t *testing.T, s *Sender, piece []byte) (sent int) {
	t.Helper()
	for ; ; sent++ {
		err := s.TrySend(piece)
		if errors.Is(err, ErrFull) {
			return sent
		}
		must(t, err)
	}
}

func TestSendBlocksUntilTheBufferHasCapacity(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s, With("send_buffer_bytes", "100000")), rawClient(t, s)
	type job struct {
		ctx context.Context
		*Sender
	}
	jobs := make(chan job)
	serving := serve(t, worker, "capacity", func(ctx context.Context, req *Request, s *Sender) error {
		s.Detach()
		jobs <- job{ctx, s}
		return nil
	})
	piece := make([]byte, 50000)
	const waiters = 8
	// begin makes a stream whose buffer is full, and goroutines whose sends are blocked.
	begin := func(send func(*Sender) error) (j job, from <-chan rawMessage, resume func(), sent int, results chan error) {
		from = gateway.request("capacity", "client", "")
		j = receive(t, jobs)
		resume = s.pause(t)
		sent = fillBuffer(t, j.Sender, piece)
		results = make(chan error, waiters)
		for range waiters {
			go func() { results <- send(j.Sender) }()
		}
		return
	}

	j, from, resume, sent, results := begin(func(s *Sender) error { return s.Send(piece) })
	resume()
	for range waiters {
		must(t, receive(t, results))
	}
	must(t, j.End())
	if got := readAnswers(t, from); len(got) != sent+waiters+1 || j.SendCount() != uint64(sent+waiters) {
		t.Errorf("sent %d and %d, counted %d, got %d", sent, waiters, j.SendCount(), len(got)-1)
	}

	// Some more sends may succeed, but not without limit.
	untilError := func(s *Sender) error {
		for {
			if err := s.Send(piece); err != nil {
				return err
			}
		}
	}
	for name, stop := range map[string]struct {
		stop func()
		why  Status
	}{
		"the client leaves":         {func() { MarkClientOffline("client") }, ErrOffline},
		"another goroutine ends it": {func() { j.End() }, ErrClosed},
	} {
		j, _, resume, _, results = begin(untilError)
		stop.stop()
		for range waiters {
			if err := receive(t, results); !errors.Is(err, stop.why) {
				t.Errorf("%s: %v", name, err)
			}
		}
		resume()
	}
	j, _, resume, _, results = begin(untilError)
	serving.stop()
	for range waiters {
		wantError(t, receive(t, results), ErrCancelled, "context canceled")
	}
	resume()
	must(t, receive(t, serving.result))
}

func TestConcurrentSendsAndEnd(t *testing.T) {
	s := startServer(t)
	// A small buffer, because the raw client reads slowly what was sent before the end.
	worker, gateway := connect(t, s, SendBuffer(256<<10)), rawClient(t, s)
	jobs := make(chan *Sender)
	serve(t, worker, "race", func(ctx context.Context, req *Request, s *Sender) error {
		s.Detach()
		jobs <- s
		return nil
	})
	for round, end := range []func(*Sender){
		func(s *Sender) { s.End() },
		func(s *Sender) { s.SendError(errors.New("enough")) },
		func(s *Sender) { MarkClientOffline("racer") },
		func(s *Sender) { gateway.publish("client.offline", "", "", "racer") },
	} {
		from := gateway.request("race", "racer", "")
		sender := receive(t, jobs)
		var begun, over sync.WaitGroup
		for range 8 {
			begun.Add(1)
			over.Add(1)
			go func() {
				defer over.Done()
				for n := 0; ; n++ {
					if n == 10 {
						begun.Done()
					}
					if err := sender.Send([]byte("x")); err != nil {
						if !errors.Is(err, ErrClosed) && !errors.Is(err, ErrOffline) || n < 10 {
							t.Error(round, n, err)
						}
						break
					}
				}
				// Calls after the end, some of them after the C sender is freed.
				sender.Send(nil)
				sender.Err()
				sender.End()
				sender.SendError(nil)
				if !sender.IsClosed() {
					t.Error("the sender is open after its end")
				}
			}()
		}
		begun.Wait()
		end(sender)
		over.Wait()
		got := readAnswers(t, from)
		if uint64(len(got)-1) != sender.SendCount() {
			t.Errorf("round %d: %d sent, %d received", round, sender.SendCount(), len(got)-1)
		}
		gateway.flush()
		if len(from) > 0 {
			t.Errorf("round %d: %q after the end", round, (<-from).data)
		}
	}
	eventually(t, "all senders are freed", func() bool { return worker.sendersLeft() == 0 })
}

func TestLostConnectionEndsLevel0Streams(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	causes := make(chan error, 1)
	serve(t, worker, "lost", func(ctx context.Context, req *Request, s *Sender) error {
		if err := s.Send([]byte("answer")); err != nil || req.ClientID == "quick" {
			return err
		}
		causes <- waitForEnd(t, ctx)
		return nil
	})
	// A raw requester, because the end of a stream in this process would stop the sender first.
	receive(t, rawClient(t, s).request("lost", "client", ""))
	unanswered := rawClient(t, s).subscribe("unanswered")
	stream := request(t, gateway, "unanswered", "gateway's client")
	receive(t, unanswered)
	s.kill()
	wantError(t, receive(t, causes), ErrDisconnected, `"client"`)
	_, err := read(t, stream)
	wantError(t, err, ErrDisconnected, "")
	worker.events.wait(t, Disconnected, "")
	gateway.events.wait(t, Disconnected, "")
	_, err = gateway.Request(t.Context(), "lost", nil, "")
	wantError(t, err, ErrDisconnected, "")

	startServer(t, "-p", s.port)
	worker.events.wait(t, Connected, "")
	gateway.events.wait(t, Connected, "")
	got, err := read(t, request(t, gateway, "lost", "quick", With("retries", "1000"), With("retry_delay_ms", "10")))
	if err != nil || fmt.Sprint(got) != "[answer]" {
		t.Error(got, err)
	}
	if stats := worker.Stats(); stats.Connects != 2 {
		t.Errorf("%+v", stats)
	}
}

func TestServeEndsWhenTheConnectionIsGivenUp(t *testing.T) {
	s := startServer(t)
	c := connect(t, s, With("max_reconnects", "1"), With("reconnect_min_ms", "1"))
	serving := serve(t, c, "given.up", func(context.Context, *Request, *Sender) error { return nil })
	s.kill()
	wantError(t, receive(t, serving.result), ErrDisconnected, "given up")
	wantError(t, closeConn(c.Conn), ErrClosed, "connection")
	receive(t, c.drained)
}

func TestServeRefusesInvalidInput(t *testing.T) {
	s := startServer(t)
	c := connect(t, s)
	none := func(context.Context, *Request, *Sender) error { return nil }
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
	defer cancel()
	for _, bad := range []struct {
		subject, queue string
		handler        Handler
		opts           []ServeOption
		named          string
	}{
		{subject: "", named: "subject"},
		{subject: "a b", named: `"a b"`},
		{subject: "a\r\nb", named: "subject"},
		{subject: "a\x00b", named: "subject"},
		{subject: "a\xff", named: "subject"},
		{subject: "a..b", named: `"a..b"`},
		{subject: "a.>.b", named: `"a.>.b"`},
		{subject: "a", queue: "b c", named: `"b c"`},
		{subject: "a", queue: "b\x00", named: "queue"},
		{subject: "a", opts: []ServeOption{With("max_streams", "many")}, named: `"many"`},
		{subject: "a", opts: []ServeOption{With("max_streams", "-1")}, named: `"-1"`},
		{subject: "a", opts: []ServeOption{With("max_streams", "")}, named: `""`},
		{subject: "a", opts: []ServeOption{With("drain_ms", "1s")}, named: "drain_ms"},
		{subject: "a", opts: []ServeOption{With("stop_timeout_ms", "1s")}, named: "stop_timeout_ms"},
		{subject: "a", opts: []ServeOption{With("detached", "yes")}, named: `"yes"`},
		{subject: "a", opts: []ServeOption{With("timeout_ms", "1")}, named: `"timeout_ms"`},
	} {
		if err := c.Serve(ctx, bad.subject, bad.queue, none, bad.opts...); err == nil {
			t.Errorf("%+v is served", bad)
		} else {
			wantError(t, err, ErrInvalid, bad.named)
		}
	}
	wantError(t, c.Serve(ctx, "a", "", nil), ErrInvalid, "handler")
	if len(c.services) != 0 || ctx.Err() != nil {
		t.Error("a service is left, or the context ended")
	}
}

func TestSendAndIsClosedDoNotAllocate(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), rawClient(t, s)
	serve(t, worker, "cheap", func(ctx context.Context, req *Request, s *Sender) error {
		data := []byte("x")
		if n := minAllocs(func() { s.Send(data) }); n != 0 {
			t.Errorf("Send allocates %v times", n)
		}
		if n := minAllocs(func() { s.IsClosed() }); n != 0 {
			t.Errorf("IsClosed allocates %v times", n)
		}
		return nil
	})
	readAnswers(t, gateway.request("cheap", "cheap", ""))
}

// minAllocs returns how many times call allocates. AllocsPerRun counts the allocations of all goroutines, and the
// gateway of this test allocates for each message that it receives. So the result is the minimum of many short rounds.
func minAllocs(call func()) float64 {
	least := testing.AllocsPerRun(10, call)
	for round := 1; round < 100 && least != 0; round++ {
		least = min(least, testing.AllocsPerRun(10, call))
	}
	return least
}
