// A gateway that forwards streams to browsers as server-sent events. It logs a line for each stream.
//
//	GET  /events  is the browser's connection. Its first event is "id", with the client's id. When it ends, the
//	              client has left.
//	POST /ask     requests a stream for the client whose id is in the header X-Connect-ID, with the body as payload.
//	              The messages are forwarded to the client's /events. The response is sent when the stream has ended.
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
	"strings"
	"sync"
	"syscall"
	"time"

	presence "github.com/nats-presence/nats-presence/bindings/go"
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
	g := &gateway{conn: conn, subject: setting("SUBJECT", "pieces"), keepAlive: keepAlive}
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

type gateway struct {
	conn      *presence.Conn
	subject   string
	keepAlive time.Duration
	clients   sync.Map // by id: *client
}

// client is a browser with an open /events.
type client struct {
	messages chan []byte
	left     <-chan struct{}
}

// lineEnds replaces each line ending of server-sent events by the start of a new data line. Otherwise a message that
// contains line endings could inject events.
var lineEnds = strings.NewReplacer("\r\n", "\ndata: ", "\r", "\ndata: ", "\n", "\ndata: ")

func (g *gateway) events(w http.ResponseWriter, r *http.Request) {
	id := rand.Text()
	c := &client{messages: make(chan []byte), left: r.Context().Done()}
	g.clients.Store(id, c)
	defer g.clients.Delete(id)
	check(presence.MarkClientOnline(id))
	defer presence.MarkClientOffline(id) // stops the client's streams, here and at the workers

	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-cache")
	fmt.Fprintf(w, "event: id\ndata: %s\n\n", id)
	keepAlive := time.NewTicker(g.keepAlive)
	defer keepAlive.Stop()
	out := http.NewResponseController(w)
	for out.Flush() == nil {
		select {
		case message := <-c.messages:
			fmt.Fprintf(w, "data: %s\n\n", lineEnds.Replace(string(message)))
		case <-keepAlive.C:
			fmt.Fprint(w, ": keep-alive\n\n")
		case <-c.left:
			return
		}
	}
}

func (g *gateway) ask(w http.ResponseWriter, r *http.Request) {
	id := r.Header.Get("X-Connect-ID")
	found, ok := g.clients.Load(id)
	if !ok {
		http.Error(w, "no client with this X-Connect-ID is connected", http.StatusNotFound)
		return
	}
	question, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
	if err != nil {
		http.Error(w, "the body cannot be read or is larger than 1 MiB", http.StatusBadRequest)
		return
	}
	received, err := g.forward(r.Context(), found.(*client), id, question)
	log.Printf("stream client=%s received=%d why=%v", id, received, err)
	if err != nil { // logged only: it may contain a worker's text, which the browser must not see
		http.Error(w, "the stream ended early", http.StatusBadGateway)
		return
	}
	fmt.Fprintln(w, received)
}

// forward forwards a stream to the client. It returns the number of messages, and the reason if the stream ended early.
func (g *gateway) forward(ctx context.Context, c *client, id string, question []byte) (received int, err error) {
	stream, err := g.conn.Request(ctx, g.subject, question, id)
	if err != nil {
		return 0, err
	}
	for message, err := range stream.Messages() {
		if err != nil {
			return received, err
		}
		select {
		case c.messages <- message:
			received++
		case <-c.left:
			return received, presence.ErrOffline
		}
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
