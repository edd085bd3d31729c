// worker URL SUBJECT GROUP PIECES PAUSE_MS: a worker that sends pieces, and stops when the client leaves.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"strconv"
	"time"

	presence "github.com/nats-presence/nats-presence/bindings/go"
	"github.com/nats-presence/nats-presence/demo/report"
)

// retryDelay is the time after which the worker tries to send once more on a stopped sender.
const retryDelay = 300 * time.Millisecond

type worker struct {
	pieces int
	pause  time.Duration
}

func main() {
	url, subject, group := os.Args[1], os.Args[2], os.Args[3]
	w := worker{pieces: number(os.Args[4]), pause: time.Duration(number(os.Args[5])) * time.Millisecond}
	conn, err := presence.Connect(url, presence.WithLog(func(e presence.Event) {
		if e.Kind == presence.Serving {
			report.Event("ready", report.Fields{})
		}
	}))
	check(err)
	ctx, stop := context.WithCancel(context.Background())
	go func() {
		bufio.NewReader(os.Stdin).ReadByte() // returns when the demo ends
		stop()
	}()
	check(conn.Serve(ctx, subject, group, w.answer))
	report.Event("totals", report.Fields{"running": conn.Stats().Senders, "online": presence.OnlineCount()})
	check(conn.Close(context.Background()))
}

// answer serves one request. When the client leaves, its context is cancelled and its sender refuses to send.
func (w worker) answer(ctx context.Context, request *presence.Request, sender *presence.Sender) error {
	stream := string(request.Data)
	report.Event("begin", report.Fields{"stream": stream})
	made := 0
	for made < w.pieces && ctx.Err() == nil {
		piece := fmt.Sprint(stream, " piece ", made)
		made++
		if sender.Send([]byte(piece)) != nil {
			break
		}
		select {
		case <-time.After(w.pause):
		case <-ctx.Done():
		}
	}
	err := sender.End()
	report.Event("done", report.Fields{"stream": stream, "made": made, "sent": sender.SendCount(), "status": status(err)})
	if err != nil {
		time.Sleep(retryDelay)
		err := sender.Send([]byte("too late"))
		report.Event("late", report.Fields{"stream": stream, "status": status(err)})
	}
	return err
}

// status returns the status of an error, which is the same number in all languages; 0 for nil.
func status(err error) presence.Status {
	var failed *presence.Error
	if errors.As(err, &failed) {
		return failed.Status
	}
	return 0
}

func number(text string) int {
	n, err := strconv.Atoi(text)
	check(err)
	return n
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
