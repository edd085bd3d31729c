package message

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/nats-io/nats.go"
)

// The benchmarks compare this package with code that does the same by hand with nats.go: a request to an inbox, a check
// whether the client has left before each message, and an end marker. Both ends are in this process.
//
//	go test -run '^$' -bench . .

// messagesOf answers a request with as many messages of 16 bytes as it asks for.
func messagesOf(request []byte, send func([]byte) error) error {
	n, err := strconv.Atoi(string(request))
	for i := 0; i < n && err == nil; i++ {
		err = send(make([]byte, 16))
	}
	return err
}

// ours returns a function that requests a stream of n messages and reads it to its end.
func ours(b *testing.B, s *server) func(id string, n int) error {
	worker, pool := newSubscriber(b, s, SubscriberConfig{MaxStreamJobs: 1000}), newPool(b, s)
	serve(b, worker, "bench", func(ctx context.Context, msg *nats.Msg, sender ResponseSender) error {
		if err := messagesOf(msg.Data, sender.Send); err != nil {
			return err
		}
		return sender.End()
	})
	return func(id string, n int) error {
		read := 0
		err := pool.StreamRequestWithClient(b.Context(), "bench", []byte(strconv.Itoa(n)), id, func(m *nats.Msg) bool {
			read++
			return true
		})
		return check(err, read, n+1)
	}
}

// byHand does the same with nats.go alone.
func byHand(b *testing.B, s *server) func(id string, n int) error {
	worker, gateway := plain(b, s), plain(b, s)
	var offline sync.Map // the ids of clients that have left
	_, err := worker.Subscribe("cancel", func(m *nats.Msg) { offline.Store(string(m.Data), true) })
	must(b, err)
	plainServe(b, worker, "bench", func(request *nats.Msg) {
		go func() {
			id := request.Header.Get("Connect-ID")
			err := messagesOf(request.Data, func(data []byte) error {
				if _, left := offline.Load(id); left {
					return fmt.Errorf("client %s is offline", id)
				}
				return worker.Publish(request.Reply, data)
			})
			if err == nil {
				worker.Publish(request.Reply, []byte(endMarker))
			}
		}()
	})
	return func(id string, n int) error {
		inbox, err := gateway.SubscribeSync(nats.NewInbox())
		if err != nil {
			return err
		}
		defer inbox.Unsubscribe()
		inbox.SetPendingLimits(-1, -1)
		request := &nats.Msg{Subject: "bench", Reply: inbox.Subject, Data: []byte(strconv.Itoa(n))}
		request.Header = nats.Header{"Connect-ID": {id}}
		if err := gateway.PublishMsg(request); err != nil {
			return err
		}
		for read := 1; ; read++ {
			msg, err := inbox.NextMsg(testTimeout)
			if err != nil || string(msg.Data) == endMarker {
				return check(err, read, n+1)
			}
		}
	}
}

func check(err error, read, want int) error {
	if err == nil && read != want {
		err = fmt.Errorf("%d messages, want %d", read, want)
	}
	return err
}

var ways = []struct {
	name string
	way  func(b *testing.B, s *server) func(id string, n int) error
}{{"message", ours}, {"nats.go", byHand}}

// BenchmarkStreams measures streams of three messages, so many at once.
func BenchmarkStreams(b *testing.B) {
	for _, atOnce := range []int{1, 16, 64} {
		for _, w := range ways {
			b.Run(fmt.Sprintf("%s/at-once=%d", w.name, atOnce), func(b *testing.B) {
				request := w.way(b, startServer(b, ""))
				must(b, request("first", 3))
				var next atomic.Int64
				var all sync.WaitGroup
				b.ResetTimer()
				for range atOnce {
					all.Add(1)
					go func() {
						defer all.Done()
						for i := next.Add(1); i <= int64(b.N); i = next.Add(1) {
							if err := request(strconv.FormatInt(i, 10), 3); err != nil {
								b.Error(err)
								return
							}
						}
					}()
				}
				all.Wait()
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "streams/s")
			})
		}
	}
}

// BenchmarkMessages measures the messages of one stream.
func BenchmarkMessages(b *testing.B) {
	for _, w := range ways {
		b.Run(w.name, func(b *testing.B) {
			request := w.way(b, startServer(b, ""))
			must(b, request("first", 3))
			b.ResetTimer()
			must(b, request("reader", b.N))
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msgs/s")
		})
	}
}
