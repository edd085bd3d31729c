// A gateway that serves browsers over WebSockets: any number of streams over the one connection of each browser.
//
//	GET  /socket  is the browser's connection. When it ends, the client has left.
//	POST /ask     requests a stream for the client whose id is in the header X-Connect-ID, with the body as payload. The
//	              messages are forwarded over the client's socket, under the stream name of the query (/ask?stream=NAME,
//	              and &subject=SUBJECT). The response is sent when the stream has ended.
//	              Status 400: the header or the name is missing. 404: no client with this id is connected, or the subject
//	              is not one of SUBJECTS. 409: a stream with this name runs. 413: the body is larger than 1 MiB. 429: too
//	              many streams run. 502: the stream ended early. 503: no worker serves the subject, or all are busy.
//
// Each WebSocket message is a JSON object with a type. The browser sends
//
//	{"type": "ask", "stream": NAME, "data": PAYLOAD, "subject": SUBJECT}   requests a stream; without a subject, from the
//	                                                                       first of SUBJECTS
//	{"type": "cancel", "stream": NAME}                                     stops it
//
// and receives
//
//	{"type": "id", "data": ID}                           first: the client's id
//	{"type": "message", "stream": NAME, "data": TEXT}    a message of the stream
//	{"type": "end", "stream": NAME}                      the stream is complete
//	{"type": "error", "stream": NAME, "data": WHY}       the stream is incomplete, or was not begun. Without a stream:
//	                                                     the gateway could not read what the browser sent.
//
// Each "ask" is answered by messages and one "end" or "error". After that its name can be used again. Text that is not
// UTF-8 arrives with U+FFFD in place of the wrong bytes.
//
// A browser that does not read blocks its own workers: nothing is buffered here. When it has read nothing for
// WRITE_TIMEOUT, or has not answered a ping for that time, it has left.
//
// Environment variables: NATS_URL, SUBJECTS (separated by commas), LISTEN, PING (10s), WRITE_TIMEOUT (20s).
package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/coder/websocket"
	presence "github.com/nats-presence/nats-presence/bindings/go"
)

const (
	// maxQuestion is the size of the largest payload of a request, and of the largest WebSocket message from a browser.
	maxQuestion = 1 << 20
	// maxStreams is how many streams of one browser run at once.
	maxStreams = 100
	maxName    = 64
)

func main() {
	log.SetFlags(log.Ltime | log.Lmicroseconds)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	conn, err := presence.Connect(setting("NATS_URL", "nats://127.0.0.1:4222"),
		presence.Name("go-websocket-gateway"),
		presence.WithLog(func(e presence.Event) { log.Print(e.Kind, " ", e.Text) }))
	check(err)
	// Also stop clients that other gateways announce offline.
	check(conn.ListenOffline())
	g := &gateway{ctx: ctx, conn: conn, subjects: strings.Split(setting("SUBJECTS", "pieces"), ",")}
	g.ping, err = time.ParseDuration(setting("PING", "10s"))
	check(err)
	g.writeTimeout, err = time.ParseDuration(setting("WRITE_TIMEOUT", "20s"))
	check(err)
	listener, err := net.Listen("tcp", setting("LISTEN", "127.0.0.1:8080"))
	check(err)
	log.Print("listening on ", listener.Addr())
	server := &http.Server{Handler: g.handler(), BaseContext: func(net.Listener) context.Context { return ctx }}
	shut := make(chan error)
	context.AfterFunc(ctx, func() { shut <- server.Shutdown(context.Background()) })
	if err := server.Serve(listener); err != http.ErrServerClosed {
		check(err)
	}
	check(<-shut)
	g.open.Wait() // Shutdown does not wait for WebSockets
	check(conn.Close(context.Background()))
}

type gateway struct {
	ctx                context.Context // ends with the program
	conn               *presence.Conn
	subjects           []string
	ping, writeTimeout time.Duration
	sockets            sync.Map // by the client's id: *socket
	open               sync.WaitGroup
}

func (g *gateway) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /socket", g.socket)
	mux.HandleFunc("POST /ask", g.ask)
	return mux
}

// frame is a WebSocket message.
type frame struct {
	Type    string `json:"type"`
	Stream  string `json:"stream,omitempty"`
	Subject string `json:"subject,omitempty"`
	Data    string `json:"data"`
}

// socket is the connection of a browser.
type socket struct {
	*gateway
	client *presence.Client
	conn   *websocket.Conn
	ctx    context.Context // ends with the connection, and when the client is marked offline

	mu      sync.Mutex
	streams map[string]context.CancelFunc // of the streams that run, by their names
	running sync.WaitGroup                // their goroutines
}

func (g *gateway) socket(w http.ResponseWriter, r *http.Request) {
	g.open.Add(1)
	defer g.open.Done()
	conn, err := websocket.Accept(w, r, nil) // refuses pages of other hosts
	if err != nil {
		return // Accept has answered
	}
	defer conn.CloseNow()
	conn.SetReadLimit(maxQuestion)
	id := rand.Text()
	client, err := presence.NewClient(id)
	check(err)
	ctx, cancel := context.WithCancel(g.ctx)
	s := &socket{gateway: g, client: client, conn: conn, ctx: ctx, streams: make(map[string]context.CancelFunc)}
	defer s.running.Wait()
	defer client.Close() // stops the client's streams, here and at the workers
	defer s.end(cancel)
	defer context.AfterFunc(client.Context(), cancel)()
	g.sockets.Store(id, s)
	defer g.sockets.Delete(id)
	s.running.Add(1)
	go s.keepAlive(cancel)
	s.write(frame{Type: "id", Data: id})
	for {
		kind, text, err := conn.Read(s.ctx)
		if err != nil {
			log.Printf("client=%s left: %v", id, err)
			return
		}
		var f frame
		switch err := json.Unmarshal(text, &f); {
		case err != nil || kind != websocket.MessageText:
			s.write(frame{Type: "error", Data: "the message is not a JSON object with texts"})
		case f.Type == "ask":
			s.begin(f)
		case f.Type == "cancel":
			s.mu.Lock()
			cancel := s.streams[f.Stream]
			s.mu.Unlock()
			if cancel != nil { // otherwise it has ended meanwhile
				cancel()
			}
		default:
			s.write(frame{Type: "error", Data: fmt.Sprintf("type is %.80q; send ask or cancel", f.Type)})
		}
	}
}

