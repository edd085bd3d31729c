// Gostream measures the Go binding: one stream of messages from a worker to a gateway.
//
//	gostream worker URL MESSAGES SIZE
//	gostream gateway URL MESSAGES
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"strconv"
	"syscall"
	"time"

	presence "github.com/nats-presence/nats-presence/bindings/go"
)

const subject = "bench.go"

func main() {
	if len(os.Args) < 4 {
		log.Fatal("too few arguments: see benches/run")
	}
	served := make(chan struct{}, 1)
	conn, err := presence.Connect(os.Args[2], presence.WithLog(func(e presence.Event) {
		if e.Kind == presence.Serving {
			served <- struct{}{}
		}
	}))
	check(err)
	if messages := number(3); os.Args[1] == "worker" {
		worker(conn, served, messages, number(4))
	} else {
		gateway(conn, messages)
		check(conn.Close(context.Background()))
	}
}

// worker answers one request with all messages. It measures the CPU time of the process per message, until nats-server
// has everything.
func worker(conn *presence.Conn, served <-chan struct{}, messages, size int) {
	ctx, stop := context.WithCancel(context.Background())
	go func() {
		<-served
		fmt.Println("READY")
	}()
	message := make([]byte, size)
	var before time.Duration
	check(conn.Serve(ctx, subject, "workers", func(_ context.Context, _ *presence.Request, s *presence.Sender) error {
		defer stop()
		before = cpu()
		for range messages {
			check(s.Send(message))
		}
		return s.End()
	}))
	check(conn.Close(context.Background()))
	fmt.Printf("{\"cpu_ns_per_send\": %.1f}\n", float64((cpu()-before).Nanoseconds())/float64(messages))
}

// gateway reads the messages of one stream, and measures the messages per second, from the first to the last.
func gateway(conn *presence.Conn, messages int) {
	stream, err := conn.Request(context.Background(), subject, nil, "client")
	check(err)
	received := 0
	var first, last time.Time
	for _, err := range stream.Messages() {
		check(err)
		if received++; received == 1 {
			if conn.Stats().Lanes == 0 {
				log.Fatal("the stream does not use a lane")
			}
			first = time.Now()
		}
		if received == messages {
			last = time.Now()
		}
	}
	if received != messages {
		log.Fatal("messages were lost")
	}
	fmt.Printf("{\"messages_per_s\": %.0f}\n", float64(messages-1)/last.Sub(first).Seconds())
}

// cpu returns the CPU time of this process, user and system, of all threads.
func cpu() time.Duration {
	var usage syscall.Rusage
	check(syscall.Getrusage(syscall.RUSAGE_SELF, &usage))
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

func number(i int) int {
	n, err := strconv.Atoi(os.Args[i])
	check(err)
	return n
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
