package presence_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"os"
	"time"

	presence "github.com/nats-presence/nats-presence/bindings/go"
)

// natsURL is the URL of a nats-server for the examples.
func natsURL() string { return presence.SharedServerURL() }

func ExampleConnect() {
	conn, err := presence.Connect(natsURL(), presence.Name("gateway-1"), presence.ConnectTimeout(2*time.Second))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("connected:", conn.Stats().Connected)

	_, err = presence.Connect(natsURL(), presence.HeartbeatInterval(time.Millisecond))
	fmt.Println("invalid option:", errors.Is(err, presence.ErrInvalid))
	fmt.Println("closed:", conn.Close(context.Background()))
	// Output:
	// connected: true
	// invalid option: true
	// closed: <nil>
}

func ExampleConn_Listen() {
	ctx := context.Background()
	conn, err := presence.Connect(natsURL())
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close(ctx)

	service, err := conn.Listen(ctx, "count", "workers", presence.MaxStreams(100))
	if err != nil {
		log.Fatal(err)
	}
	served := make(chan error)
	go func() {
		served <- service.Serve(func(ctx context.Context, req *presence.Request, s *presence.Sender) error {
			for i := range 3 {
				if err := s.Send(fmt.Append(nil, i)); err != nil {
					return err
				}
			}
			return nil
		})
	}()

	// The service is ready: this request finds it. A real gateway is another process.
	stream, err := conn.Request(ctx, "count", nil, "ann")
	if err != nil {
		log.Fatal(err)
	}
	for message, err := range stream.Messages() {
		fmt.Println(string(message), err)
	}

	// Streams that run have ten seconds to finish.
	draining, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	fmt.Println("drained:", service.Drain(draining))
	fmt.Println("served:", <-served)
	// Output:
	// 0 <nil>
	// 1 <nil>
	// 2 <nil>
	// drained: <nil>
	// served: <nil>
}

func ExampleConn_Serve() {
	conn, err := presence.Connect(natsURL())
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close(context.Background())

	// A program uses signal.NotifyContext in place of this timeout.
	ctx, stop := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer stop()
	handler := func(ctx context.Context, req *presence.Request, s *presence.Sender) error {
		return s.Send([]byte("hello " + req.ClientID))
	}
	err = conn.Serve(ctx, "hello", "workers", handler, presence.DrainTimeout(30*time.Second), presence.StopTimeout(5*time.Second))
	fmt.Println("served:", err)
	// Output: served: <nil>
}

func ExampleConn_Request() {
	ctx := context.Background()
	conn, err := presence.Connect(natsURL())
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close(ctx)
	serve(conn, "models", func(ctx context.Context, req *presence.Request, s *presence.Sender) error {
		if req.Header("X-Model") != "small" {
			return s.SendError(errors.New("no such model"))
		}
		return s.Send([]byte("once upon a time"))
	})

	for _, model := range []string{"small", "large"} {
		stream, err := conn.Request(ctx, "models", []byte("tell a story"), "ann",
			presence.Header("X-Model", model), presence.Timeout(5*time.Second))
		if err != nil {
			log.Fatal(err)
		}
		for message, err := range stream.Messages() {
			if err != nil {
				fmt.Println("failed:", err)
				break
			}
			fmt.Println(string(message))
		}
	}
	// Output:
	// once upon a time
	// failed: presence: no such model
}

func ExampleMarkClientOffline() {
	ctx := context.Background()
	conn, err := presence.Connect(natsURL())
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close(ctx)
	stopped := make(chan error)
	serve(conn, "endless", func(ctx context.Context, req *presence.Request, s *presence.Sender) error {
		for s.Send([]byte("tick")) == nil {
			time.Sleep(time.Millisecond)
		}
		stopped <- s.Err()
		return s.Err()
	})

	stream, err := conn.Request(ctx, "endless", nil, "ann")
	if err != nil {
		log.Fatal(err)
	}
	message, err := stream.Next(ctx)
	fmt.Println(string(message), err)

	if err := presence.MarkClientOffline("ann"); err != nil {
		log.Fatal(err)
	}
	fmt.Println("the worker stopped:", errors.Is(<-stopped, presence.ErrOffline))
	// Output:
	// tick <nil>
	// the worker stopped: true
}

func ExampleWatch() {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	events, err := presence.Watch(ctx)
	if err != nil {
		log.Fatal(err)
	}
	session, err := presence.OpenSession("bea")
	if err != nil {
		log.Fatal(err)
	}
	session.Close()
	for range 2 {
		event := <-events
		fmt.Println(event.ClientID, event.Kind)
	}
	// Output:
	// bea client online
	// bea client offline
}

func ExampleWithLog() {
	events := make(chan presence.Event, 100)
	conn, err := presence.Connect(natsURL(), presence.WithLog(func(e presence.Event) { events <- e }))
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Listen(context.Background(), "logged", ""); err != nil {
		log.Fatal(err)
	}
	for event := range events {
		if event.Kind == presence.Serving {
			fmt.Println(event.Kind, event.Text)
			break
		}
	}
	// Output: serving logged
}

func ExampleWithLogger() {
	logger := slog.New(slog.NewJSONHandler(os.Stderr, nil)).With("component", "gateway")
	conn, err := presence.Connect(natsURL(), presence.WithLogger(logger))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("closed:", conn.Close(context.Background()))
	// Output: closed: <nil>
}

// serve starts a service that ends with the connection.
func serve(conn *presence.Conn, subject string, handler presence.Handler) {
	service, err := conn.Listen(context.Background(), subject, "workers")
	if err != nil {
		log.Fatal(err)
	}
	go service.Serve(handler)
}
