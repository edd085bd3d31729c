// gateway URL LISTEN ORIGIN: a gateway between browsers and workers, over server-sent events and WebSocket.
//
//	GET /sse?client=ID&QUESTION    one stream as server-sent events: messages, then "end" or "failure"
//	GET /ws?client=ID              a WebSocket with any number of streams of one client
//
// Only pages of ORIGIN may use it. README.md in this folder has the protocol.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/coder/websocket"
	presence "github.com/nats-presence/nats-presence/bindings/go"
	"github.com/nats-presence/nats-presence/bindings/go/sse"
	"github.com/nats-presence/nats-presence/demo/report"
)

const (
	// The demo's heartbeats come more often than by default, so that a frozen worker is noticed after 3 s instead of 15.
	heartbeat = time.Second
	keepAlive = 10 * time.Second
	// A connection whose data is not acknowledged, or not read, for so long is closed.
	userTimeout = 20 * time.Second
	// The size of the kernel's send buffer. Its messages are computed even if the browser does not read them.
	socketBuffer = 32 << 10
	maxMessage   = 4096
	// For each WebSocket.
	maxStreams = 100
)

func main() {
	natsURL, address, origin := os.Args[1], os.Args[2], os.Args[3]
	conn, err := presence.Connect(natsURL, presence.Name("Go gateway"), presence.HeartbeatInterval(heartbeat))
	check(err)
	check(conn.ListenOffline())
	host, err := url.Parse(origin)
	check(err)
	g := &gateway{conn: conn, origin: origin, host: host.Host}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /sse", g.sse)
	mux.HandleFunc("GET /ws", g.ws)
	listener, err := listen(address)
	check(err)
	report.Event("ready", report.Fields{"port": listener.Addr().(*net.TCPAddr).Port})
	go func() {
		bufio.NewReader(os.Stdin).ReadByte() // returns when the demo ends
		conn.Close(context.Background())
		os.Exit(0)
	}()
	server := http.Server{Handler: g.protect(mux), MaxHeaderBytes: 16 << 10, ReadHeaderTimeout: 10 * time.Second}
	log.Fatal(server.Serve(listener))
}

func listen(address string) (net.Listener, error) {
	const tcpUserTimeout = 18 // TCP_USER_TIMEOUT of linux/tcp.h, which package syscall lacks
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var userTimeoutErr, bufferErr error
		err := c.Control(func(fd uintptr) { // accepted connections inherit the options
			ms := int(userTimeout.Milliseconds())
			userTimeoutErr = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout, ms)
			bufferErr = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUF, socketBuffer)
		})
		return errors.Join(err, userTimeoutErr, bufferErr)
	}}
	return config.Listen(context.Background(), "tcp", address)
}

type gateway struct {
	conn         *presence.Conn
	origin, host string
}

