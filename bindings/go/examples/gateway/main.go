// A gateway that forwards streams to browsers as server-sent events. It logs a line for each stream.
//
//	GET  /events  is the browser's connection. Its first event is "id", with the client's id. When it ends, the
//	              client has left.
//	POST /ask     requests a stream for the client whose id is in the header X-Connect-ID, with the body as payload.
//	              The messages are forwarded to the client's /events. The response is sent when the stream has ended.
//	              Status 400: the header is missing. 404: no client with this id is connected. 413: the body is larger
//	              than 1 MiB. 502: the stream ended early. 503: no worker serves the subject, or all are busy.
//
// A browser may vanish without closing its connection (network or power lost). The gateway sends a comment every
// KEEP_ALIVE, and the kernel closes a connection whose data is not acknowledged for USER_TIMEOUT, so the gateway
// detects this after KEEP_ALIVE and USER_TIMEOUT at the latest. A browser that reads no data for that time loses its
// connection too.
//
// Environment variables: NATS_URL, SUBJECT, LISTEN, KEEP_ALIVE (10s), USER_TIMEOUT (20s).
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	presence "github.com/nats-presence/nats-presence/bindings/go"
	"github.com/nats-presence/nats-presence/bindings/go/sse"
)

func main() {
	log.SetFlags(log.Ltime | log.Lmicroseconds)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	conn, err := presence.Connect(setting("NATS_URL", "nats://127.0.0.1:4222"),
		presence.Name("go-gateway"),
		presence.WithLog(func(e presence.Event) { log.Print(e.Kind, " ", e.Text) }))
	check(err)
	// Also stop clients that other gateways announce offline.
	check(conn.ListenOffline())

	keepAlive, err := time.ParseDuration(setting("KEEP_ALIVE", "10s"))
	check(err)
	userTimeout, err := time.ParseDuration(setting("USER_TIMEOUT", "20s"))
	check(err)
	g := &gateway{
		conn: conn, subject: setting("SUBJECT", "pieces"),
		options: []sse.Option{sse.KeepAlive(keepAlive), sse.WriteTimeout(userTimeout)},
	}
	http.HandleFunc("GET /events", g.events)
	http.HandleFunc("POST /ask", g.ask)
	listener, err := listen(setting("LISTEN", "127.0.0.1:8080"), userTimeout)
	check(err)
	log.Print("listening on ", listener.Addr())
	// The contexts of requests end with ctx, so that Shutdown does not wait for browsers.
	server := &http.Server{BaseContext: func(net.Listener) context.Context { return ctx }}
	shut := make(chan error)
	context.AfterFunc(ctx, func() { shut <- server.Shutdown(context.Background()) })
	if err := server.Serve(listener); err != http.ErrServerClosed {
		check(err)
	}
	check(<-shut) // wait until the handlers have returned, which Serve does not
	check(conn.Close(context.Background()))
}

// listen returns a listener whose connections end when sent data is not acknowledged for userTimeout.
func listen(address string, userTimeout time.Duration) (net.Listener, error) {
	const tcpUserTimeout = 18 // TCP_USER_TIMEOUT of linux/tcp.h, which package syscall lacks
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var optionErr error
		err := c.Control(func(fd uintptr) { // accepted connections inherit the option
			ms := int(userTimeout.Milliseconds())
			optionErr = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout, ms)
		})
		return errors.Join(err, optionErr)
	}}
	return config.Listen(context.Background(), "tcp", address)
}

// maxQuestion is the size of the largest body of /ask.
const maxQuestion = 1 << 20

type gateway struct {
	conn    *presence.Conn
	subject string
	options []sse.Option
	clients sync.Map // by id: *client
}

// client is a browser with an open /events.
type client struct {
	*presence.Client
	events *sse.Writer
}

func (g *gateway) events(w http.ResponseWriter, r *http.Request) {
	events, err := sse.NewWriter(w, r, g.options...)
	if err != nil {
		log.Print(err)
		return
	}
	defer events.Close()
	id := rand.Text()
	session, err := presence.NewClient(id)
	check(err)
	defer session.Close() // stops the client's streams, here and at the workers
	g.clients.Store(id, &client{session, events})
	defer g.clients.Delete(id)
	events.Send(sse.Event{Name: "id", Data: []byte(id)})
	select {
	case <-events.Context().Done(): // the browser has left
	case <-session.Context().Done(): // the client was marked offline, here or by another process
	}
}

func (g *gateway) ask(w http.ResponseWriter, r *http.Request) {
	id := r.Header.Get("X-Connect-ID")
	if id == "" {
		http.Error(w, "set the header X-Connect-ID to the id that /events sent", http.StatusBadRequest)
		return
	}
	found, ok := g.clients.Load(id)
	if !ok {
		http.Error(w, "no client with this X-Connect-ID is connected", http.StatusNotFound)
		return
	}
	question, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxQuestion))
	if tooLarge := new(http.MaxBytesError); errors.As(err, &tooLarge) {
		text := fmt.Sprintf("the body is larger than %d bytes", tooLarge.Limit)
		http.Error(w, text, http.StatusRequestEntityTooLarge)
		return
	} else if err != nil {
		return // the requester has left
	}
	received, err := g.forward(r.Context(), found.(*client), question)
	log.Printf("stream client=%s received=%d why=%v", id, received, err)
	switch { // the error is logged only: it may contain a worker's text, which the browser must not see
	case err == nil:
		fmt.Fprintln(w, received)
	case errors.Is(err, presence.ErrNoResponders) || errors.Is(err, presence.ErrBusy):
		http.Error(w, "no worker is available", http.StatusServiceUnavailable)
	default:
		http.Error(w, "the stream ended early", http.StatusBadGateway)
	}
}

// forward forwards a stream to the client. It returns the number of messages, and the reason if the stream ended early.
func (g *gateway) forward(ctx context.Context, c *client, question []byte) (received int, err error) {
	stream, err := c.Request(ctx, g.conn, g.subject, question)
	if err != nil {
		return 0, err
	}
	for message, err := range stream.Messages() {
		if err == nil {
			err = c.events.Send(sse.Event{Data: message})
		}
		if err != nil {
			return received, err
		}
		received++
	}
	return received, nil
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
