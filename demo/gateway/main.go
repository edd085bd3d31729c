// gateway URL SUBJECT: holds clients, whose doings it reads from standard input.
//
//	ask CLIENT STREAM    the client asks for a stream
//	offline CLIENT       the client has left
package main

import (
	"bufio"
	"context"
	"errors"
	"log"
	"os"
	"strings"
	"sync"

	presence "github.com/nats-presence/nats-presence/bindings/go"
	"github.com/nats-presence/nats-presence/demo/tell"
)

func main() {
	url, subject := os.Args[1], os.Args[2]
	conn, err := presence.Connect(url)
	check(err)
	check(conn.ListenOffline()) // for clients that other gateways see leave
	tell.Event("ready", tell.Fields{})

	var readers sync.WaitGroup
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		switch words := strings.Fields(lines.Text()); words[0] {
		case "ask":
			client, name := words[1], words[2]
			tell.Event("ask", tell.Fields{"stream": name})
			stream, err := conn.Request(context.Background(), subject, []byte(name), client)
			check(err)
			readers.Add(1)
			go func() {
				defer readers.Done()
				read(stream, name)
			}()
		case "offline":
			at := tell.Now()
			check(presence.MarkClientOffline(words[1]))
			tell.Event("left", tell.Fields{"client": words[1], "at": at})
		}
	}
	readers.Wait()
	tell.Event("bye", tell.Fields{"running": conn.Stats().Streams, "online": presence.OnlineCount()})
	check(conn.Close(context.Background()))
}

// read is where the messages would go to the client's browser.
func read(stream *presence.Stream, name string) {
	why := presence.Status(0)
	for message, err := range stream.Messages() {
		var failed *presence.Error
		if errors.As(err, &failed) {
			why = failed.Status
			break
		}
		tell.Event("message", tell.Fields{"stream": name, "data": string(message)})
	}
	tell.Event("ended", tell.Fields{"stream": name, "why": why})
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
