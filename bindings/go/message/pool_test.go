package message

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	presence "github.com/nats-presence/nats-presence/bindings/go"
)

// answer sends the messages of a stream as a worker without nats-presence does.
func answer(request *nats.Msg, messages ...string) {
	for _, message := range messages {
		request.Respond([]byte(message))
	}
}

func TestResponseFunctionGetsTheMarkers(t *testing.T) {
	s := startServer(t, "")
	own, peer, pool := newSubscriber(t, s, SubscriberConfig{}), plain(t, s), newPool(t, s)
	serve(t, own, "own", func(ctx context.Context, msg *nats.Msg, sender ResponseSender) error {
		sender.Send([]byte("a"))
		sender.Send(nil)
		if string(msg.Data) == "fail" {
			return errors.New("no such model")
		}
		return sender.End()
	})
	plainServe(t, peer, "plain", func(request *nats.Msg) {
		answer(request, "a", "")
		if string(request.Data) == "fail" {
			answer(request, errorMarker+"no such model", "late")
		} else {
			answer(request, endMarker, "late")
		}
	})
	for _, subject := range []string{"own", "plain"} {
		for name, call := range map[string]func(data string, f func(*nats.Msg) bool) error{
			"StreamRequest": func(data string, f func(*nats.Msg) bool) error {
				return pool.StreamRequest(t.Context(), subject, []byte(data), f)
			},
			"WithTimeout": func(data string, f func(*nats.Msg) bool) error {
				return pool.StreamRequestWithTimeout(t.Context(), subject, []byte(data), testTimeout, testTimeout, f)
			},
			"WithClient": func(data string, f func(*nats.Msg) bool) error {
				return pool.StreamRequestWithClient(t.Context(), subject, []byte(data), newID(t), f)
			},
			"WithRetry": func(data string, f func(*nats.Msg) bool) error {
				return pool.StreamRequestWithRetry(t.Context(), subject, []byte(data), 0, 0, f)
			},
		} {
			t.Run(subject+" "+name, func(t *testing.T) {
				var got texts
				must(t, call("", got.add))
				got.want(t, "a", "", endMarker)
				got = nil
				err, text := call("fail", got.add), "流式响应错误: no such model"
				if name == "WithRetry" {
					text = "流式请求重试失败，最大重试次数=0, 最后错误: " + text
				}
				wantText(t, err, text, presence.ErrRemote)
				got.want(t, "a", "", errorMarker+"no such model")
			})
		}
	}
}

func TestFalseEndsTheCallAndStopsTheWorker(t *testing.T) {
	s := startServer(t, "")
	worker, pool := newSubscriber(t, s, SubscriberConfig{}), newPool(t, s)
	stopped := make(chan error, 1)
	serve(t, worker, "false", func(ctx context.Context, msg *nats.Msg, sender ResponseSender) error {
		for i := 0; ; i++ {
			if err := sender.Send(fmt.Append(nil, i)); err != nil {
				stopped <- err
				return err
			}
		}
	})
	var got texts
	must(t, pool.StreamRequestWithClient(t.Context(), "false", nil, "false-client", func(m *nats.Msg) bool {
		got.add(m)
		return len(got) < 3
	}))
	got.want(t, "0", "1", "2")
	wantText(t, receive(t, stopped), "客户端已离线: false-client", presence.ErrCancelled)
	// A panic of the function stops it as well.
	func() {
		defer func() { recover() }()
		pool.StreamRequest(t.Context(), "false", nil, func(*nats.Msg) bool { panic("oh") })
	}()
	wantCause(t, receive(t, stopped), presence.ErrCancelled)
}

