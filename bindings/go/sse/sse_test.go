package sse_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	presence "github.com/nats-presence/nats-presence/bindings/go"
	"github.com/nats-presence/nats-presence/bindings/go/presencetest"
	"github.com/nats-presence/nats-presence/bindings/go/sse"
)

// event is an event as EventSource dispatches it.
type event struct{ name, id, data string }

// source reads events as the HTML standard says ("9.2.6 Interpreting an event stream"). It is stricter: it fails for
// fields that a Writer never sends.
type source struct {
	in       *bufio.Reader
	response *http.Response
	leave    func()
	comments int
	id       string
}

// line returns the next line, which ends with CR LF, LF or CR.
func (s *source) line() (string, error) {
	var line []byte
	for {
		c, err := s.in.ReadByte()
		if err != nil {
			return "", err
		}
		switch c {
		case '\r':
			if next, _ := s.in.Peek(1); len(next) == 1 && next[0] == '\n' {
				s.in.Discard(1)
			}
			return string(line), nil
		case '\n':
			return string(line), nil
		}
		line = append(line, c)
	}
}

// next returns the next event. At the end of the response it returns io.EOF.
func (s *source) next() (event, error) {
	e, data, isEmpty := event{name: "message"}, []byte(nil), true
	for {
		line, err := s.line()
		if err == io.EOF && !isEmpty {
			return e, errors.New("the response ended within an event")
		} else if err != nil {
			return e, err
		}
		if line == "" {
			if data == nil {
				e, isEmpty = event{name: "message"}, true
				continue
			}
			e.id, e.data = s.id, strings.ToValidUTF8(string(bytes.TrimSuffix(data, []byte("\n"))), "\uFFFD")
			return e, nil
		}
		isEmpty = false
		field, value, _ := strings.Cut(line, ":")
		value = strings.TrimPrefix(value, " ")
		switch field {
		case "":
			s.comments++
		case "event":
			e.name = value
		case "id":
			s.id = value
		case "data":
			data = append(append(data, value...), '\n')
		default:
			return e, fmt.Errorf("unexpected line %q", line)
		}
	}
}

func (s *source) want(t *testing.T, want event) {
	t.Helper()
	if e, err := s.next(); err != nil || e != want {
		t.Fatalf("got event %q and error %v, want %q", e, err, want)
	}
}

func (s *source) wantEnd(t *testing.T) {
	t.Helper()
	if e, err := s.next(); err != io.EOF {
		t.Fatalf("got event %q and error %v, want the end", e, err)
	}
}

// serveHTTP starts an HTTP server that ends with the test, and returns its URL.
func serveHTTP(t testing.TB, handler http.HandlerFunc, configure ...func(*http.Server)) string {
	t.Helper()
	server := httptest.NewUnstartedServer(handler)
	server.Config.ErrorLog = log.New(io.Discard, "", 0) // thousands of lost connections
	for _, f := range configure {
		f(server.Config)
	}
	server.Start()
	t.Cleanup(server.Close)
	return server.URL
}

// open requests events.
func open(t testing.TB, url string) *source {
	t.Helper()
	ctx, leave := context.WithTimeout(context.Background(), presencetest.Timeout)
	t.Cleanup(leave)
	req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { response.Body.Close() })
	return &source{in: bufio.NewReader(response.Body), response: response, leave: leave}
}

// serveEvents serves the events that send sends.
func serveEvents(t testing.TB, send func(*sse.Writer), opts ...sse.Option) string {
	return serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		out, err := sse.NewWriter(w, r, opts...)
		if err != nil {
			t.Error(err)
			return
		}
		send(out)
		if err := out.Close(); err != nil {
			t.Error(err)
		}
	})
}

// gateway serves streams of a subject with Serve, whose results it sends to a channel.
func gateway(t testing.TB, url, subject string, opts ...sse.Option) (string, <-chan error) {
	t.Helper()
	conn := presencetest.Connect(t, url)
	results := make(chan error, 1<<12)
	return serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		// The context is not the request's: Serve must cancel the stream by itself.
		stream, err := conn.Request(context.Background(), subject, nil, r.URL.Query().Get("id"))
		if err != nil {
			t.Error(err)
			return
		}
		results <- sse.Serve(w, r, stream, opts...)
	}), results
}

