package message

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	presence "github.com/nats-presence/nats-presence/bindings/go"
)

// job is a call of a handler.
type job struct {
	ctx    context.Context
	msg    *nats.Msg
	sender ResponseSender
}

// serveJobs serves a subject with a handler that returns nil at once.
func serveJobs(t testing.TB, s *Subscriber, subject string) <-chan job {
	t.Helper()
	jobs := make(chan job, 1024)
	serve(t, s, subject, func(ctx context.Context, msg *nats.Msg, sender ResponseSender) error {
		jobs <- job{ctx, msg, sender}
		return nil
	})
	return jobs
}

// A peer that speaks the plain protocol sees each end of a stream as it is on level 0 of the wire.
func TestPlainGatewaySeesTheEndOfEachStream(t *testing.T) {
	s := startServer(t, "")
	worker, gateway := newSubscriber(t, s, SubscriberConfig{}), plain(t, s)
	serve(t, worker, "ends.*", func(ctx context.Context, msg *nats.Msg, sender ResponseSender) error {
		if err := sender.Send(msg.Data); err != nil {
			t.Error(err)
		}
		switch string(msg.Data) {
		case "end":
			return sender.End()
		case "error":
			return errors.New("no such model")
		case "send error":
			return sender.SendError(errors.New("sent text"))
		case "panic":
			panic("password=hunter2")
		case "goexit":
			runtime.Goexit()
		}
		return nil
	})
	for data, end := range map[string]string{
		"end":        "__STREAM_END__",
		"error":      "__STREAM_ERROR__:no such model",
		"send error": "__STREAM_ERROR__:sent text",
		"panic":      "__STREAM_ERROR__:服务器内部错误",
		"goexit":     "__STREAM_ERROR__:the handler failed",
	} {
		answers := plainRequest(t, gateway, "ends.x", newID(t), data)
		texts{nextText(t, answers), nextText(t, answers)}.want(t, data, end)
	}
}

func TestHandlerGetsTheWholeRequest(t *testing.T) {
	s := startServer(t, "")
	worker, gateway, pool := newSubscriber(t, s, SubscriberConfig{}), plain(t, s), newPool(t, s)
	jobs := serveJobs(t, worker, "whole.*")
	must(t, gateway.Publish("whole.x", []byte("without a reply subject"))) // is ignored
	id := newID(t)
	answers := plainRequest(t, gateway, "whole.x", id, "data")
	j := receive(t, jobs)
	want := nats.Header{"X-Test": {"a", "b"}, "Connect-ID": {id}}
	if j.msg.Subject != "whole.x" || j.msg.Reply != answers.Subject || string(j.msg.Data) != "data" ||
		!reflect.DeepEqual(j.msg.Header, want) || j.msg.Header.Get("Connect-ID") != id {
		t.Errorf("request %+v", j.msg)
	}
	if j.msg.Sub.Subject != "whole.*" || j.msg.Sub.Queue != "workers" || j.msg.Respond(nil) == nil {
		t.Errorf("subscription %+v", j.msg.Sub)
	}
	must(t, j.sender.End())
	ended := make(chan error, 1)
	go func() { ended <- pool.StreamRequest(t.Context(), "whole.y", nil, func(*nats.Msg) bool { return true }) }()
	j = receive(t, jobs)
	if j.msg.Subject != "whole.y" || len(j.msg.Data) != 0 || j.msg.Header.Get("Connect-ID") != "" || j.msg.Reply == "" {
		t.Errorf("request %+v", j.msg)
	}
	must(t, j.sender.End())
	must(t, receive(t, ended))
}

// lineWriter receives the lines of a log.
type lineWriter chan string

func (w lineWriter) Write(line []byte) (int, error) {
	select {
	case w <- string(line):
	default:
	}
	return len(line), nil
}

func TestOperatorsSeeWhatWasRefusedAndLost(t *testing.T) {
	lines := make(lineWriter, 100)
	log.SetOutput(lines)
	t.Cleanup(func() { log.SetOutput(os.Stderr) })
	wait := func(part string) {
		t.Helper()
		for !strings.Contains(receive(t, lines), part) {
		}
	}
	s := startServer(t, "")
	worker, gateway, pool := newSubscriber(t, s, SubscriberConfig{}), plain(t, s), newPool(t, s)
	serveJobs(t, worker, "logged")
	must(t, gateway.Publish("logged", []byte("without a reply subject")))
	wait("message: log: a request on logged was ignored")
	wantCause(t, pool.StreamRequest(t.Context(), "nobody", nil, nil), nats.ErrNoResponders) // it is connected
	s.kill()
	wait("message: disconnected: ") // of the worker, and of the pool
	wait("message: disconnected: ")
}

