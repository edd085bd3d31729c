// A worker that streams pieces of text, and stops the moment the client leaves. It logs a line for each stream.
//
// Environment variables: NATS_URL, SUBJECT, QUEUE, PIECES (how many pieces each stream has), DELAY (the time between
// them).
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	presence "github.com/nats-presence/nats-presence/bindings/go"
)

func main() {
	log.SetFlags(log.Ltime | log.Lmicroseconds)
	pieces, err := strconv.Atoi(setting("PIECES", "1000"))
	check(err)
	delay, err := time.ParseDuration(setting("DELAY", "100ms"))
	check(err)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	conn, err := presence.Connect(setting("NATS_URL", "nats://127.0.0.1:4222"),
		presence.Name("go-worker"),
		presence.WithLog(func(e presence.Event) { log.Print(e.Kind, " ", e.Text) }))
	check(err)
	err = conn.Serve(ctx, setting("SUBJECT", "pieces"), setting("QUEUE", "workers"),
		func(ctx context.Context, req *presence.Request, s *presence.Sender) error {
			log.Printf("begin client=%s", req.ClientID)
			err := send(ctx, s, pieces, delay)
			log.Printf("end client=%s sent=%d why=%v", req.ClientID, s.SendCount(), err)
			return err
		})
	check(err)
	check(conn.Close(context.Background()))
}

// send streams the pieces. It returns early when ctx ends, which happens when the client leaves.
func send(ctx context.Context, s *presence.Sender, pieces int, delay time.Duration) error {
	tick := time.NewTicker(max(delay, 1))
	defer tick.Stop()
	for i := range pieces {
		if err := s.Send(fmt.Append(nil, "piece ", i)); err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

func setting(name, fallback string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return fallback
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