func receive[T any](t testing.TB, from <-chan T) (value T) {
	t.Helper()
	select {
	case value = <-from:
	case <-time.After(presencetest.Timeout):
		t.Fatal("timed out: nothing was received")
	}
	return value
}

func wantError(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("got error %v, want %v", err, want)
	}
}

// messages are texts that add events or fields if they are sent as they are.
var messages = []string{
	"", "\n", "\r", "\r\n", "\n\n", "\r\r", "\n\r", "\r\n\r\n", "a\n", "a\r", "a\r\n", "\na", "a\nb", "a\rb", "a\r\nb",
	"a\n\nevent: evil", "a\r\revent: evil\rdata: x\r\r", "a\r\n\r\nevent: evil\r\ndata: x\r\n\r\n", "\n\r\n\r",
	"a\n\nid: 7\n\n", "\rretry: 1\r", "event: evil", "data: x", "id: 7", ":comment", " ", "  two spaces", "\t", ":",
	"\x00", "\u2028\u2029\u0085", "\ufeffBOM", "\xff\xfe\n\xc3", "\xc3\n\xa9", "你好\n世界",
	"end\n\nevent: end\ndata:\n\n",
}

// received returns what EventSource receives of a message: the standard leaves no other choice.
func received(message string) string {
	return strings.ToValidUTF8(strings.NewReplacer("\r\n", "\n", "\r", "\n").Replace(message), "\uFFFD")
}

func TestEveryMessageIsOneEvent(t *testing.T) {
	all := append([]string(nil), messages...)
	random := rand.New(rand.NewPCG(16, 2))
	for range 2000 {
		text := ""
		for range random.IntN(9) {
			text += []string{"\r", "\n", "\r\n", "data:", "event: x", "id:", ":", " ", "a", "é", "\xff"}[random.IntN(11)]
		}
		all = append(all, text)
	}
	s := open(t, serveEvents(t, func(w *sse.Writer) {
		for _, message := range all {
			w.Send(sse.Event{Data: []byte(message)})
		}
	}))
	for _, message := range all {
		want := received(message)
		if e, err := s.next(); err != nil || e != (event{"message", "", want}) {
			t.Fatalf("%q arrived as %q with error %v", message, e, err)
		}
	}
	s.wantEnd(t)
}

func TestEventHasNameAndID(t *testing.T) {
	s := open(t, serveEvents(t, func(w *sse.Writer) {
		w.Send(sse.Event{Name: "token", ID: "a:1", Data: []byte("x\ny")})
		for _, bad := range []sse.Event{{Name: "a\nb"}, {Name: "a\r"}, {ID: "1\n"}, {ID: "1\x00"}} {
			wantError(t, w.Send(bad), presence.ErrInvalid)
		}
	}))
	s.want(t, event{"token", "a:1", "x\ny"})
	s.wantEnd(t)
}

func TestHeadersPreventCachesBuffersAndCompression(t *testing.T) {
	s := open(t, serveEvents(t, func(w *sse.Writer) {}))
	s.wantEnd(t)
	h := s.response.Header
	if h.Get("Content-Type") != "text/event-stream" || h.Get("Cache-Control") != "no-store, no-transform" ||
		h.Get("X-Accel-Buffering") != "no" || h.Get("Content-Encoding") != "" {
		t.Error(h)
	}
}

func TestStreamEndsWithTheEndEvent(t *testing.T) {
	server := presencetest.StartServer(t)
	presencetest.StartWorker(t, server.URL, "texts",
		func(ctx context.Context, req *presence.Request, s *presence.Sender) error {
			for _, message := range messages {
				s.Send([]byte(message))
			}
			return nil
		})
	url, results := gateway(t, server.URL, "texts", sse.EndName("done"))
	s := open(t, url)
	for _, message := range messages {
		s.want(t, event{"message", "", received(message)})
	}
	s.want(t, event{"done", "", ""})
	s.wantEnd(t)
	wantError(t, receive(t, results), nil)
}

