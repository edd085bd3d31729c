package message

import (
	"fmt"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
)

func TestDefaults(t *testing.T) {
	n := runtime.GOMAXPROCS(0) * 32
	want := SubscriberConfig{n, 65_536, 64 << 20, n, 2 * time.Second, -1, 10 * time.Second, 3}
	if got := DefaultSubscriberConfig(); got != want {
		t.Errorf("%+v", got)
	}
	if got := (SubscriberConfig{}).withDefaults(); got != want {
		t.Errorf("%+v", got)
	}
	own := SubscriberConfig{1, 2, 3, 4, 5, 6, 7, 8}
	if got := own.withDefaults(); got != own {
		t.Errorf("%+v", got)
	}
}

func TestServersAreNeeded(t *testing.T) {
	_, err := New(Config{})
	wantText(t, err, "natspool: 至少需要 1 个服务器地址")
	_, err = NewSubscriber(nil)
	wantText(t, err, "natspool: 至少需要 1 个服务器地址")
	s := startServer(t, "")
	s.kill()
	_, err = NewSubscriber([]string{s.url})
	wantCause(t, err, nats.ErrNoServers)
}

// Each subscription calls its handler with each message, and goes on after a panic.
func TestSubscriptionsHandleMessages(t *testing.T) {
	s := startServer(t, "")
	peer := plain(t, s)
	for name, subscribe := range map[string]func(s *Subscriber, h nats.MsgHandler) error{
		"Subscribe":          func(s *Subscriber, h nats.MsgHandler) error { return s.Subscribe("m", h) },
		"QueueSubscribe":     func(s *Subscriber, h nats.MsgHandler) error { return s.QueueSubscribe("m", "q", h) },
		"SubscribeSync":      func(s *Subscriber, h nats.MsgHandler) error { return s.SubscribeSync("m", h) },
		"QueueSubscribeSync": func(s *Subscriber, h nats.MsgHandler) error { return s.QueueSubscribeSync("m", "q", h) },
		"SubscribeGo":        func(s *Subscriber, h nats.MsgHandler) error { return s.SubscribeGo("m", h) },
		"QueueSubscribeGo":   func(s *Subscriber, h nats.MsgHandler) error { return s.QueueSubscribeGo("m", "q", h) },
		"SubscribeAndDrop":   func(s *Subscriber, h nats.MsgHandler) error { return s.SubscribeAndDrop("m", h) },
	} {
		t.Run(name, func(t *testing.T) {
			sub := newSubscriber(t, s, SubscriberConfig{MaxWorkers: 200})
			messages := make(chan string, 200)
			must(t, subscribe(sub, func(m *nats.Msg) {
				if string(m.Data) == "panic" {
					panic("oh")
				}
				messages <- string(m.Data)
				m.Respond(m.Data)
			}))
			must(t, sub.Conn.Flush())
			must(t, peer.Publish("m", []byte("panic")))
			for i := range 100 {
				must(t, peer.Publish("m", fmt.Append(nil, i)))
			}
			got := map[string]bool{}
			for i := range 100 {
				text := receive(t, messages)
				got[text] = true
				if name == "SubscribeSync" && text != fmt.Sprint(i) {
					t.Errorf("message %d is %s", i, text)
				}
			}
			if len(got) != 100 {
				t.Errorf("%d different messages", len(got))
			}
			response, err := peer.Request("m", []byte("question"), testTimeout)
			must(t, err)
			texts{string(response.Data)}.want(t, "question")
			eventually(t, "all are counted", func() bool {
				m := sub.GetMetrics()
				return m.ActiveSubscriptions == 1 && m.TotalMessagesReceived == 102 && m.MessagesProcessed == 101 &&
					m.MessagesFailed == 1 && m.ProcessingLatency > 0 && m.QueueDepth == 0 && m.MessagesDropped == 0
			})
		})
	}
}

// Handlers that block: how many run at once, and what happens to further messages.
func TestBlockedHandlers(t *testing.T) {
	s := startServer(t, "")
	peer := plain(t, s)
	for name, test := range map[string]struct {
		subscribe             func(s *Subscriber, subject string, h nats.MsgHandler) error
		running, depth, drops int64
	}{
		"Subscribe":        {(*Subscriber).Subscribe, 3, 7, 0},
		"SubscribeSync":    {(*Subscriber).SubscribeSync, 1, 10, 0},
		"SubscribeGo":      {(*Subscriber).SubscribeGo, 10, 0, 0},
		"SubscribeAndDrop": {(*Subscriber).SubscribeAndDrop, 3, 0, 7},
	} {
		t.Run(name, func(t *testing.T) {
			sub := newSubscriber(t, s, SubscriberConfig{MaxWorkers: 3})
			release := make(chan struct{})
			var running, most atomic.Int64
			must(t, test.subscribe(sub, "b", func(m *nats.Msg) {
				now := running.Add(1)
				for was := most.Load(); now > was && !most.CompareAndSwap(was, now); was = most.Load() {
				}
				<-release
				running.Add(-1)
			}))
			must(t, sub.Conn.Flush())
			for range 10 {
				must(t, peer.Publish("b", nil))
			}
			eventually(t, "as many run as may", func() bool {
				m := sub.GetMetrics()
				return running.Load() == test.running && m.MessagesDropped == test.drops && m.QueueDepth == test.depth
			})
			close(release)
			eventually(t, "the others have run", func() bool {
				return sub.GetMetrics().MessagesProcessed == 10-test.drops
			})
			if most.Load() != test.running {
				t.Errorf("%d ran at once, want %d", most.Load(), test.running)
			}
		})
	}
}
