package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	presence "github.com/nats-presence/nats-presence/bindings/go"
	"github.com/nats-presence/nats-presence/bindings/go/presencetest"
)

func TestMain(m *testing.M) {
	log.SetOutput(io.Discard)
	os.Exit(m.Run())
}

// start starts a nats-server, a worker of the subject "texts" and a gateway for the subjects "texts" and "unserved".
func start(t *testing.T, handler presence.Handler, configure ...func(*gateway)) (url string, w *presencetest.Worker) {
	t.Helper()
	server := presencetest.StartServer(t)
	w = presencetest.StartWorker(t, server.URL, "texts", handler)
	ctx, stop := context.WithCancel(context.Background())
	g := &gateway{
		ctx: ctx, conn: presencetest.Connect(t, server.URL), subjects: []string{"texts", "unserved"},
		ping: time.Minute, writeTimeout: time.Minute,
	}
	for _, f := range configure {
		f(g)
	}
	h := httptest.NewServer(g.handler())
	t.Cleanup(func() {
		stop()
		g.open.Wait() // nothing is left running
		h.Close()
	})
	return h.URL, w
}

// browser is a page with a socket.
type browser struct {
	t    *testing.T
	conn *websocket.Conn
	tcp  *net.TCPConn
	id   string
}

func open(t *testing.T, url string) *browser {
	t.Helper()
	b := &browser{t: t}
	transport := &http.Transport{DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		if err == nil {
			b.tcp = conn.(*net.TCPConn)
			b.tcp.SetReadBuffer(4096)
		}
		return conn, err
	}}
	options := &websocket.DialOptions{HTTPClient: &http.Client{Transport: transport}}
	var err error
	if b.conn, _, err = websocket.Dial(t.Context(), url+"/socket", options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.conn.CloseNow() })
	b.conn.SetReadLimit(-1)
	first := b.next()
	if first.Type != "id" {
		t.Fatal(first)
	}
	b.id = first.Data
	return b
}

func (b *browser) send(text string) {
	b.t.Helper()
	if err := b.conn.Write(b.t.Context(), websocket.MessageText, []byte(text)); err != nil {
		b.t.Fatal(err)
	}
}

func (b *browser) ask(stream, data string) {
	b.t.Helper()
	text, err := json.Marshal(frame{Type: "ask", Stream: stream, Data: data})
	if err != nil {
		b.t.Fatal(err)
	}
	b.send(string(text))
}

func (b *browser) next() (f frame) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), presencetest.Timeout)
	defer cancel()
	_, text, err := b.conn.Read(ctx)
	if err == nil {
		err = json.Unmarshal(text, &f)
	}
	if err != nil {
		b.t.Fatal(err)
	}
	return f
}

func (b *browser) want(want frame) {
	b.t.Helper()
	if f := b.next(); f != want {
		b.t.Fatalf("got %+v, want %+v", f, want)
	}
}

func wantError(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("got error %v, want %v", err, want)
	}
}

// post asks for a stream by /ask.
func post(t *testing.T, url, id, query string, body io.Reader) (status int, text string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "POST", url+"/ask"+query, body)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Connect-ID", id)
	response, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(answer)
}

// count answers "N" with N messages, "fail" with an error, and a longer text with that text until the client leaves.
func count(ctx context.Context, req *presence.Request, s *presence.Sender) error {
	if string(req.Data) == "fail" {
		return s.SendError(errors.New("password=hunter2"))
	}
	for len(req.Data) > 10 {
		if err := s.Send(req.Data); err != nil {
			return err
		}
	}
	n, err := strconv.Atoi(string(req.Data))
	for i := range n {
		s.Send(fmt.Append(nil, i, "\n"))
	}
	return err
}

// silent sends one message and then waits until the stream is stopped.
func silent(ctx context.Context, req *presence.Request, s *presence.Sender) error {
	s.Send(req.Data)
	<-ctx.Done()
	return nil
}

func TestManyStreamsShareOneSocket(t *testing.T) {
	url, _ := start(t, count)
	b := open(t, url)
	const streams, messages = 10, 100
	for i := range streams {
		b.ask(fmt.Sprint(i), fmt.Sprint(messages))
	}
	next, ended := make(map[string]int), 0
	for ended < streams {
		switch f := b.next(); {
		case f.Type == "message" && f.Data == fmt.Sprintln(next[f.Stream]):
			next[f.Stream]++
		case f.Type == "end" && next[f.Stream] == messages:
			ended++
		default:
			t.Fatalf("%+v after %d messages", f, next[f.Stream])
		}
	}
	b.ask("0", "1") // the name can be used again
	b.want(frame{Type: "message", Stream: "0", Data: "0\n"})
	b.want(frame{Type: "end", Stream: "0"})
}