func TestIncompleteStreamEndsWithTheFailureEvent(t *testing.T) {
	server := presencetest.StartServer(t)
	presencetest.StartWorker(t, server.URL, "fails",
		func(ctx context.Context, req *presence.Request, s *presence.Sender) error {
			s.Send([]byte("one"))
			return s.SendError(errors.New("password=hunter2\n\nevent: end\n\n"))
		})
	url, results := gateway(t, server.URL, "fails")
	s := open(t, url)
	s.want(t, event{"message", "", "one"})
	s.want(t, event{"failure", "", presence.ErrRemote.Error()})
	s.wantEnd(t)
	wantError(t, receive(t, results), presence.ErrRemote)

	url, results = gateway(t, server.URL, "nobody")
	s = open(t, url)
	s.want(t, event{"failure", "", presence.ErrNoResponders.Error()})
	s.wantEnd(t)
	wantError(t, receive(t, results), presence.ErrNoResponders)

	url, _ = gateway(t, server.URL, "fails", sse.FailureName("broken"), sse.FailureText(error.Error))
	s = open(t, url)
	s.want(t, event{"message", "", "one"})
	s.want(t, event{"broken", "", "presence: password=hunter2\n\nevent: end\n\n"})
}

func TestWrongNameIsRefused(t *testing.T) {
	url := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		_, err := sse.NewWriter(w, r, sse.EndName("a\nb"))
		wantError(t, err, presence.ErrInvalid)
	})
	if status := open(t, url).response.StatusCode; status != 500 {
		t.Error(status)
	}
}

// unflushable hides the methods of a ResponseWriter, as some middleware does.
type unflushable struct{ http.ResponseWriter }

func (u unflushable) Unwrap() []int { return nil }

func TestResponseWriterWithoutFlushIsRefused(t *testing.T) {
	url := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		_, err := sse.NewWriter(unflushable{w}, r)
		wantError(t, err, errors.ErrUnsupported)
	})
	if status := open(t, url).response.StatusCode; status != 500 {
		t.Error(status)
	}
}

func TestKeepAliveIsAComment(t *testing.T) {
	enough := make(chan struct{})
	s := open(t, serveEvents(t, func(w *sse.Writer) {
		<-enough
		w.Send(sse.Event{Data: []byte("data")})
	}, sse.KeepAlive(time.Millisecond)))
	for s.comments < 3 {
		line, err := s.line()
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(line, ":") {
			s.comments++
		}
	}
	close(enough)
	s.want(t, event{"message", "", "data"})
	s.wantEnd(t)
}

func TestTimeoutsOfTheServerDoNotCutEvents(t *testing.T) {
	const timeout = 50 * time.Millisecond
	url := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		out, err := sse.NewWriter(w, r)
		if err != nil {
			t.Error(err)
			return
		}
		select {
		case <-out.Context().Done():
		case <-time.After(3 * timeout): // the behaviour under test is that nothing happens
		}
		out.Send(sse.Event{Name: "end"})
		wantError(t, out.Close(), nil)
	}, func(s *http.Server) { s.ReadTimeout, s.WriteTimeout = timeout, timeout })
	s := open(t, url)
	s.want(t, event{"end", "", ""})
	s.wantEnd(t)
}

// countWrites counts the writes of a connection.
type countWrites struct {
	http.ResponseWriter
	flushes int
}

func (c *countWrites) FlushError() error {
	c.flushes++
	return http.NewResponseController(c.ResponseWriter).Flush()
}

func (c *countWrites) Unwrap() http.ResponseWriter { return c.ResponseWriter }

// Messages that have arrived are flushed together; a message that arrives alone is flushed alone.
func TestWaitingEventsAreFlushedTogether(t *testing.T) {
	flushes := make(chan int, 1)
	next := make(chan struct{})
	url := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		counter := &countWrites{ResponseWriter: w}
		out, err := sse.NewWriter(counter, r)
		if err != nil {
			t.Error(err)
			return
		}
		out.Send(sse.Event{Data: []byte("alone")})
		<-next
		for i := range 10_000 {
			out.Send(sse.Event{Data: fmt.Append(nil, i)})
		}
		out.Close()
		flushes <- counter.flushes
	})
	s := open(t, url)
	s.want(t, event{"message", "", "alone"})
	close(next)
	for i := range 10_000 {
		s.want(t, event{"message", "", fmt.Sprint(i)})
	}
	if n := receive(t, flushes); n > 5000 {
		t.Errorf("10,000 events were flushed %d times", n)
	}
}