// The client leaves at each moment of a request. The call returns the context's error, the client is offline, an
// announcement is made, and the response function is not called any more.
func TestClientLeavesAtEachMoment(t *testing.T) {
	s := startServer(t, "")
	own, peer, pool := newSubscriber(t, s, SubscriberConfig{}), plain(t, s), newPool(t, s)
	announced, err := peer.SubscribeSync("client.offline")
	must(t, err)
	jobs := serveJobs(t, own, "own")
	requests := make(chan *nats.Msg, 16)
	plainServe(t, peer, "plain", func(request *nats.Msg) { requests <- request })
	// next returns a function that sends a message of the next stream.
	next := map[string]func() func(string){
		"own": func() func(string) {
			sender := receive(t, jobs).sender
			return func(text string) { sender.Send([]byte(text)) }
		},
		"plain": func() func(string) {
			request := receive(t, requests)
			return func(text string) { answer(request, text) }
		},
	}
	for _, subject := range []string{"own", "plain"} {
		for _, moment := range []string{"before", "unanswered", "waiting", "in the function", "unread"} {
			t.Run(subject+" "+moment, func(t *testing.T) {
				id := newID(t)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if moment == "before" {
					cancel()
				}
				var mu sync.Mutex
				var got texts
				entered, leave := make(chan struct{}, 1), make(chan struct{})
				ended := make(chan error, 1)
				go func() {
					ended <- pool.StreamRequestWithClient(ctx, subject, nil, id, func(m *nats.Msg) bool {
						mu.Lock()
						got.add(m)
						mu.Unlock()
						entered <- struct{}{}
						if moment == "in the function" || moment == "unread" {
							<-leave
						}
						return true
					})
				}()
				if moment != "before" {
					send := next[subject]()
					if moment != "unanswered" {
						send("first")
						receive(t, entered)
					}
					if moment == "unread" {
						send("second")
						send("third")
					}
					cancel()
					if moment == "in the function" || moment == "unread" {
						// The mark does not wait for the function.
						eventually(t, "the client is offline", func() bool { return !IsClientOnline(id) })
						close(leave)
					}
					send("late")
				}
				if err := receive(t, ended); err != context.Canceled {
					t.Error(err)
				}
				if IsClientOnline(id) {
					t.Error("the client is online")
				}
				if text := nextText(t, announced); text != id {
					t.Errorf("announced: %q", text)
				}
				mu.Lock()
				defer mu.Unlock()
				if want := map[string]int{"before": 0, "unanswered": 0}; moment == "before" || moment == "unanswered" {
					if len(got) != want[moment] {
						t.Errorf("messages %q", got)
					}
				} else {
					got.want(t, "first")
				}
			})
		}
	}
	if msg, err := announced.NextMsg(50 * time.Millisecond); err == nil {
		t.Errorf("%q was announced twice", msg.Data)
	}
}

func TestContextEndsARequestWithoutAClient(t *testing.T) {
	s := startServer(t, "")
	worker, pool := newSubscriber(t, s, SubscriberConfig{}), newPool(t, s)
	jobs := serveJobs(t, worker, "ctx")
	for name, call := range map[string]func(ctx context.Context, f func(*nats.Msg) bool) error{
		"StreamRequest": func(ctx context.Context, f func(*nats.Msg) bool) error {
			return pool.StreamRequest(ctx, "ctx", nil, f)
		},
		"WithRetry": func(ctx context.Context, f func(*nats.Msg) bool) error {
			return pool.StreamRequestWithRetry(ctx, "ctx", nil, 5, time.Hour, f)
		},
		"WithTimeout": func(ctx context.Context, f func(*nats.Msg) bool) error {
			return pool.StreamRequestWithTimeout(ctx, "ctx", nil, time.Hour, time.Hour, f)
		},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() { ended <- call(ctx, func(*nats.Msg) bool { return true }) }()
			j := receive(t, jobs)
			must(t, j.sender.Send([]byte("x")))
			cancel()
			if err := receive(t, ended); err != context.Canceled {
				t.Error(err)
			}
			receive(t, j.ctx.Done())
			wantCause(t, context.Cause(j.ctx), presence.ErrCancelled)
		})
	}
	limit, f := 20*time.Millisecond, func(*nats.Msg) bool { return true }
	err := pool.StreamRequestWithTimeout(t.Context(), "ctx", nil, time.Hour, limit, f)
	if err != context.DeadlineExceeded {
		t.Error(err)
	}
}