// protect lets only pages of the origin read answers, and refuses bodies.
func (g *gateway) protect(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if origin := r.Header.Get("Origin"); origin != "" && origin != g.origin {
			http.Error(w, fmt.Sprintf("pages of %q may not use this gateway", origin), http.StatusForbidden)
			return
		}
		w.Header().Set("Access-Control-Allow-Origin", g.origin)
		if r.ContentLength != 0 {
			w.Header().Set("Connection", "close")
			http.Error(w, "a request has no body: the prompt is a parameter", http.StatusRequestEntityTooLarge)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// question is what a client asks for.
type question struct {
	stream, subject, payload string
}

var (
	idPattern   = regexp.MustCompile(`^[A-Za-z0-9_-]{1,32}$`)
	ways        = map[string]bool{"presence": true, "plain": true}
	workerNames = map[string]bool{"any": true, "c": true, "go": true, "python": true}
)

const (
	maxPrompt = 1000
	maxLength = 100_000
	maxPause  = 1000
)

var errSubject = errors.New("")

// parse checks all parameters of a question. Its errors are for the client.
func parse(values url.Values, client string) (q question, err error) {
	stream, way, worker, prompt := values.Get("stream"), values.Get("mode"), values.Get("worker"), values.Get("prompt")
	length, lengthErr := strconv.Atoi(values.Get("length"))
	pause, pauseErr := strconv.Atoi(values.Get("pause"))
	switch {
	case !idPattern.MatchString(client):
		return q, badID("client", client)
	case !idPattern.MatchString(stream):
		return q, badID("stream", stream)
	case !ways[way] || !workerNames[worker]:
		return q, fmt.Errorf("%wno worker serves %.80q", errSubject, way+"."+worker)
	case lengthErr != nil || length < 1 || length > maxLength:
		return q, fmt.Errorf("length is %.80q, not a number from 1 to %d", values.Get("length"), maxLength)
	case pauseErr != nil || pause < 0 || pause > maxPause:
		return q, fmt.Errorf("pause is %.80q, not a number of milliseconds from 0 to %d", values.Get("pause"), maxPause)
	case len(prompt) > maxPrompt:
		return q, fmt.Errorf("prompt is %d bytes long; the limit is %d", len(prompt), maxPrompt)
	}
	name := client + "." + stream
	payload := fmt.Sprintf("%s %d %d %s", name, length, pause, strings.Join(strings.Fields(prompt), " "))
	return question{name, way + "." + worker, payload}, nil
}

func badID(what, value string) error {
	return fmt.Errorf("%s is %.80q, not 1 to 32 letters, digits, - or _", what, value)
}

// follow requests a stream, lets deliver forward it, and reports its life to the supervisor. ctx ends when the browser
// has left.
func (g *gateway) follow(
	ctx context.Context, q question, client string, deliver func(*presence.Stream) error,
) error {
	report.Event("ask", report.Fields{"stream": q.stream})
	stream, err := g.conn.Request(ctx, q.subject, []byte(q.payload), client)
	if err == nil {
		defer stream.Close()
		left := func() { report.Event("left", report.Fields{"stream": q.stream}) }
		stop := context.AfterFunc(ctx, left)
		err = deliver(stream)
		if stop() && (errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, errLeft)) {
			left() // the browser's connection is there, but the browser does not read
		}
	}
	var status presence.Status // the same number in all languages; 0: no error
	errors.As(err, &status)
	report.Event("ended", report.Fields{"stream": q.stream, "status": status})
	return err
}

func (g *gateway) sse(w http.ResponseWriter, r *http.Request) {
	client := r.URL.Query().Get("client")
	q, err := parse(r.URL.Query(), client)
	if err != nil {
		code := http.StatusBadRequest
		if errors.Is(err, errSubject) {
			code = http.StatusNotFound
		}
		http.Error(w, err.Error(), code)
		return
	}
	err = g.follow(r.Context(), q, client, func(stream *presence.Stream) error {
		return sse.Serve(w, r, stream, sse.KeepAlive(keepAlive), sse.WriteTimeout(userTimeout))
	})
	if err != nil && w.Header().Get("Content-Type") == "" {
		http.Error(w, err.Error(), http.StatusBadGateway) // the request could not be sent
	}
}

// ws serves a WebSocket. The browser sends "ask QUESTION" and "leave STREAM"; it gets "message STREAM TEXT",
// "end STREAM" and "failure STREAM TEXT".
func (g *gateway) ws(w http.ResponseWriter, r *http.Request) {
	client := r.URL.Query().Get("client")
	if !idPattern.MatchString(client) {
		http.Error(w, badID("client", client).Error(), http.StatusBadRequest)
		return
	}
	socket, err := websocket.Accept(w, r, &websocket.AcceptOptions{OriginPatterns: []string{g.host}})
	if err != nil {
		return // Accept has answered
	}
	defer socket.CloseNow()
	socket.SetReadLimit(maxMessage)
	ctx, leave := context.WithCancel(r.Context())
	defer leave() // ends all streams of this browser
	go ping(ctx, socket)
	s := &session{gateway: g, client: client, socket: socket, ctx: ctx, streams: map[string]context.CancelFunc{}}
	for {
		kind, message, err := socket.Read(ctx)
		if err != nil {
			return // the browser has left, or sent more than maxMessage
		}
		if kind != websocket.MessageText || !s.handle(string(message)) {
			socket.Close(websocket.StatusPolicyViolation, "a message is not \"ask QUESTION\" or \"leave STREAM\"")
			return
		}
	}
}

// ping closes the socket of a browser that vanished.
func ping(ctx context.Context, socket *websocket.Conn) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(keepAlive):
		}
		limited, cancel := context.WithTimeout(ctx, userTimeout)
		if socket.Ping(limited) != nil {
			socket.CloseNow()
		}
		cancel()
	}
}

// session is a browser with a WebSocket.
type session struct {
	*gateway
	client string
	socket *websocket.Conn
	ctx    context.Context

	mu      sync.Mutex
	streams map[string]context.CancelFunc // by the browser's name for the stream
}

// handle handles a message of the browser. It returns false if the message is malformed.
func (s *session) handle(message string) bool {
	verb, rest, _ := strings.Cut(message, " ")
	switch verb {
	case "leave":
		s.mu.Lock()
		defer s.mu.Unlock()
		if cancel := s.streams[rest]; cancel != nil {
			cancel()
		}
		return true
	case "ask":
		values, err := url.ParseQuery(rest)
		if err == nil {
			s.ask(values)
		}
		return err == nil
	}
	return false
}

func (s *session) ask(values url.Values) {
	q, err := parse(values, s.client)
	name := values.Get("stream")
	ctx, cancel := context.WithCancel(s.ctx)
	if err == nil {
		err = s.add(name, cancel)
	} else if !idPattern.MatchString(name) {
		name = "-"
	}
	if err != nil {
		cancel()
		s.write("failure", name, err.Error())
		return
	}
	go func() {
		err := s.follow(ctx, q, s.client, func(stream *presence.Stream) error {
			for message, err := range stream.Messages() {
				if err != nil {
					return err
				}
				if s.write("message", name, string(message)) != nil {
					return errLeft
				}
			}
			return nil
		})
		s.remove(name)
		cancel()
		if err != nil {
			s.write("failure", name, err.Error())
		} else {
			s.write("end", name, "")
		}
	}()
}

// errLeft means that the browser cannot be written to.
var errLeft = errors.New("the browser has left")

func (s *session) add(name string, cancel context.CancelFunc) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.streams[name] != nil {
		return fmt.Errorf("stream %s runs already", name)
	}
	if len(s.streams) == maxStreams {
		return fmt.Errorf("%d streams run already, which is the limit", maxStreams)
	}
	s.streams[name] = cancel
	return nil
}

func (s *session) remove(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.streams, name)
}

// write blocks while the browser does not read, for at most userTimeout.
func (s *session) write(kind, stream, text string) error {
	ctx, cancel := context.WithTimeout(s.ctx, userTimeout)
	defer cancel()
	return s.socket.Write(ctx, websocket.MessageText, []byte(kind+" "+stream+" "+text))
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