// end ends the socket: no stream begins after that.
func (s *socket) end(cancel context.CancelFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	cancel()
}

// keepAlive pings the browser: one that vanished without closing its connection does not answer.
func (s *socket) keepAlive(cancel context.CancelFunc) {
	defer s.running.Done()
	defer s.end(cancel)
	tick := time.NewTicker(s.ping)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-s.ctx.Done():
			return
		}
		ctx, done := context.WithTimeout(s.ctx, s.writeTimeout)
		err := s.conn.Ping(ctx)
		done()
		if err != nil {
			return
		}
	}
}

// write blocks while the browser does not read, at most for the write timeout. After that the connection is closed.
func (s *socket) write(f frame) error {
	text, err := json.Marshal(f)
	check(err)
	ctx, done := context.WithTimeout(s.ctx, s.writeTimeout)
	defer done()
	return s.conn.Write(ctx, websocket.MessageText, text)
}

// refusal is why a stream was not begun, and the status with which /ask says so.
type refusal struct {
	status int
	text   string
}

func (r *refusal) Error() string { return r.text }

// begin begins a stream that the browser has asked for.
func (s *socket) begin(f frame) {
	ctx, done, err := s.add(s.ctx, &f)
	if err != nil {
		s.write(frame{Type: "error", Stream: f.Stream, Data: err.Error()})
		return
	}
	go s.forward(ctx, f, done)
}

// add gives a stream its place among those of the browser. It returns a context that ends when the stream is cancelled,
// and a function that gives the place back.
func (s *socket) add(ctx context.Context, f *frame) (context.Context, func(), error) {
	f.Subject = cmp.Or(f.Subject, s.subjects[0])
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case len(f.Stream) == 0 || len(f.Stream) > maxName:
		text := fmt.Sprintf("the stream's name has %d bytes; give it 1 to %d", len(f.Stream), maxName)
		f.Stream = ""
		return nil, nil, &refusal{http.StatusBadRequest, text}
	case !slices.Contains(s.subjects, f.Subject):
		return nil, nil, &refusal{http.StatusNotFound, fmt.Sprintf("there is no subject %.80q", f.Subject)}
	case s.streams[f.Stream] != nil:
		return nil, nil, &refusal{http.StatusConflict, fmt.Sprintf("stream %q runs already", f.Stream)}
	case len(s.streams) == maxStreams:
		text := fmt.Sprintf("%d streams run; that is the limit", maxStreams)
		return nil, nil, &refusal{http.StatusTooManyRequests, text}
	case s.ctx.Err() != nil:
		return nil, nil, &refusal{http.StatusNotFound, "the client has left"}
	}
	ctx, cancel := context.WithCancel(ctx)
	s.streams[f.Stream] = cancel
	s.running.Add(1)
	return ctx, func() {
		s.mu.Lock()
		delete(s.streams, f.Stream)
		s.mu.Unlock()
		cancel()
		s.running.Done()
	}, nil
}

// forward forwards a stream to the browser, until it ends or ctx does. It returns the number of messages, and the
// reason if the stream ended early.
func (s *socket) forward(ctx context.Context, f frame, done func()) (received int, err error) {
	stream, err := s.client.Request(ctx, s.gateway.conn, f.Subject, []byte(f.Data))
	if err == nil {
		for message, streamErr := range stream.Messages() {
			if err = streamErr; err == nil {
				err = s.write(frame{Type: "message", Stream: f.Stream, Data: string(message)})
			}
			if err != nil {
				break
			}
			received++
		}
	}
	log.Printf("client=%s stream=%s received=%d why=%v", s.client.ID(), f.Stream, received, err)
	done() // the browser may use the name again when it has the end
	if err == nil {
		s.write(frame{Type: "end", Stream: f.Stream})
	} else { // the text of the error is only logged: it may contain a worker's, which the browser must not see
		status := presence.ErrInternal
		errors.As(err, &status)
		s.write(frame{Type: "error", Stream: f.Stream, Data: status.Error()})
	}
	return received, err
}

func (g *gateway) ask(w http.ResponseWriter, r *http.Request) {
	id := r.Header.Get("X-Connect-ID")
	if id == "" {
		http.Error(w, "set the header X-Connect-ID to the id that /socket sent", http.StatusBadRequest)
		return
	}
	found, ok := g.sockets.Load(id)
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
	s, query := found.(*socket), r.URL.Query()
	f := frame{Stream: query.Get("stream"), Subject: query.Get("subject"), Data: string(question)}
	ctx, done, err := s.add(r.Context(), &f)
	if refused := new(refusal); errors.As(err, &refused) {
		http.Error(w, refused.text, refused.status)
		return
	}
	received, err := s.forward(ctx, f, done)
	switch {
	case err == nil:
		fmt.Fprintln(w, received)
	case errors.Is(err, presence.ErrNoResponders) || errors.Is(err, presence.ErrBusy):
		http.Error(w, "no worker is available", http.StatusServiceUnavailable)
	default:
		http.Error(w, "the stream ended early", http.StatusBadGateway)
	}
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