func TestStreamStaysOpenAfterItsHandlerHasReturned(t *testing.T) {
	s := startServer(t, "")
	worker, gateway := newSubscriber(t, s, SubscriberConfig{}), plain(t, s)
	jobs := serveJobs(t, worker, "open")
	id := newID(t)
	answers := plainRequest(t, gateway, "open", id, "")
	j := receive(t, jobs)
	if j.sender.IsClosed() || !IsClientOnline(id) || j.ctx.Err() != nil {
		t.Error("the stream is not open")
	}
	for i := range 3 {
		must(t, j.sender.Send(fmt.Append(nil, i)))
	}
	must(t, j.sender.End())
	must(t, j.sender.End())
	wantText(t, j.sender.Send(nil), "sender已关闭", presence.ErrClosed)
	wantText(t, j.sender.SendError(errors.New("late")), "sender已关闭")
	if count := j.sender.(interface{ GetSendCount() int64 }).GetSendCount(); !j.sender.IsClosed() || count != 3 {
		t.Errorf("closed: %v, sent: %d", j.sender.IsClosed(), count)
	}
	got := texts{nextText(t, answers), nextText(t, answers), nextText(t, answers), nextText(t, answers)}
	got.want(t, "0", "1", "2", endMarker)
	receive(t, j.ctx.Done())
	eventually(t, "the client is not online any more", func() bool { return !IsClientOnline(id) })
}

func TestErrorEndsASenderOnce(t *testing.T) {
	s := startServer(t, "")
	worker, gateway := newSubscriber(t, s, SubscriberConfig{}), plain(t, s)
	jobs := serveJobs(t, worker, "error")
	answers := plainRequest(t, gateway, "error", newID(t), "")
	j := receive(t, jobs)
	must(t, j.sender.SendError(nil))
	if !j.sender.IsClosed() {
		t.Error("the sender is not closed")
	}
	wantText(t, j.sender.SendError(errors.New("second")), "sender已关闭")
	must(t, j.sender.End())
	if text := nextText(t, answers); !strings.HasPrefix(text, errorMarker) {
		t.Error(text)
	}
	if msg, err := answers.NextMsg(50 * time.Millisecond); err == nil {
		t.Errorf("%q came after the end", msg.Data)
	}
}

func TestSendFailsOnceTheClientIsOffline(t *testing.T) {
	s := startServer(t, "")
	worker, gateway := newSubscriber(t, s, SubscriberConfig{}), plain(t, s)
	jobs := serveJobs(t, worker, "offline")
	for name, leave := range map[string]func(id string){
		"marked in the worker": MarkClientOffline,
		"announced":            func(id string) { must(t, gateway.Publish("client.offline", []byte(id))) },
	} {
		t.Run(name, func(t *testing.T) {
			id := newID(t)
			answers := plainRequest(t, gateway, "offline", id, "")
			j := receive(t, jobs)
			must(t, j.sender.Send([]byte("before")))
			leave(id)
			receive(t, j.ctx.Done())
			wantCause(t, context.Cause(j.ctx), presence.ErrOffline)
			wantText(t, j.sender.Send([]byte("after")), "客户端已离线: "+id, presence.ErrOffline)
			if j.sender.IsClosed() || IsClientOnline(id) {
				t.Error("the sender is closed, or the client online")
			}
			MarkClientOnline(id) // an ended sender does not revive
			wantText(t, j.sender.Send([]byte("after")), "客户端已离线: "+id)
			MarkClientOffline(id)
			must(t, j.sender.SendError(errors.New("too late")))
			must(t, j.sender.End())
			texts{nextText(t, answers), nextText(t, answers)}.want(t, "before", errorMarker+"the client is offline")
		})
	}
}

func TestOfflineListenerNeedsNoService(t *testing.T) {
	s := startServer(t, "")
	worker, gateway := newSubscriber(t, s, SubscriberConfig{}), plain(t, s)
	must(t, worker.StartClientOfflineListener())
	must(t, worker.StartClientOfflineListener())
	id := newID(t)
	MarkClientOnline(id)
	must(t, gateway.Publish("client.offline", []byte(id)))
	eventually(t, "the client is offline", func() bool { return !IsClientOnline(id) })
}