func TestCancelStopsOneStream(t *testing.T) {
	url, worker := start(t, silent)
	b := open(t, url)
	for _, name := range []string{"a", "b"} {
		b.ask(name, name)
		b.want(frame{Type: "message", Stream: name, Data: name})
	}
	b.send(`{"type": "cancel", "stream": "unknown"}`)
	b.send(`{"type": "cancel", "stream": "a"}`)
	wantError(t, worker.WaitStopped(b.id), presence.ErrCancelled)
	b.want(frame{Type: "error", Stream: "a", Data: presence.ErrCancelled.Error()})
	if n := worker.Running(); n != 1 {
		t.Error(n, " streams run")
	}
}

func TestLeavingStopsAllStreamsOfTheClient(t *testing.T) {
	url, worker := start(t, silent)
	for name, leave := range map[string]func(*browser){
		"closes": func(b *browser) { b.conn.Close(websocket.StatusNormalClosure, "") },
		"breaks": func(b *browser) { b.tcp.SetLinger(0); b.conn.CloseNow() },
		"marked": func(b *browser) { presence.MarkClientOffline(b.id) },
	} {
		b, other := open(t, url), open(t, url)
		other.ask("other", "x")
		other.want(frame{Type: "message", Stream: "other", Data: "x"})
		for i := range 3 {
			b.ask(fmt.Sprint(i), name)
			b.want(frame{Type: "message", Stream: fmt.Sprint(i), Data: name})
		}
		asked := make(chan int, 1)
		go func() {
			status, _ := post(t, url, b.id, "?stream=posted", strings.NewReader(name))
			asked <- status
		}()
		b.want(frame{Type: "message", Stream: "posted", Data: name})
		leave(b)
		for range 4 {
			worker.WaitStopped(b.id)
		}
		if status := <-asked; status != 502 {
			t.Error(name, status)
		}
		if n := worker.Running(); n != 1 {
			t.Error(name, n, " streams run")
		}
		if status, text := post(t, url, b.id, "?stream=1", nil); status != 404 {
			t.Error(name, status, text)
		}
		other.conn.CloseNow()
		worker.WaitStopped(other.id)
	}
}

func TestAskForwardsToTheSocket(t *testing.T) {
	url, _ := start(t, count)
	b := open(t, url)
	if status, text := post(t, url, b.id, "?stream=s", strings.NewReader("2")); status != 200 || text != "2\n" {
		t.Error(status, text)
	}
	b.want(frame{Type: "message", Stream: "s", Data: "0\n"})
	b.want(frame{Type: "message", Stream: "s", Data: "1\n"})
	b.want(frame{Type: "end", Stream: "s"})
}

func TestErrorTextsOfWorkersDoNotReachTheBrowser(t *testing.T) {
	url, _ := start(t, count)
	b := open(t, url)
	b.ask("s", "fail")
	b.want(frame{Type: "error", Stream: "s", Data: presence.ErrRemote.Error()})
	status, text := post(t, url, b.id, "?stream=s", strings.NewReader("fail"))
	if status != 502 || strings.Contains(text, "hunter2") {
		t.Error(status, text)
	}
}

func TestAskAnswersBadInputClearly(t *testing.T) {
	url, worker := start(t, silent)
	b := open(t, url)
	b.ask("runs", "x")
	worker.WaitStarted(b.id)
	for _, c := range []struct {
		id, query string
		size      int
		status    int
		text      string
	}{
		{"", "?stream=s", 1, 400, "X-Connect-ID"},
		{"unknown", "?stream=s", 1, 404, "X-Connect-ID"},
		{b.id, "", 1, 400, "the stream's name has 0 bytes; give it 1 to 64"},
		{b.id, "?stream=" + strings.Repeat("x", 65), 1, 400, "the stream's name has 65 bytes"},
		{b.id, "?stream=s&subject=other", 1, 404, `there is no subject "other"`},
		{b.id, "?stream=s&subject=texts.*", 1, 404, `there is no subject "texts.*"`},
		{b.id, "?stream=runs", 1, 409, `stream "runs" runs already`},
		{b.id, "?stream=s", 10 << 20, 413, "larger than 1048576 bytes"},
		{b.id, "?stream=s&subject=unserved", 1, 503, "no worker"},
	} {
		status, text := post(t, url, c.id, c.query, bytes.NewReader(make([]byte, c.size)))
		if status != c.status || !strings.Contains(text, c.text) {
			t.Errorf("%d bytes for %q%s: %d %s", c.size, c.id, c.query, status, text)
		}
	}
}

