package message

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
)

// Each of 1,000 streams at once is complete, in order, and ends in its own way. Afterwards nothing is left.
func TestThousandStreamsAtOnceLeaveNothing(t *testing.T) {
	const streams, messages = 1000, 20
	s := startServer(t, "")
	before := runtime.NumGoroutine()
	worker := newSubscriber(t, s, SubscriberConfig{MaxStreamJobs: streams})
	pool, err := New(Config{Servers: []string{s.url}})
	must(t, err)
	var all sync.WaitGroup
	all.Add(streams)
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() {
		served <- worker.StreamQueueSubscribeHandler(ctx, "many", "workers",
			func(ctx context.Context, msg *nats.Msg, sender ResponseSender) error {
				all.Done()
				go func() {
					all.Wait() // all streams run at once
					for i := range messages {
						if err := sender.Send(fmt.Append(nil, i)); err != nil {
							return
						}
					}
					switch string(msg.Data) {
					case "end":
						sender.End()
					case "error":
						sender.SendError(errors.New("no such model"))
					case "leave":
						<-ctx.Done()
					}
				}()
				return nil
			})
	}()
	eventually(t, "the subject is served", func() bool { return worker.GetMetrics().ActiveSubscriptions == 1 })
	var ended sync.WaitGroup
	for i := range streams {
		ended.Add(1)
		go func() {
			defer ended.Done()
			ctx, leave := context.WithTimeout(t.Context(), 3*testTimeout)
			defer leave()
			kind, id := []string{"end", "error", "leave"}[i%3], fmt.Sprint("many-", i)
			n := 0
			err := pool.StreamRequestWithClient(ctx, "many", []byte(kind), id, func(m *nats.Msg) bool {
				if n < messages && string(m.Data) != fmt.Sprint(n) {
					t.Errorf("message %d is %q", n, m.Data)
				}
				if n++; n == messages && kind == "leave" {
					leave()
				}
				return true
			})
			switch {
			case kind == "end" && err == nil, kind == "leave" && err == context.Canceled:
			case kind == "error" && err != nil && err.Error() == "流式响应错误: no such model":
			default:
				t.Errorf("%s: %v", kind, err)
			}
			if n < messages {
				t.Errorf("%s: %d messages", kind, n)
			}
		}()
	}
	ended.Wait()
	for i := range streams {
		id := fmt.Sprint("many-", i)
		eventually(t, id+" is not online any more", func() bool { return !IsClientOnline(id) })
	}
	eventually(t, "no stream runs", func() bool { return worker.streams.Load() == 0 })
	stop()
	if err := receive(t, served); err != context.Canceled {
		t.Error(err)
	}
	pool.Close()
	closing, cancel := context.WithTimeout(t.Context(), testTimeout)
	defer cancel()
	must(t, worker.Close(closing))
	leaked := func() bool { return runtime.NumGoroutine() > before }
	for end := time.Now().Add(testTimeout); leaked() && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	if leaked() {
		stacks := make([]byte, 1<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		t.Fatalf("%d goroutines before, %d after:\n%s", before, runtime.NumGoroutine(), stacks)
	}
}

// A Send that waits for a slow reader ends when the client leaves, also while the response function blocks.
func TestBlockedSendEndsWhenTheClientLeaves(t *testing.T) {
	s := startServer(t, "")
	worker, pool := newSubscriber(t, s, SubscriberConfig{}), newPool(t, s)
	sent, stopped := make(chan struct{}, 1<<16), make(chan error, 1)
	serve(t, worker, "blocked", func(ctx context.Context, msg *nats.Msg, sender ResponseSender) error {
		for {
			if err := sender.Send(make([]byte, 10_000)); err != nil {
				stopped <- err
				return err
			}
			sent <- struct{}{}
		}
	})
	id := newID(t)
	ctx, leave := context.WithCancel(t.Context())
	release, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- pool.StreamRequestWithClient(ctx, "blocked", nil, id, func(*nats.Msg) bool {
			<-release
			return true
		})
	}()
	receive(t, sent)
	// The window is full when nothing is sent any more.
	for before := -1; before != len(sent); time.Sleep(100 * time.Millisecond) {
		before = len(sent)
	}
	leave()
	wantText(t, receive(t, stopped), "客户端已离线: "+id)
	close(release)
	if err := receive(t, ended); err != context.Canceled {
		t.Error(err)
	}
}

// A slow response function slows its own worker down, and loses nothing.
func TestSlowReaderLosesNothing(t *testing.T) {
	const messages, size = 300, 10_000 // several windows
	s := startServer(t, "")
	worker, pool := newSubscriber(t, s, SubscriberConfig{}), newPool(t, s)
	sent := make(chan struct{}, messages)
	serve(t, worker, "slow", func(ctx context.Context, msg *nats.Msg, sender ResponseSender) error {
		for i := range messages {
			if err := sender.Send(append(make([]byte, size), byte(i))); err != nil {
				return err
			}
			sent <- struct{}{}
		}
		return sender.End()
	})
	n := 0
	must(t, pool.StreamRequest(t.Context(), "slow", nil, func(m *nats.Msg) bool {
		if n == 0 {
			for range 20 { // the worker is ahead
				receive(t, sent)
			}
			time.Sleep(50 * time.Millisecond)
			if len(sent) > 200 {
				t.Errorf("the worker is %d messages ahead", len(sent))
			}
		}
		if n < messages && m.Data[size] != byte(n) {
			t.Fatalf("message %d is %d", n, m.Data[size])
		}
		n++
		return true
	}))
	if n != messages+1 {
		t.Errorf("%d messages", n)
	}
}