func TestClientThatIsMarkedOfflineEndsItsRequests(t *testing.T) {
	s := startServer(t, "")
	worker, pool, peer := newSubscriber(t, s, SubscriberConfig{}), newPool(t, s), plain(t, s)
	announced, err := peer.SubscribeSync("client.offline")
	must(t, err)
	must(t, peer.Flush())
	jobs := serveJobs(t, worker, "marked")
	id := newID(t)
	MarkClientOnline(id)
	var got texts
	ended := make(chan error, 1)
	go func() { ended <- pool.StreamRequestWithClient(t.Context(), "marked", nil, id, got.add) }()
	j := receive(t, jobs)
	MarkClientOffline(id)
	wantText(t, receive(t, ended), "流式响应错误: 客户端已离线: "+id, presence.ErrOffline)
	got.want(t, errorMarker+"客户端已离线: "+id)
	receive(t, j.ctx.Done())
	wantText(t, j.sender.Send(nil), "客户端已离线: "+id, presence.ErrOffline)
	texts{nextText(t, announced)}.want(t, id) // so that workers in other processes stop
	if msg, err := announced.NextMsg(50 * time.Millisecond); err == nil {
		t.Errorf("%q was announced twice", msg.Data)
	}
}

func TestRequestsAreRetriedFromTheStart(t *testing.T) {
	s := startServer(t, "")
	worker, pool := newSubscriber(t, s, SubscriberConfig{}), newPool(t, s)
	attempts := 0
	serve(t, worker, "retry", func(ctx context.Context, msg *nats.Msg, sender ResponseSender) error {
		attempts++
		sender.Send(fmt.Append(nil, attempts))
		if attempts < 3 {
			return errors.New("not yet")
		}
		return sender.End()
	})
	var got texts
	must(t, pool.StreamRequestWithRetry(t.Context(), "retry", nil, 5, time.Millisecond, got.add))
	got.want(t, "1", errorMarker+"not yet", "2", errorMarker+"not yet", "3", endMarker)
	attempts = -10
	wantText(t, pool.StreamRequestWithRetry(t.Context(), "retry", nil, 2, time.Millisecond, got.add),
		"流式请求重试失败，最大重试次数=2, 最后错误: 流式响应错误: not yet", presence.ErrRemote)
	if attempts != -7 {
		t.Errorf("%d attempts", attempts+10)
	}
	// False is no error.
	attempts = -10
	must(t, pool.StreamRequestWithRetry(t.Context(), "retry", nil, 2, 0, func(*nats.Msg) bool { return false }))
	// The end of the context is not retried, nor waited for.
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	err := pool.StreamRequestWithRetry(ctx, "nobody", nil, 2, time.Hour, func(*nats.Msg) bool { return true })
	if err != context.DeadlineExceeded {
		t.Error(err)
	}
}

func TestNobodyServes(t *testing.T) {
	s := startServer(t, "")
	pool := newPool(t, s)
	err := pool.StreamRequest(t.Context(), "nobody", nil, func(m *nats.Msg) bool {
		t.Errorf("message %q", m.Data)
		return true
	})
	wantCause(t, err, nats.ErrNoResponders, presence.ErrNoResponders)
	err = pool.StreamRequest(t.Context(), "nobody", make([]byte, 2<<20), func(*nats.Msg) bool { return true })
	wantCause(t, err, nats.ErrMaxPayload, presence.ErrTooLarge)
}

