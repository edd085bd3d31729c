// worker URL SUBJECT GROUP PIECES PAUSE_MS: makes pieces for whoever asks, and stops the moment the client leaves.
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
	"github.com/nats-presence/nats-presence/demo/tell"
)

// later is when a stopped sender is tried once more.
const later = 300 * time.Millisecond

type worker struct {
	pieces int
	pause  time.Duration
}

func main() {
	url, subject, group := os.Args[1], os.Args[2], os.Args[3]
	w := worker{pieces: number(os.Args[4]), pause: time.Duration(number(os.Args[5])) * time.Millisecond}
	conn, err := presence.Connect(url, presence.WithLog(func(e presence.Event) {
		if e.Kind == presence.Serving {
			tell.Event("ready", tell.Fields{})
		}
	}))
	check(err)
	ctx, stop := context.WithCancel(context.Background())
	go func() {
		bufio.NewReader(os.Stdin).ReadByte() // ends when the demo does
		stop()
	}()
	check(conn.Serve(ctx, subject, group, w.answer))
	tell.Event("bye", tell.Fields{"running": conn.Stats().Senders, "online": presence.OnlineCount()})
	check(conn.Close(context.Background()))
}

// answer serves one request. Its context ends when the client leaves, its sender refuses from the same moment on.
func (w worker) answer(ctx context.Context, request *presence.Request, sender *presence.Sender) error {
	stream := string(request.Data)
	tell.Event("begin", tell.Fields{"stream": stream})
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
	tell.Event("done", tell.Fields{"stream": stream, "made": made, "sent": sender.SendCount(), "why": status(err)})
	if err != nil {
		time.Sleep(later)
		err := sender.Send([]byte("too late"))
		tell.Event("late", tell.Fields{"stream": stream, "why": status(err)})
	}
	return err
}

// status is 0, or the number that all languages have for it.
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