// endless sends messages until the stream is stopped.
func endless(ctx context.Context, req *presence.Request, s *presence.Sender) error {
	for text := bytes.Repeat([]byte("x"), 1000); s.Send(text) == nil; {
	}
	return nil
}

// silent sends one message and then waits until the stream is stopped.
func silent(ctx context.Context, req *presence.Request, s *presence.Sender) error {
	s.Send([]byte("one"))
	<-ctx.Done()
	return nil
}

func TestLeavingStopsTheWorkerThatSendsNothing(t *testing.T) {
	server := presencetest.StartServer(t)
	worker := presencetest.StartWorker(t, server.URL, "silent", silent)
	url, results := gateway(t, server.URL, "silent", sse.KeepAlive(0))
	s := open(t, url+"?id=me")
	s.want(t, event{"message", "", "one"})
	s.leave()
	wantError(t, worker.WaitStopped("me"), presence.ErrCancelled)
	err := receive(t, results)
	wantError(t, err, presence.ErrCancelled)
	wantError(t, err, context.Canceled)
}

func TestStreamsOverHTTP2(t *testing.T) {
	server := presencetest.StartServer(t)
	worker := presencetest.StartWorker(t, server.URL, "silent", silent)
	conn := presencetest.Connect(t, server.URL)
	results := make(chan error, 1)
	h := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		stream, err := conn.Request(context.Background(), "silent", nil, "me")
		if err != nil {
			t.Error(err)
			return
		}
		results <- sse.Serve(w, r, stream)
	}))
	h.EnableHTTP2 = true
	h.StartTLS()
	t.Cleanup(h.Close)
	response, err := h.Client().Get(h.URL)
	if err != nil {
		t.Fatal(err)
	}
	if response.ProtoMajor != 2 {
		t.Error(response.Proto)
	}
	s := &source{in: bufio.NewReader(response.Body)}
	s.want(t, event{"message", "", "one"})
	response.Body.Close()
	wantError(t, worker.WaitStopped("me"), presence.ErrCancelled)
	wantError(t, receive(t, results), presence.ErrCancelled)
}

// connectWithoutReading sends a request on a connection with a small buffer.
func connectWithoutReading(t testing.TB, url string) net.Conn {
	t.Helper()
	address := strings.TrimPrefix(strings.Split(url, "?")[0], "http://")
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.(*net.TCPConn).SetReadBuffer(4096)
	fmt.Fprintf(conn, "GET /%s HTTP/1.1\r\nHost: %s\r\n\r\n", strings.TrimPrefix(url, "http://"+address), address)
	return conn
}

// waitUntilBlocked waits until a worker that sends without end is blocked by its reader.
func waitUntilBlocked(t testing.TB, sent func() uint64) {
	t.Helper()
	for last, same, end := uint64(0), 0, time.Now().Add(presencetest.Timeout); same < 50; {
		time.Sleep(time.Millisecond)
		if n := sent(); n != last || n == 0 {
			last, same = n, 0
		} else {
			same++
		}
		if time.Now().After(end) {
			t.Fatal("the worker is not blocked")
		}
	}
}

func TestLeavingEndsAWriteThatIsBlocked(t *testing.T) {
	server := presencetest.StartServer(t)
	senders := make(chan *presence.Sender, 1)
	worker := presencetest.StartWorker(t, server.URL, "endless",
		func(ctx context.Context, req *presence.Request, s *presence.Sender) error {
			senders <- s
			return endless(ctx, req, s)
		})
	url, results := gateway(t, server.URL, "endless", sse.WriteTimeout(0))
	browser := connectWithoutReading(t, url+"?id=me")
	waitUntilBlocked(t, receive(t, senders).SendCount)
	browser.(*net.TCPConn).CloseWrite() // what it receives still has no space: the kernel does not end the write
	wantError(t, worker.WaitStopped("me"), presence.ErrCancelled)
	wantError(t, receive(t, results), presence.ErrCancelled)
}

func TestBrowserThatNeverReadsIsDisconnected(t *testing.T) {
	server := presencetest.StartServer(t)
	worker := presencetest.StartWorker(t, server.URL, "endless", endless)
	url, results := gateway(t, server.URL, "endless", sse.WriteTimeout(50*time.Millisecond))
	connectWithoutReading(t, url+"?id=me")
	wantError(t, worker.WaitStopped("me"), presence.ErrCancelled)
	wantError(t, receive(t, results), os.ErrDeadlineExceeded)
}

