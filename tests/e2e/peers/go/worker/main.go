// worker URL SUBJECT LANES [KEY=VALUE]...: worker.c in Go.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	presence "github.com/nats-presence/nats-presence/bindings/go"
)

const further = 100

func main() {
	finishing := make(chan struct{})
	ctx, stop := context.WithCancel(context.Background())
	options := []presence.ConnectOption{presence.With("lanes", os.Args[3]), presence.WithLog(func(e presence.Event) {
		if e.Kind == presence.Serving {
			fmt.Println(`{"event": "ready"}`)
		}
	})}
	for _, option := range os.Args[4:] {
		options = append(options, with(option))
	}
	conn, err := presence.Connect(os.Args[1], options...)
	check(err)
	go func() {
		for lines := bufio.NewScanner(os.Stdin); lines.Scan(); { // "finish" is the only command
			close(finishing)
		}
		stop()
	}()
	check(conn.Serve(ctx, os.Args[2], "workers", func(_ context.Context, req *presence.Request, s *presence.Sender) error {
		why := answer(req, s, finishing)
		sent := s.SendCount()
		for range further {
			s.Send([]byte("more"))
		}
		fmt.Printf("{\"event\": \"done\", \"client\": %q, \"sent\": %d, \"why\": %d, \"accepted\": %d}\n",
			req.ClientID, sent, status(why), s.SendCount()-sent)
		return nil
	}))
	check(conn.Close(context.Background()))
}

func answer(req *presence.Request, s *presence.Sender, finishing <-chan struct{}) error {
	what, argument, _ := strings.Cut(string(req.Data), " ")
	count, pause := math.MaxInt, time.Duration(0)
	switch what {
	case "count":
		count, _ = strconv.Atoi(argument)
	case "fail", "code":
		count = 1
	case "endless":
		pause = time.Millisecond
	}
	for i := range count {
		if what == "endless" && isClosed(finishing) {
			break
		}
		if err := s.Send(fmt.Appendf(nil, "%s %d", req.ClientID, i)); err != nil {
			return err
		}
		time.Sleep(pause)
	}
	if what == "fail" {
		return s.SendError(errors.New(argument))
	}
	if what == "code" {
		number, text, _ := strings.Cut(argument, " ")
		code, _ := strconv.Atoi(number)
		return s.SendError(presence.Errorf(code, "%s", text))
	}
	return s.End()
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func status(err error) presence.Status {
	var failed *presence.Error
	errors.As(err, &failed)
	if failed == nil {
		return 0
	}
	return failed.Status
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