func TestRequestsBeyondTheLimitAreBusy(t *testing.T) {
	s := startServer(t, "")
	worker, gateway, pool := newSubscriber(t, s, SubscriberConfig{MaxStreamJobs: 2}), plain(t, s), newPool(t, s)
	jobs, others := serveJobs(t, worker, "busy.a"), serveJobs(t, worker, "busy.b")
	plainRequest(t, gateway, "busy.a", "", "")
	plainRequest(t, gateway, "busy.b", "", "") // the limit is the subscriber's
	first, second := receive(t, jobs), receive(t, others)
	for _, subject := range []string{"busy.a", "busy.b"} {
		texts{nextText(t, plainRequest(t, gateway, subject, "", ""))}.want(t, errorMarker+"server busy")
	}
	var got texts
	err := pool.StreamRequest(t.Context(), "busy.a", nil, got.add)
	wantText(t, err, "流式响应错误: server busy", presence.ErrBusy)
	got.want(t, errorMarker+"server busy")
	// The place is free when the reader has the end.
	must(t, second.sender.End())
	for range 100 {
		answers := plainRequest(t, gateway, "busy.a", "", "")
		j := receive(t, jobs)
		must(t, j.sender.End())
		texts{nextText(t, answers)}.want(t, endMarker)
	}
	must(t, first.sender.End())
}

func TestSubscribeHandlerEndsWithItsContext(t *testing.T) {
	s := startServer(t, "")
	worker, gateway := newSubscriber(t, s, SubscriberConfig{}), plain(t, s)
	jobs := make(chan job, 1)
	release := make(chan struct{})
	stop := serve(t, worker, "ctx", func(ctx context.Context, msg *nats.Msg, sender ResponseSender) error {
		jobs <- job{ctx, msg, sender}
		<-release // a handler that ignores its context
		return nil
	})
	answers := plainRequest(t, gateway, "ctx", newID(t), "")
	j := receive(t, jobs)
	must(t, j.sender.Send([]byte("first")))
	wantCause(t, stop(), context.Canceled) // and does not wait for the handler
	receive(t, j.ctx.Done())
	if err := j.sender.Send([]byte("second")); err != context.Canceled {
		t.Error(err)
	}
	if err := j.sender.End(); err != context.Canceled { // what was cut off must not look complete
		t.Error(err)
	}
	texts{nextText(t, answers), nextText(t, answers)}.want(t, "first", errorMarker+"the worker stopped serving")
	// Close waits for it, as long as its context.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := worker.Close(ctx); err != context.Canceled {
		t.Error(err)
	}
	close(release)
	must(t, worker.Close(t.Context()))
	expired, cancel := context.WithTimeout(t.Context(), time.Nanosecond)
	defer cancel()
	<-expired.Done()
	other := newSubscriber(t, s, SubscriberConfig{})
	if err := other.StreamSubscribeHandler(expired, "ctx", func(context.Context, *nats.Msg, ResponseSender) error {
		return nil
	}); err != context.DeadlineExceeded {
		t.Error(err)
	}
}

func TestCloseWaitsForHandlers(t *testing.T) {
	s := startServer(t, "")
	worker, gateway := newSubscriber(t, s, SubscriberConfig{}), plain(t, s)
	jobs, release, served := make(chan job, 2), make(chan struct{}), make(chan error, 1)
	handler := func(ctx context.Context, msg *nats.Msg, sender ResponseSender) error {
		jobs <- job{ctx, msg, sender}
		if string(msg.Data) == "returns" {
			return nil
		}
		<-release
		if err := sender.Send([]byte("last")); err != nil {
			t.Error(err)
		}
		return sender.End()
	}
	go func() { served <- worker.StreamSubscribeHandler(t.Context(), "close", handler) }()
	eventually(t, "the subject is served", func() bool { return worker.GetMetrics().ActiveSubscriptions == 1 })
	plainJob, plainDone := make(chan struct{}, 1), make(chan struct{})
	must(t, worker.Subscribe("close.plain", func(*nats.Msg) {
		plainJob <- struct{}{}
		<-release
		close(plainDone)
	}))
	must(t, worker.Conn.Flush())
	must(t, gateway.Publish("close.plain", nil))
	answers := plainRequest(t, gateway, "close", newID(t), "blocks")
	abandoned := plainRequest(t, gateway, "close", newID(t), "returns")
	receive(t, jobs)
	receive(t, jobs)
	receive(t, plainJob)
	closed := make(chan error, 1)
	go func() { closed <- worker.Close(t.Context()) }()
	eventually(t, "no requests are accepted", func() bool {
		_, err := gateway.Request("close", nil, time.Second)
		return errors.Is(err, nats.ErrNoResponders)
	})
	select {
	case err := <-closed:
		t.Fatal("did not wait: ", err)
	default:
	}
	close(release)
	must(t, receive(t, closed))
	select {
	case <-plainDone:
	default:
		t.Error("did not wait for the handler of a message")
	}
	texts{nextText(t, answers), nextText(t, answers)}.want(t, "last", endMarker)
	texts{nextText(t, abandoned)}.want(t, errorMarker+"the worker stopped serving")
	wantText(t, receive(t, served), "subscriber: closed")
	must(t, worker.Close(t.Context())) // twice
	if !worker.Conn.IsClosed() {
		t.Error("the connection of nats.go is not closed")
	}
}

