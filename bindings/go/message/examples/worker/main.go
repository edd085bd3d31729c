// Worker counts for one client after another: each answer is up to 1,000 messages, one each 100 ms. It stops counting
// for a client that has left.
//
// It is a program for a message package on plain NATS, of which only the import path was changed.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"os/signal"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-presence/nats-presence/bindings/go/message"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	url := os.Getenv("NATS_URL")
	if url == "" {
		url = nats.DefaultURL
	}
	sub, err := message.NewSubscriber([]string{url})
	if err != nil {
		log.Fatal(err)
	}
	if err := sub.StartClientOfflineListener(); err != nil {
		log.Fatal(err)
	}
	go func() {
		<-ctx.Done()
		log.Print("stopping")
	}()
	log.Print("serving count")
	err = sub.StreamQueueSubscribeHandler(ctx, "count", "workers", count)
	if err != nil && !errors.Is(err, context.Canceled) {
		log.Fatal(err)
	}
	closing, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := sub.Close(closing); err != nil {
		log.Print(err)
	}
}

func count(_ context.Context, request *nats.Msg, sender message.ResponseSender) error {
	connectID := request.Header.Get("Connect-ID")
	go func() {
		for i := range 1000 {
			if err := sender.Send(fmt.Appendf(nil, "%s %d", request.Data, i)); err != nil {
				log.Printf("%s: stop at %d: %v", connectID, i, err)
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
		if err := sender.End(); err != nil {
			log.Print(err)
		}
	}()
	return nil
}
