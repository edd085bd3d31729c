// Natsgo is the peer of gostream: nats.go publishes as fast as it can, and counts messages in a callback.
//
//	natsgo publish URL MESSAGES SIZE
//	natsgo subscribe URL MESSAGES
package main

import (
	"fmt"
	"log"
	"os"
	"strconv"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
)

const subject = "bench.natsgo"

func main() {
	if len(os.Args) < 4 {
		log.Fatal("too few arguments: see benches/run")
	}
	conn, err := nats.Connect(os.Args[2])
	check(err)
	if messages := number(3); os.Args[1] == "publish" {
		publish(conn, messages, number(4))
	} else {
		subscribe(conn, messages)
	}
	conn.Close()
}

// publish measures the CPU time of the process per message, until nats-server has everything.
func publish(conn *nats.Conn, messages, size int) {
	message := make([]byte, size)
	before := cpu()
	for range messages {
		check(conn.Publish(subject, message))
	}
	check(conn.Flush())
	fmt.Printf("{\"cpu_ns_per_send\": %.1f}\n", float64((cpu()-before).Nanoseconds())/float64(messages))
}

// subscribe measures the messages per second, from the first to the last.
func subscribe(conn *nats.Conn, messages int) {
	received := 0
	var first, last time.Time
	done := make(chan struct{})
	sub, err := conn.Subscribe(subject, func(*nats.Msg) {
		if received++; received == 1 {
			first = time.Now()
		}
		if received == messages {
			last = time.Now()
			close(done)
		}
	})
	check(err)
	check(sub.SetPendingLimits(-1, -1)) // so that a slow reader loses no messages
	check(conn.Flush())
	fmt.Println("READY")
	select {
	case <-done:
	case <-time.After(time.Minute):
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