func TestSlowReaderGetsEverything(t *testing.T) {
	const count = 2000
	server := presencetest.StartServer(t)
	presencetest.StartWorker(t, server.URL, "many",
		func(ctx context.Context, req *presence.Request, s *presence.Sender) error {
			for i := range count {
				s.Send(fmt.Appendf(nil, "%d\n%s", i, strings.Repeat("x", 2000)))
			}
			return nil
		})
	url, results := gateway(t, server.URL, "many")
	s := open(t, url)
	for i := range count {
		s.want(t, event{"message", "", fmt.Sprintf("%d\n%s", i, strings.Repeat("x", 2000))})
		if i%100 == 0 {
			time.Sleep(2 * time.Millisecond) // this is what makes it slow
		}
	}
	s.want(t, event{"end", "", ""})
	wantError(t, receive(t, results), nil)
}

func TestLargeMessage(t *testing.T) {
	text := strings.Repeat("0123456789\n", 50_000)
	s := open(t, serveEvents(t, func(w *sse.Writer) {
		w.Send(sse.Event{Data: []byte(text)})
		w.Send(sse.Event{Data: []byte("after")})
	}))
	s.want(t, event{"message", "", text})
	s.want(t, event{"message", "", "after"})
	s.wantEnd(t)
}

func TestSendAfterCloseFails(t *testing.T) {
	results := make(chan error, 3)
	open(t, serveEvents(t, func(w *sse.Writer) {
		results <- w.Close()
		results <- w.Send(sse.Event{})
		results <- context.Cause(w.Context())
	})).wantEnd(t)
	wantError(t, receive(t, results), nil)
	wantError(t, receive(t, results), presence.ErrClosed)
	wantError(t, receive(t, results), presence.ErrClosed)
}

func TestManySendersShareOneConnection(t *testing.T) {
	s := open(t, serveEvents(t, func(w *sse.Writer) {
		var senders sync.WaitGroup
		for name := range 10 {
			senders.Add(1)
			go func() {
				defer senders.Done()
				for i := range 1000 {
					w.Send(sse.Event{Name: fmt.Sprint(name), Data: fmt.Append(nil, i)})
				}
			}()
		}
		senders.Wait()
	}))
	next := make(map[string]int)
	for range 10_000 {
		e, err := s.next()
		if err != nil || e.data != fmt.Sprint(next[e.name]) {
			t.Fatal(e, err)
		}
		next[e.name]++
	}
	s.wantEnd(t)
}

func heap() uint64 {
	runtime.GC()
	runtime.GC() // empties each sync.Pool
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// 2,000 browsers at once, half of which leave; then the other half leaves. Nothing is left running.
func TestManyBrowsersLeaveNothingRunning(t *testing.T) {
	const count = 2000
	server := presencetest.StartServer(t)
	worker := presencetest.StartWorker(t, server.URL, "silent", silent)
	url, results := gateway(t, server.URL, "silent", sse.WriteTimeout(time.Minute))
	goroutines, before := runtime.NumGoroutine(), heap()
	browsers := make([]net.Conn, count)
	for i := range browsers {
		browsers[i] = connectWithoutReading(t, fmt.Sprintf("%s?id=%d", url, i))
	}
	for range browsers {
		worker.WaitStarted("")
	}
	if used := int64(heap()) - int64(before); used > count*64<<10 {
		t.Errorf("%d browsers use %d bytes", count, used)
	}
	for half := range 2 {
		for i := half; i < count; i += 2 {
			browsers[i].Close()
		}
		for range count / 2 {
			worker.WaitStopped("")
			wantError(t, receive(t, results), presence.ErrCancelled)
		}
		if n := worker.Running(); n != count/2*(1-half) {
			t.Error(n, " streams run")
		}
	}
	end := time.Now().Add(presencetest.Timeout)
	for ; runtime.NumGoroutine() > goroutines+20; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d goroutines run, %d before", runtime.NumGoroutine(), goroutines)
		}
	}
	if used := int64(heap()) - int64(before); used > 16<<20 {
		t.Errorf("%d bytes are left", used)
	}
}