func TestPoolIsMadeWithoutAServer(t *testing.T) {
	s := startServer(t, "")
	s.kill()
	config := Config{Servers: []string{s.url}, BackoffMin: time.Millisecond, AcquireTimeout: 300 * time.Millisecond}
	pool, err := New(config)
	must(t, err)
	defer pool.Close()
	if _, err := pool.Get(t.Context()); err == nil {
		t.Error("a connection without a server")
	}
	if m := pool.GetMetrics(); m.FailedDials != 4 || m.RetryAttempts != 3 || m.TotalConnections != 0 {
		t.Errorf("metrics %+v", m)
	}
	f := func(*nats.Msg) bool { return true }
	err = pool.StreamRequest(t.Context(), "later", nil, f)
	wantCause(t, err, presence.ErrDisconnected)
	if err == nil || len(err.Error()) < len(unavailableText) || err.Error()[:len(unavailableText)] != unavailableText {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := pool.StreamRequest(ctx, "later", nil, f); err != context.DeadlineExceeded {
		t.Error(err)
	}
	limit := 20 * time.Millisecond // of the wait for a connection
	err = pool.StreamRequestWithTimeout(t.Context(), "later", nil, limit, time.Hour, f)
	wantCause(t, err, presence.ErrDisconnected)
	// A request waits for a server that starts.
	pool.streams.limit = testTimeout
	var got texts
	ended := make(chan error, 1)
	go func() {
		ended <- pool.StreamRequestWithRetry(t.Context(), "later", nil, 1<<20, time.Millisecond, got.add)
	}()
	again := startServer(t, s.port)
	worker := newSubscriber(t, again, SubscriberConfig{})
	serve(t, worker, "later", func(ctx context.Context, msg *nats.Msg, sender ResponseSender) error {
		return sender.End()
	})
	must(t, receive(t, ended))
	got.want(t, endMarker)
}

func TestClosedPoolRefusesEverything(t *testing.T) {
	s := startServer(t, "")
	worker, pool := newSubscriber(t, s, SubscriberConfig{}), newPool(t, s)
	jobs := serveJobs(t, worker, "close")
	ended := make(chan error, 1)
	go func() { ended <- pool.StreamRequest(t.Context(), "close", nil, func(*nats.Msg) bool { return true }) }()
	j := receive(t, jobs)
	borrowed, err := pool.Get(t.Context())
	must(t, err)
	pool.Close()
	pool.Close()
	wantText(t, receive(t, ended), "natspool: 已关闭")
	receive(t, j.ctx.Done())
	if !borrowed.IsClosed() {
		t.Error("the borrowed connection is open")
	}
	pool.Put(borrowed)
	message := &nats.Msg{Subject: "x"}
	f := func(*nats.Msg) bool { return true }
	_, getErr := pool.Get(t.Context())
	_, requestErr := pool.Request(t.Context(), "x", nil)
	_, requestMsgErr := pool.RequestMsg(t.Context(), message)
	_, requestAnyErr := pool.RequestAny(t.Context(), "x", 1)
	for name, err := range map[string]error{
		"Get": getErr, "Request": requestErr, "RequestMsg": requestMsgErr, "RequestAny": requestAnyErr,
		"Publish":                  pool.Publish(t.Context(), "x", nil),
		"PublishMsg":               pool.PublishMsg(t.Context(), message),
		"PublishAny":               pool.PublishAny(t.Context(), "x", 1),
		"StreamRequest":            pool.StreamRequest(t.Context(), "x", nil, f),
		"StreamRequestWithTimeout": pool.StreamRequestWithTimeout(t.Context(), "x", nil, 1, time.Hour, f),
		"StreamRequestWithRetry":   pool.StreamRequestWithRetry(t.Context(), "x", nil, 1000, time.Hour, f),
		"StreamRequestWithClient":  pool.StreamRequestWithClient(t.Context(), "x", nil, "x", f),
	} {
		t.Run(name, func(t *testing.T) { wantText(t, err, "natspool: 已关闭") })
	}
	if m := pool.GetMetrics(); m.TotalConnections != 0 || m.SuccessfulDials != 1 {
		t.Errorf("metrics %+v", m)
	}
}

func TestConnectionsAreReused(t *testing.T) {
	s := startServer(t, "")
	pool, err := New(Config{Servers: []string{s.url}, IdlePerServer: 1, MaxConnections: 2, LeakTimeout: time.Hour})
	must(t, err)
	defer pool.Close()
	check := func(total, idle, borrowed int64) {
		t.Helper()
		m := pool.GetMetrics()
		if m.TotalConnections != total || m.IdleConnections != idle || m.BorrowedConnections != borrowed {
			t.Errorf("metrics %+v, want %d, %d, %d", m, total, idle, borrowed)
		}
	}
	first, err := pool.Get(t.Context())
	must(t, err)
	second, err := pool.Get(t.Context())
	must(t, err)
	check(2, 0, 2)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := pool.Get(ctx); err != context.DeadlineExceeded {
		t.Error("beyond MaxConnections: ", err)
	}
	// One that waits gets the connection that is returned next.
	waited := make(chan *nats.Conn, 1)
	go func() {
		conn, err := pool.Get(context.Background())
		if err != nil {
			t.Error(err)
		}
		waited <- conn
	}()
	pool.Put(first)
	if receive(t, waited) != first {
		t.Error("another connection was made")
	}
	pool.Put(first)
	pool.Put(first)
	pool.Put(nil)
	pool.Put(second) // one too many
	check(1, 1, 0)
	if !second.IsClosed() {
		t.Error("more idle connections than IdlePerServer")
	}
	again, err := pool.Get(t.Context())
	must(t, err)
	if again != first {
		t.Error("the idle connection was not reused")
	}
	again.Close()
	pool.Put(again)
	check(0, 0, 0)
	// A connection that is never returned makes place after LeakTimeout.
	for range 2 {
		_, err := pool.Get(t.Context())
		must(t, err)
	}
	pool.cfg.LeakTimeout = time.Nanosecond
	_, err = pool.Get(t.Context())
	must(t, err)
	if m := pool.GetMetrics(); m.ConnectionLeaks != 2 || m.TotalConnections != 1 {
		t.Errorf("metrics %+v", m)
	}
}

func TestOldConnectionsAreNotReused(t *testing.T) {
	s := startServer(t, "")
	pool, err := New(Config{Servers: []string{s.url}, MaxLife: time.Nanosecond})
	must(t, err)
	defer pool.Close()
	conn, err := pool.Get(t.Context())
	must(t, err)
	pool.Put(conn)
	if m := pool.GetMetrics(); !conn.IsClosed() || m.TotalConnections != 0 {
		t.Errorf("metrics %+v", m)
	}
}

// A server that does not answer does not keep a caller that leaves.
func TestGetEndsWithItsContext(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer silent.Close()
	pool, err := New(Config{Servers: []string{"nats://" + silent.Addr().String()}, DialTimeout: time.Second})
	must(t, err)
	defer pool.Close()
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(20*time.Millisecond, cancel)
	if _, err := pool.Get(ctx); err != context.Canceled {
		t.Error(err)
	}
}

func TestPlainMessagesAndRequests(t *testing.T) {
	s := startServer(t, "")
	pool, peer := newPool(t, s), plain(t, s)
	received, err := peer.SubscribeSync("messages")
	must(t, err)
	plainServe(t, peer, "requests", func(m *nats.Msg) {
		answer := nats.NewMsg(m.Reply)
		answer.Data, answer.Header = m.Data, m.Header
		peer.PublishMsg(answer)
	})
	value := map[string]int{"a": 1}
	text, _ := json.Marshal(value)
	message := func(subject string) *nats.Msg {
		return &nats.Msg{Subject: subject, Data: []byte("x"), Header: nats.Header{"K": {"v"}}}
	}
	must(t, pool.Publish(t.Context(), "messages", []byte("bytes")))
	must(t, pool.PublishAny(t.Context(), "messages", value))
	must(t, pool.PublishMsg(t.Context(), message("messages")))
	texts{nextText(t, received), nextText(t, received)}.want(t, "bytes", string(text))
	if msg, err := received.NextMsg(testTimeout); err != nil || msg.Header.Get("K") != "v" || string(msg.Data) != "x" {
		t.Error(msg, err)
	}
	got, err := pool.Request(t.Context(), "requests", []byte("bytes"))
	must(t, err)
	texts{string(got.Data)}.want(t, "bytes")
	got, err = pool.RequestAny(t.Context(), "requests", value)
	must(t, err)
	texts{string(got.Data)}.want(t, string(text))
	got, err = pool.RequestMsg(t.Context(), message("requests"))
	must(t, err)
	if got.Header.Get("K") != "v" || string(got.Data) != "x" {
		t.Error(got)
	}
	if _, err := pool.Request(t.Context(), "nobody", nil); !errors.Is(err, nats.ErrNoResponders) {
		t.Error(err)
	}
	if err := pool.PublishAny(t.Context(), "messages", func() {}); err == nil {
		t.Error("a function is no JSON")
	}
	if _, err := pool.RequestAny(t.Context(), "requests", func() {}); err == nil {
		t.Error("a function is no JSON")
	}
	if m := pool.GetMetrics(); m.SuccessfulDials != 1 || m.IdleConnections != 1 {
		t.Errorf("metrics %+v", m)
	}
}
