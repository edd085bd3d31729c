// gateway URL SUBJECT: a gateway whose clients follow commands on standard input.
//
//	ask CLIENT STREAM    the client requests a stream
//	offline CLIENT       the client leaves
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
	"github.com/nats-presence/nats-presence/demo/report"
)

func main() {
	url, subject := os.Args[1], os.Args[2]
	conn, err := presence.Connect(url)
	check(err)
	check(conn.ListenOffline()) // for clients that other gateways mark offline
	report.Event("ready", report.Fields{})

	var readers sync.WaitGroup
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		switch words := strings.Fields(lines.Text()); words[0] {
		case "ask":
			client, name := words[1], words[2]
			report.Event("ask", report.Fields{"stream": name})
			stream, err := conn.Request(context.Background(), subject, []byte(name), client)
			check(err)
			readers.Add(1)
			go func() {
				defer readers.Done()
				read(stream, name)
			}()
		case "offline":
			at := report.Now()
			check(presence.MarkClientOffline(words[1]))
			report.Event("left", report.Fields{"client": words[1], "at": at})
		}
	}
	readers.Wait()
	report.Event("totals", report.Fields{"running": conn.Stats().Streams, "online": presence.OnlineCount()})
	check(conn.Close(context.Background()))
}

// read reads a stream. A real gateway would forward the messages to the client's browser.
func read(stream *presence.Stream, name string) {
	status := presence.Status(0)
	for message, err := range stream.Messages() {
		var failed *presence.Error
		if errors.As(err, &failed) {
			status = failed.Status
			break
		}
		report.Event("message", report.Fields{"stream": name, "data": string(message)})
	}
	report.Event("ended", report.Fields{"stream": name, "status": status})
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
