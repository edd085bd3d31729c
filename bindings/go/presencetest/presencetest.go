// Package presencetest helps to test programs that use package presence: it starts a nats-server and workers, and waits
// for what happens to their streams, without sleeps.
//
//	func TestLeavingStopsTheWorker(t *testing.T) {
//		server := presencetest.StartServer(t)
//		worker := presencetest.StartWorker(t, server.URL, "count", handler)
//		conn := presencetest.Connect(t, server.URL)
//		conn.Request(t.Context(), "count", nil, "me")
//		worker.WaitStarted("me")
//		presence.MarkClientOffline("me")
//		if why := worker.WaitStopped("me"); !errors.Is(why, presence.ErrOffline) {
//			t.Error(why)
//		}
//	}
//
// All that a test starts ends with the test.
package presencetest

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	presence "github.com/nats-presence/nats-presence/bindings/go"
)

// Timeout is how long a test waits for an event before it fails.
var Timeout = 20 * time.Second

// Server is a nats-server process.
type Server struct {
	URL string
	// Process is the server's process, for tests that pause it or kill it.
	Process *os.Process
	exited  chan struct{}
}

// StartServer starts a nats-server on a free port of the loopback interface, and waits until it is ready. The program
// is $NATS_SERVER_BIN, or nats-server in $PATH. args are further arguments, such as "-DV".
func StartServer(t testing.TB, args ...string) *Server {
	t.Helper()
	program := cmp.Or(os.Getenv("NATS_SERVER_BIN"), "nats-server")
	cmd := exec.Command(program, append([]string{"-a", "127.0.0.1", "-p", "-1"}, args...)...)
	log, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal("nats-server cannot be started; install it, or set NATS_SERVER_BIN to its path: ", err)
	}
	s := &Server{Process: cmd.Process, exited: make(chan struct{})}
	t.Cleanup(s.Kill)
	ready, output := make(chan string, 1), ""
	go func() {
		defer close(s.exited)
		url := ""
		for lines := bufio.NewScanner(log); lines.Scan(); {
			if url == "" {
				output += lines.Text() + "\n"
			}
			if found := listening.FindStringSubmatch(lines.Text()); found != nil {
				url = "nats://" + found[1]
			}
			if url != "" && strings.Contains(lines.Text(), "Server is ready") {
				ready <- url
			}
		}
		cmd.Wait()
	}()
	select {
	case s.URL = <-ready:
	case <-s.exited:
		t.Fatal("nats-server did not start:\n", output)
	case <-time.After(Timeout):
		t.Fatal("nats-server is not ready after ", Timeout)
	}
	return s
}

var listening = regexp.MustCompile(`Listening for client connections on (127\.0\.0\.1:\d+)`)

// Kill kills the server, and returns when its process has ended. Calling it again has no effect.
func (s *Server) Kill() {
	s.Process.Kill()
	<-s.exited
}

// Connect connects to nats-server. The connection is closed when the test ends.
func Connect(t testing.TB, url string, opts ...presence.ConnectOption) *presence.Conn {
	t.Helper()
	conn, err := presence.Connect(url, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), Timeout)
		defer cancel()
		conn.Close(ctx)
	})
	return conn
}

// Worker serves a subject, on a connection of its own, and records what happens to its streams.
type Worker struct {
	Conn *presence.Conn

	t       testing.TB
	subject string
	mu      sync.Mutex
	changed chan struct{} // closed, and replaced, by each event
	started []event
	ended   []event // ended by the handler, or stopped
	running int
}

// event is the start of a client's stream, or its end: why is nil if it was not stopped.
type event struct {
	clientID string
	why      error
}

// StartWorker starts a worker and waits until nats-server has its subscription: requests that are sent from then on
// arrive. handler is as for [presence.Conn.Serve].
func StartWorker(
	t testing.TB, url, subject string, handler presence.Handler, opts ...presence.ServeOption,
) *Worker {
	t.Helper()
	w := &Worker{Conn: Connect(t, url), t: t, subject: subject, changed: make(chan struct{})}
	service, err := w.Conn.Listen(context.Background(), subject, "workers", opts...)
	if err != nil {
		t.Fatal(err)
	}
	returned := make(chan error, 1)
	go func() {
		returned <- service.Serve(func(ctx context.Context, req *presence.Request, s *presence.Sender) error {
			w.record(&w.started, event{clientID: req.ClientID}, 1)
			context.AfterFunc(ctx, func() {
				end := event{clientID: req.ClientID}
				if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
					end.why = cause
				}
				w.record(&w.ended, end, -1)
			})
			return handler(ctx, req, s)
		})
	}()
	t.Cleanup(func() {
		service.Close()
		select {
		case <-returned:
		case <-time.After(Timeout):
			t.Errorf("a handler of %q still runs %v after its context ended", subject, Timeout)
		}
	})
	return w
}

// WaitStarted waits until a stream of the client begins. Each call reports one stream. With the empty id it waits for a
// stream of any client. It returns the client's id.
func (w *Worker) WaitStarted(clientID string) string {
	w.t.Helper()
	return w.wait(&w.started, clientID, "started", func(event) bool { return true }).clientID
}

// WaitStopped waits until a stream of the client is stopped before its handler has ended it, and returns the reason,
// such as [presence.ErrOffline]. Each call reports one stream. With the empty id it waits for a stream of any client.
func (w *Worker) WaitStopped(clientID string) error {
	w.t.Helper()
	return w.wait(&w.ended, clientID, "was stopped", func(e event) bool { return e.why != nil }).why
}

// WaitEnded waits until a stream of the client is ended by its handler. Each call reports one stream. With the empty id
// it waits for a stream of any client. It returns the client's id.
func (w *Worker) WaitEnded(clientID string) string {
	w.t.Helper()
	return w.wait(&w.ended, clientID, "was ended", func(e event) bool { return e.why == nil }).clientID
}

// WaitIdle waits until no stream runs.
func (w *Worker) WaitIdle() {
	w.t.Helper()
	w.waitUntil("no stream runs", func() bool { return w.running == 0 })
}

// Running returns how many streams run.
func (w *Worker) Running() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.running
}

func (w *Worker) record(events *[]event, e event, started int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	*events = append(*events, e)
	w.running += started
	close(w.changed)
	w.changed = make(chan struct{})
}

// wait waits for an event, and removes it.
func (w *Worker) wait(events *[]event, clientID, what string, matches func(event) bool) (found event) {
	w.t.Helper()
	statement := fmt.Sprintf("a stream of client %q on %q %s", clientID, w.subject, what)
	w.waitUntil(statement, func() bool {
		for i, e := range *events {
			if (clientID == "" || clientID == e.clientID) && matches(e) {
				found = e
				*events = append((*events)[:i:i], (*events)[i+1:]...)
				return true
			}
		}
		return false
	})
	return found
}

func (w *Worker) waitUntil(statement string, holds func() bool) {
	w.t.Helper()
	expired := time.After(Timeout)
	for {
		w.mu.Lock()
		isTrue, changed := holds(), w.changed
		w.mu.Unlock()
		if isTrue {
			return
		}
		select {
		case <-changed:
		case <-expired:
			w.mu.Lock()
			defer w.mu.Unlock()
			w.t.Fatalf("timed out after %v; this did not become true: %s (%d streams run; not waited for: %v started, %v ended)",
				Timeout, statement, w.running, w.started, w.ended)
		}
	}
}
