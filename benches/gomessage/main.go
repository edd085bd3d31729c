// Gomessage measures package message, and code that does the same by hand with nats.go: a request to an inbox, a look at
// the clients that have left before each message, and an end marker.
//
//	gomessage worker message|nats.go URL STREAMS
//	gomessage gateway message|nats.go URL STREAMS AT_ONCE MESSAGES
//
// Each stream is for another client. A worker ends after so many streams. A gateway requests one more, with three
// messages, before it measures.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-presence/nats-presence/bindings/go/message"
)

const (
	subject = "bench.message"
	queue   = "workers"
	size    = 16
	end     = "__STREAM_END__"
	timeout = time.Minute
)

// request requests a stream of so many messages for a client, and calls f for each of them and for the end marker.
type request func(client string, messages int, f func()) error

func main() {
	if len(os.Args) < 5 {
		log.Fatal("too few arguments: see benches/run")
	}
	role, how, url, streams := os.Args[1], os.Args[2], os.Args[3], number(4)
	switch role + " " + how {
	case "worker message":
		worker(url, streams)
	case "worker nats.go":
		workerByHand(url, streams)
	case "gateway message":
		pool, err := message.New(message.Config{Servers: []string{url}})
		check(err)
		gateway(requester(pool), streams, number(5), number(6))
		pool.Close()
	case "gateway nats.go":
		conn, err := nats.Connect(url)
		check(err)
		gateway(requesterByHand(conn), streams, number(5), number(6))
		conn.Close()
	default:
		log.Fatalf("there is no %s %s", role, how)
	}
}

// worker serves so many streams.
func worker(url string, streams int) {
	config := message.DefaultSubscriberConfig()
	config.MaxStreamJobs = 1000
	sub, err := message.NewSubscriberWithConfig([]string{url}, config)
	check(err)
	ctx, stop := context.WithCancel(context.Background())
	left := newCountdown(streams, stop)
	go func() {
		waitUntilServed(url)
		fmt.Println("READY")
	}()
	sub.StreamQueueSubscribeHandler(ctx, subject, queue,
		func(_ context.Context, msg *nats.Msg, sender message.ResponseSender) error {
			if len(msg.Data) == 0 {
				return sender.End() // of waitUntilServed
			}
			defer left.done()
			check(answer(msg.Data, sender.Send))
			return sender.End()
		})
	closing, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	check(sub.Close(closing))
	fmt.Println("{}")
}

// waitUntilServed waits until nats-server has the subscription of the worker, which package message does not report.
func waitUntilServed(url string) {
	conn, err := nats.Connect(url)
	check(err)
	defer conn.Close()
	for {
		if _, err := conn.Request(subject, nil, timeout); err == nil {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

func workerByHand(url string, streams int) {
	conn, err := nats.Connect(url)
	check(err)
	var offline sync.Map // the ids of clients that have left
	_, err = conn.Subscribe("cancel", func(m *nats.Msg) { offline.Store(string(m.Data), true) })
	check(err)
	ended := make(chan struct{})
	left := newCountdown(streams, func() { close(ended) })
	_, err = conn.QueueSubscribe(subject, queue, func(msg *nats.Msg) {
		go func() {
			defer left.done()
			id := msg.Header.Get("Connect-ID")
			check(answer(msg.Data, func(data []byte) error {
				if _, left := offline.Load(id); left {
					return fmt.Errorf("client %s is offline", id)
				}
				return conn.Publish(msg.Reply, data)
			}))
			check(conn.Publish(msg.Reply, []byte(end)))
		}()
	})
	check(err)
	check(conn.Flush())
	fmt.Println("READY")
	<-ended
	check(conn.Flush())
	conn.Close()
	fmt.Println("{}")
}

// answer sends as many messages as a request asks for.
func answer(data []byte, send func([]byte) error) error {
	messages, err := strconv.Atoi(string(data))
	for range messages {
		if err == nil {
			err = send(make([]byte, size))
		}
	}
	return err
}

// requester requests streams with package message.
func requester(pool *message.Pool) request {
	return func(client string, messages int, f func()) error {
		data := []byte(strconv.Itoa(messages))
		return pool.StreamRequestWithClient(context.Background(), subject, data, client, func(*nats.Msg) bool {
			f()
			return true
		})
	}
}

func requesterByHand(conn *nats.Conn) request {
	return func(client string, messages int, f func()) error {
		inbox, err := conn.SubscribeSync(nats.NewInbox())
		if err != nil {
			return err
		}
		defer inbox.Unsubscribe()
		check(inbox.SetPendingLimits(-1, -1)) // so that a slow reader loses no messages
		request := nats.NewMsg(subject)
		request.Reply, request.Data = inbox.Subject, []byte(strconv.Itoa(messages))
		request.Header.Set("Connect-ID", client)
		if err := conn.PublishMsg(request); err != nil {
			return err
		}
		for {
			msg, err := inbox.NextMsg(timeout)
			if err != nil {
				return err
			}
			f()
			if string(msg.Data) == end {
				return nil
			}
		}
	}
}

// gateway measures the streams per second and, for one stream, the messages per second from the first to the last.
func gateway(request request, streams, atOnce, messages int) {
	first, last := read(request, "first", 3)
	var next atomic.Int64
	var all sync.WaitGroup
	began := time.Now()
	for range atOnce {
		all.Add(1)
		go func() {
			defer all.Done()
			for i := next.Add(1); i <= int64(streams); i = next.Add(1) {
				begin, end := read(request, strconv.FormatInt(i, 10), messages)
				if streams == 1 {
					first, last = begin, end
				}
			}
		}()
	}
	all.Wait()
	if streams == 1 {
		fmt.Printf("{\"messages_per_s\": %.0f}\n", float64(messages-1)/last.Sub(first).Seconds())
	} else {
		fmt.Printf("{\"streams_per_s\": %.0f}\n", float64(streams)/time.Since(began).Seconds())
	}
}

// read reads a stream to its end, and returns when its first and last messages came.
func read(request request, client string, messages int) (first, last time.Time) {
	count := 0
	check(request(client, messages, func() {
		switch count++; count {
		case 1:
			first = time.Now()
		case messages:
			last = time.Now()
		}
	}))
	if count != messages+1 { // with the end marker
		log.Fatalf("got %d messages of %d and the end marker", count, messages)
	}
	return first, last
}

// countdown calls a function when so many streams have ended.
type countdown struct {
	left atomic.Int64
	end  func()
}

func newCountdown(streams int, end func()) *countdown {
	c := &countdown{end: end}
	c.left.Store(int64(streams))
	return c
}

func (c *countdown) done() {
	if c.left.Add(-1) == 0 {
		c.end()
	}
}

func number(i int) int {
	if i >= len(os.Args) {
		log.Fatal("too few arguments: see benches/run")
	}
	n, err := strconv.Atoi(os.Args[i])
	check(err)
	return n
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