func TestSocketAnswersBadInputClearly(t *testing.T) {
	url, _ := start(t, silent)
	b := open(t, url)
	const notRead = "the message is not a JSON object with texts"
	unknown, nobody := `there is no subject "x.>"`, presence.ErrNoResponders.Error()
	for text, want := range map[string]frame{
		"{":                {Type: "error", Data: notRead},
		`"x"`:              {Type: "error", Data: notRead},
		`{"stream": 1}`:    {Type: "error", Data: notRead},
		`{"type": "stop"}`: {Type: "error", Data: `type is "stop"; send ask or cancel`},
		`{"type": "ask"}`:  {Type: "error", Data: "the stream's name has 0 bytes; give it 1 to 64"},

		`{"type": "ask", "stream": "s", "subject": "x.>"}`:      {Type: "error", Stream: "s", Data: unknown},
		`{"type": "ask", "stream": "s", "subject": "unserved"}`: {Type: "error", Stream: "s", Data: nobody},
	} {
		b.send(text)
		b.want(want)
	}
	if err := b.conn.Write(t.Context(), websocket.MessageBinary, []byte("{}")); err != nil {
		t.Fatal(err)
	}
	b.want(frame{Type: "error", Data: notRead})
	for i := range maxStreams {
		b.ask(fmt.Sprint(i), "x")
		b.want(frame{Type: "message", Stream: fmt.Sprint(i), Data: "x"})
	}
	b.ask("more", "x")
	b.want(frame{Type: "error", Stream: "more", Data: "100 streams run; that is the limit"})
	b.ask("7", "x")
	b.want(frame{Type: "error", Stream: "7", Data: `stream "7" runs already`})
}

func TestLargeSocketMessageClosesTheConnection(t *testing.T) {
	url, _ := start(t, silent)
	b := open(t, url)
	go b.conn.Write(t.Context(), websocket.MessageText, make([]byte, 10<<20)) // the gateway closes while this writes
	_, _, err := b.conn.Read(t.Context())
	if status := websocket.CloseStatus(err); status != websocket.StatusMessageTooBig {
		t.Error(status, err)
	}
}

func TestPageOfAnotherHostIsRefused(t *testing.T) {
	url, _ := start(t, silent)
	options := &websocket.DialOptions{HTTPHeader: http.Header{"Origin": {"https://evil.example"}}}
	_, response, err := websocket.Dial(t.Context(), url+"/socket", options)
	if err == nil || response.StatusCode != 403 {
		t.Error(response.Status, err)
	}
}

// A browser that does not read blocks its workers, without memory, and is disconnected.
func TestBrowserThatNeverReadsIsDisconnected(t *testing.T) {
	url, worker := start(t, count, func(g *gateway) { g.writeTimeout = 300 * time.Millisecond })
	b := open(t, url)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for i := range 10 {
		b.ask(fmt.Sprint(i), strings.Repeat("x", 10_000))
	}
	for range 10 {
		worker.WaitStopped(b.id)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if used := int64(after.HeapAlloc) - int64(before.HeapAlloc); used > 32<<20 {
		t.Error(used, " bytes are left")
	}
}

func TestBrowserThatDoesNotAnswerPingsIsDisconnected(t *testing.T) {
	url, worker := start(t, silent, func(g *gateway) { g.ping, g.writeTimeout = time.Millisecond, 100*time.Millisecond })
	b := open(t, url)
	b.ask("s", "x")
	b.want(frame{Type: "message", Stream: "s", Data: "x"})
	worker.WaitStopped(b.id) // nobody reads, so nobody answers
}

func TestManyBrowsersLeaveNothingRunning(t *testing.T) {
	url, worker := start(t, silent)
	goroutines := runtime.NumGoroutine()
	browsers := make([]*browser, 200)
	for i := range browsers {
		browsers[i] = open(t, url)
		browsers[i].ask("s", "x")
		worker.WaitStarted(browsers[i].id)
	}
	for half := range 2 {
		for i := half; i < len(browsers); i += 2 {
			browsers[i].conn.CloseNow()
		}
		for i := half; i < len(browsers); i += 2 {
			worker.WaitStopped(browsers[i].id)
		}
	}
	worker.WaitIdle()
	end := time.Now().Add(presencetest.Timeout)
	for ; runtime.NumGoroutine() > goroutines+20; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d goroutines run, %d before", runtime.NumGoroutine(), goroutines)
		}
	}
}
