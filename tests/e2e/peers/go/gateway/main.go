// gateway URL LANES [KEY=VALUE]...: gateway.c in Go, with a goroutine for each stream.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"strings"

	presence "github.com/nats-presence/nats-presence/bindings/go"
)

func main() {
	options := []presence.ConnectOption{presence.With("lanes", os.Args[2])}
	for _, option := range os.Args[3:] {
		options = append(options, with(option))
	}
	conn, err := presence.Connect(os.Args[1], options...)
	check(err)
	fmt.Println(`{"event": "ready"}`)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		switch words := strings.SplitN(lines.Text(), " ", 4); words[0] {
		case "request":
			stream, err := conn.Request(context.Background(), words[1], []byte(words[3]), words[2])
			if err != nil {
				tellError(words[2], err)
			} else {
				go read(stream, words[2])
			}
		case "leave":
			check(presence.MarkClientOffline(words[1]))
		}
	}
	check(conn.Close(context.Background()))
}

func read(stream *presence.Stream, client string) {
	for message, err := range stream.Messages() {
		if err != nil {
			tellError(client, err)
			return
		}
		fmt.Printf("{\"event\": \"data\", \"client\": %q, \"data\": %q}\n", client, message)
	}
	fmt.Printf("{\"event\": \"end\", \"client\": %q}\n", client)
}

func tellError(client string, err error) {
	var failed *presence.Error
	if !errors.As(err, &failed) {
		log.Fatal(err)
	}
	fmt.Printf("{\"event\": \"error\", \"client\": %q, \"status\": %d, \"text\": %q, \"code\": %d}\n",
		client, failed.Status, failed.Message, failed.Code)
}

// with reads an option, KEY=VALUE.
func with(option string) presence.Option {
	key, value, _ := strings.Cut(option, "=")
	return presence.With(key, value)
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
