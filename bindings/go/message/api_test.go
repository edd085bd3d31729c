package message

import (
	"context"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
)

// use passes when a value has the type T.
func use[T any](T) {}

// Programs that were written for the package of this name on plain NATS use these signatures.
func TestSignatures(t *testing.T) {
	use[func(Config) (*Pool, error)](New)
	use[func(*Pool) PoolMetrics]((*Pool).GetMetrics)
	use[func(*Pool, context.Context) (*nats.Conn, error)]((*Pool).Get)
	use[func(*Pool, *nats.Conn)]((*Pool).Put)
	use[func(*Pool)]((*Pool).Close)
	use[func(*Pool, context.Context, *nats.Msg) error]((*Pool).PublishMsg)
	use[func(*Pool, context.Context, string, []byte) error]((*Pool).Publish)
	use[func(*Pool, context.Context, *nats.Msg) (*nats.Msg, error)]((*Pool).RequestMsg)
	use[func(*Pool, context.Context, string, any) error]((*Pool).PublishAny)
	use[func(*Pool, context.Context, string, []byte) (*nats.Msg, error)]((*Pool).Request)
	use[func(*Pool, context.Context, string, any) (*nats.Msg, error)]((*Pool).RequestAny)
	use[func(*Pool, context.Context, string, []byte, func(*nats.Msg) bool) error]((*Pool).StreamRequest)
	use[func(*Pool, context.Context, string, []byte, time.Duration, time.Duration, func(*nats.Msg) bool) error](
		(*Pool).StreamRequestWithTimeout)
	use[func(*Pool, context.Context, string, []byte, int, time.Duration, func(*nats.Msg) bool) error](
		(*Pool).StreamRequestWithRetry)
	use[func(*Pool, context.Context, string, []byte, string, func(*nats.Msg) bool) error](
		(*Pool).StreamRequestWithClient)
	use[func() SubscriberConfig](DefaultSubscriberConfig)
	use[func([]string, ...nats.Option) (*Subscriber, error)](NewSubscriber)
	use[func([]string, SubscriberConfig, ...nats.Option) (*Subscriber, error)](NewSubscriberWithConfig)
	use[func(*Subscriber, string, string, nats.MsgHandler) error]((*Subscriber).QueueSubscribeSync)
	use[func(*Subscriber, string, nats.MsgHandler) error]((*Subscriber).SubscribeSync)
	use[func(*Subscriber, string, string, nats.MsgHandler) error]((*Subscriber).QueueSubscribe)
	use[func(*Subscriber, string, nats.MsgHandler) error]((*Subscriber).Subscribe)
	use[func(*Subscriber, string, string, nats.MsgHandler) error]((*Subscriber).QueueSubscribeGo)
	use[func(*Subscriber, string, nats.MsgHandler) error]((*Subscriber).SubscribeGo)
	use[func(*Subscriber, string, nats.MsgHandler) error]((*Subscriber).SubscribeAndDrop)
	use[func(*Subscriber, context.Context) error]((*Subscriber).Close)
	use[func(*Subscriber) error]((*Subscriber).StartClientOfflineListener)
	use[func(*Subscriber, context.Context, string, CallbackStreamHandler) error](
		(*Subscriber).StreamSubscribeHandler)
	use[func(*Subscriber, context.Context, string, string, CallbackStreamHandler) error](
		(*Subscriber).StreamQueueSubscribeHandler)
	use[func(*Subscriber) SubscriberMetrics]((*Subscriber).GetMetrics)
	use[func(*StreamSubscriptionHandle) error]((*StreamSubscriptionHandle).Stop)
	use[func(*StreamSubscriptionHandle) bool]((*StreamSubscriptionHandle).IsStopped)
	use[func(*StreamSubscriptionHandle) context.Context]((*StreamSubscriptionHandle).Context)
	use[func(string)](MarkClientOnline)
	use[func(string)](MarkClientOffline)
	use[func(string) bool](IsClientOnline)
	use[CallbackStreamHandler](func(context.Context, *nats.Msg, ResponseSender) error { return nil })
	use[interface {
		Send([]byte) error
		SendError(error) error
		End() error
		IsClosed() bool
	}](ResponseSender(nil))
	use(Config{
		Servers: []string{}, IdlePerServer: 1, MinIdlePerServer: 1, MaxConnections: 1, DialTimeout: 1, MaxLife: 1,
		BackoffMin: 1, BackoffMax: 1, LeakTimeout: 1, LeakCheckInterval: 1, NATSOpts: []nats.Option{},
		PingInterval: 1, MaxPingsOut: 1, MaxReconnects: 1, ReconnectWait: 1, AcquireTimeout: 1,
	})
}

func TestMarks(t *testing.T) {
	id := newID(t)
	if IsClientOnline(id) || !IsClientOnline("") {
		t.Error("an unknown id is online, or the empty id is not")
	}
	MarkClientOnline(id)
	MarkClientOnline(id)
	if !IsClientOnline(id) {
		t.Error("it is not online")
	}
	MarkClientOffline(id)
	MarkClientOffline(id)
	MarkClientOffline("")
	if IsClientOnline(id) || !IsClientOnline("") {
		t.Error("it is online, or the empty id is not")
	}
	MarkClientOnline("a\x00b") // an invalid id is ignored
	if IsClientOnline("a\x00b") {
		t.Error("an invalid id is online")
	}
}