func TestClosedSubscriberRefusesEverything(t *testing.T) {
	s := startServer(t, "")
	worker := newSubscriber(t, s, SubscriberConfig{})
	must(t, worker.Close(t.Context()))
	message, request := func(*nats.Msg) {}, func(context.Context, *nats.Msg, ResponseSender) error { return nil }
	for name, err := range map[string]error{
		"StreamSubscribeHandler":      worker.StreamSubscribeHandler(t.Context(), "x", request),
		"StreamQueueSubscribeHandler": worker.StreamQueueSubscribeHandler(t.Context(), "x", "q", request),
		"StartClientOfflineListener":  worker.StartClientOfflineListener(),
		"Subscribe":                   worker.Subscribe("x", message),
		"QueueSubscribe":              worker.QueueSubscribe("x", "q", message),
		"SubscribeSync":               worker.SubscribeSync("x", message),
		"QueueSubscribeSync":          worker.QueueSubscribeSync("x", "q", message),
		"SubscribeGo":                 worker.SubscribeGo("x", message),
		"QueueSubscribeGo":            worker.QueueSubscribeGo("x", "q", message),
		"SubscribeAndDrop":            worker.SubscribeAndDrop("x", message),
	} {
		t.Run(name, func(t *testing.T) { wantText(t, err, "subscriber: closed") })
	}
}

func TestSubscriptionHandle(t *testing.T) {
	s := startServer(t, "")
	worker, gateway := newSubscriber(t, s, SubscriberConfig{}), plain(t, s)
	jobs := make(chan job, 1)
	handler := func(ctx context.Context, msg *nats.Msg, sender ResponseSender) error {
		jobs <- job{ctx, msg, sender}
		return nil
	}
	handle, err := worker.serve(t.Context(), "handle", "", handler)
	must(t, err)
	if handle.IsStopped() || handle.Context().Err() != nil {
		t.Error("it is stopped")
	}
	answers := plainRequest(t, gateway, "handle", "", "")
	j := receive(t, jobs)
	must(t, handle.Stop())
	must(t, handle.Stop())
	if !handle.IsStopped() || handle.Context().Err() == nil || worker.GetMetrics().ActiveSubscriptions != 0 {
		t.Error("it is not stopped")
	}
	texts{nextText(t, answers)}.want(t, errorMarker+"the worker stopped serving")
	wantText(t, j.sender.Send(nil), "NATS连接已关闭")
}

func TestSendFailsWithoutAConnection(t *testing.T) {
	s := startServer(t, "")
	worker, gateway := newSubscriber(t, s, SubscriberConfig{}), plain(t, s)
	jobs := serveJobs(t, worker, "lost")
	plainRequest(t, gateway, "lost", "", "")
	j := receive(t, jobs)
	s.kill()
	receive(t, j.ctx.Done())
	wantText(t, j.sender.Send(nil), "NATS连接不可用", presence.ErrDisconnected)
	wantText(t, j.sender.End(), "NATS连接不可用", presence.ErrDisconnected)
}

// Like a subscription of nats.go, a service that is begun without a connection is there after the reconnect.
func TestServiceBegunWithoutAConnection(t *testing.T) {
	s := startServer(t, "")
	worker := newSubscriber(t, s, SubscriberConfig{ReconnectWait: 50 * time.Millisecond})
	s.kill()
	eventually(t, "the connection is lost", func() bool { return !worker.Conn.IsConnected() })
	jobs := serveJobs(t, worker, "later")
	gateway := plain(t, startServer(t, s.port))
	eventually(t, "the subject is served", func() bool {
		plainRequest(t, gateway, "later", "", "")
		select {
		case j := <-jobs:
			return j.sender.End() == nil
		case <-time.After(20 * time.Millisecond):
			return false
		}
	})
}

func TestUnsendableMessagesDoNotEndTheStream(t *testing.T) {
	s := startServer(t, "")
	worker, gateway := newSubscriber(t, s, SubscriberConfig{}), plain(t, s)
	jobs := serveJobs(t, worker, "large")
	answers := plainRequest(t, gateway, "large", "", "")
	j := receive(t, jobs)
	wantCause(t, j.sender.Send(make([]byte, 2<<20)), nats.ErrMaxPayload, presence.ErrTooLarge)
	wantCause(t, j.sender.Send([]byte(endMarker)), presence.ErrReserved)
	must(t, j.sender.Send([]byte("small")))
	must(t, j.sender.End())
	texts{nextText(t, answers), nextText(t, answers)}.want(t, "small", endMarker)
}
