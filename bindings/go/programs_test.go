package presence

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
)

const module = "github.com/nats-presence/nats-presence/bindings/go"

// run runs a command and returns its output.
func run(t *testing.T, dir string, command ...string) string {
	t.Helper()
	out, err := output(dir, command...)
	must(t, err)
	return out
}

// output runs a command and returns its output. Programs are built without cgocheck2, as the rest of `make test` builds
// Go programs, so that the standard library is compiled once for all of them.
func output(dir string, command ...string) (string, error) {
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=-buildvcs=false", "GOPROXY=off", "GOEXPERIMENT=")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%v: %w\n%s", command, err, out)
	}
	return string(out), nil
}

// buildsPrograms runs the test in parallel with others of its kind, because compilers are slow. Short mode skips it.
func buildsPrograms(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("builds programs")
	}
	t.Parallel()
}

// exampleDir contains the programs of examples/ once examplePrograms was called. TestMain removes it.
var exampleDir string

var buildExamples = sync.OnceValue(func() (err error) {
	if exampleDir, err = os.MkdirTemp("", "presence-examples-"); err != nil {
		return err
	}
	_, err = output(".", "go", "build", "-o", exampleDir+"/", "./examples/...")
	return err
})

// examplePrograms builds the programs of examples/, once for all tests, and returns their directory.
func examplePrograms(t *testing.T) (dir string) {
	t.Helper()
	buildsPrograms(t)
	must(t, buildExamples())
	return exampleDir
}

// program is a program that runs until the test ends; lines receives its standard error.
type program struct{ lines chan string }

func start(t testing.TB, path string, env ...string) *program {
	t.Helper()
	cmd := exec.Command(path)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.StderrPipe()
	must(t, err)
	must(t, cmd.Start())
	p := &program{make(chan string, 1<<10)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			p.lines <- lines.Text()
		}
		if err := cmd.Wait(); err != nil && cmd.ProcessState.Exited() {
			t.Error(filepath.Base(path), ": ", err)
		}
	}()
	t.Cleanup(func() {
		cmd.Process.Signal(os.Interrupt)
		receive(t, done)
	})
	return p
}

// waitForLine waits for a line that matches, and returns what the last group of the expression matched.
func (p *program) waitForLine(t testing.TB, expression string) string {
	t.Helper()
	for {
		if found := regexp.MustCompile(expression).FindStringSubmatch(receive(t, p.lines)); found != nil {
			return found[len(found)-1]
		}
	}
}

// browser reads server-sent events.
type browser struct {
	body     *bufio.Reader
	afterCR  bool // the last line ended with CR: a LF that follows belongs to it
	comments int
	leave    context.CancelFunc
	conn     net.Conn
}

func browse(t *testing.T, url string) *browser {
	t.Helper()
	ctx, leave := context.WithCancel(t.Context())
	t.Cleanup(leave)
	b := &browser{leave: leave}
	transport := &http.Transport{DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		b.conn = conn
		return conn, err
	}}
	t.Cleanup(transport.CloseIdleConnections)
	req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	must(t, err)
	var response *http.Response
	eventually(t, "the gateway answers", func() bool {
		response, err = transport.RoundTrip(req)
		return err == nil
	})
	if response.StatusCode != 200 || response.Header.Get("Content-Type") != "text/event-stream" {
		t.Fatal(response.Status, response.Header)
	}
	b.body = bufio.NewReader(response.Body)
	return b
}

// line returns the next line, which ends with CR LF, LF or CR as the standard of server-sent events says.
func (b *browser) line() (string, error) {
	var line []byte
	for {
		c, err := b.body.ReadByte()
		if err != nil {
			return "", err
		}
		if b.afterCR && c == '\n' {
			b.afterCR = false
			continue
		}
		b.afterCR = c == '\r'
		if c == '\r' || c == '\n' {
			return string(line), nil
		}
		line = append(line, c)
	}
}

// event returns the next event's type and data.
func (b *browser) event(t *testing.T) (kind, data string) {
	t.Helper()
	kind = "message"
	var lines []string
	for {
		line, err := b.line()
		if err != nil {
			t.Fatal("the events ended: ", err)
		}
		field, value, _ := strings.Cut(line, ":")
		value = strings.TrimPrefix(value, " ")
		switch {
		case line == "" && lines != nil:
			return kind, strings.Join(lines, "\n")
		case line == "":
			kind = "message"
		case field == "":
			b.comments++
		case field == "event":
			kind = value
		case field == "data":
			lines = append(lines, value)
		default:
			t.Errorf("unexpected line %q", line)
		}
	}
}

// data returns the data of the next event.
func (b *browser) data(t *testing.T) string {
	t.Helper()
	_, data := b.event(t)
	return data
}

// injections are messages that add events and fields if their line endings reach the browser unchanged.
var injections = []string{
	"a\n\nevent: evil\ndata: x\n\n", "b\r\revent: evil\rdata: x\r\r", "c\r\n\r\nevent: evil\r\ndata: x\r\n\r\n",
	"d\n\r\n\revent: evil\n\rdata: x\n\r", "\nid: 7\n", "\rretry: 1\r", "\r\nid: 7", ":comment", "", "event: evil", "  spaces ",
	"\n", "\r", "\r\n", "\r\r\n\n", "last\r",
}

// serveInjections serves a subject with these messages.
func serveInjections(t *testing.T, s *server, subject string) *serving {
	t.Helper()
	return serve(t, connect(t, s), subject, func(ctx context.Context, req *Request, s *Sender) error {
		for _, message := range injections {
			must(t, s.Send([]byte(message)))
		}
		return nil
	})
}

// checkNoInjection checks that the browser gets one event for each of the injections, with the lines of the message.
func (b *browser) checkNoInjection(t *testing.T) {
	t.Helper()
	for _, message := range injections {
		want := strings.NewReplacer("\r\n", "\n", "\r", "\n").Replace(message)
		if kind, data := b.event(t); kind != "message" || data != want {
			t.Fatalf("%q arrived as an event %q with %q", message, kind, data)
		}
	}
}

func TestExamplePrograms(t *testing.T) {
	dir := examplePrograms(t)
	s := startServer(t)
	env := []string{"NATS_URL=" + s.url, "SUBJECT=example", "QUEUE=q", "LISTEN=127.0.0.1:0", "PIECES=100", "DELAY=1ms"}
	worker := start(t, dir+"/worker", env...)
	worker.waitForLine(t, "serving example")
	gateway := start(t, dir+"/gateway", env...)
	url := "http://" + gateway.waitForLine(t, "listening on (.*)")

	b := browse(t, url+"/events")
	id := b.data(t)
	post := func(id string) (status int, body string) {
		req, err := http.NewRequestWithContext(t.Context(), "POST", url+"/ask", strings.NewReader("question"))
		must(t, err)
		req.Header.Set("X-Connect-ID", id)
		response, err := http.DefaultClient.Do(req)
		if err != nil {
			return 0, err.Error()
		}
		defer response.Body.Close()
		text, _ := io.ReadAll(response.Body)
		return response.StatusCode, string(text)
	}
	if status, body := post("unknown"); status != 404 {
		t.Error(status, body)
	}

	answered := make(chan string, 1)
	begin := func() {
		go func() {
			status, body := post(id)
			answered <- fmt.Sprint(status, " ", body)
		}()
	}
	begin()
	for i := range 100 {
		if data := b.data(t); data != fmt.Sprint("piece ", i) {
			t.Fatal(i, data)
		}
	}
	if answer := receive(t, answered); answer != "200 100\n" {
		t.Error(answer)
	}
	worker.waitForLine(t, "end client="+id+" sent=100 why=<nil>")
	gateway.waitForLine(t, "stream client="+id+" received=100 why=<nil>")

	begin()
	b.data(t)
	b.leave()
	worker.waitForLine(t, "end client="+id+" sent=[0-9]+ why=presence: .*offline")
	gateway.waitForLine(t, "stream client="+id+" received=[0-9]+ why=.*offline")
	receive(t, answered)
}

// The gateway logs the text of a worker's error and does not send it to the browser.
func TestBrowserDoesNotGetErrorTexts(t *testing.T) {
	dir := examplePrograms(t)
	s := startServer(t)
	serve(t, connect(t, s), "fail", func(ctx context.Context, req *Request, s *Sender) error {
		return s.SendError(errors.New("password=hunter2"))
	})
	gateway := start(t, dir+"/gateway", "NATS_URL="+s.url, "SUBJECT=fail", "LISTEN=127.0.0.1:0")
	url := "http://" + gateway.waitForLine(t, "listening on (.*)")
	b := browse(t, url+"/events")
	req, err := http.NewRequestWithContext(t.Context(), "POST", url+"/ask", nil)
	must(t, err)
	req.Header.Set("X-Connect-ID", b.data(t))
	response, err := http.DefaultClient.Do(req)
	must(t, err)
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	must(t, err)
	if response.StatusCode != 502 || strings.Contains(string(text), "hunter2") {
		t.Error(response.Status, string(text))
	}
	gateway.waitForLine(t, "why=.*hunter2")
	b.leave()
}

func TestAskAnswersBadInputClearly(t *testing.T) {
	dir := examplePrograms(t)
	s := startServer(t)
	gateway := start(t, dir+"/gateway", "NATS_URL="+s.url, "SUBJECT=unserved", "LISTEN=127.0.0.1:0")
	url := "http://" + gateway.waitForLine(t, "listening on (.*)")
	b := browse(t, url+"/events")
	id := b.data(t)
	for _, c := range []struct {
		id     string
		size   int
		status int
		text   string
	}{
		{"", 10, 400, "X-Connect-ID"},
		{"unknown", 10, 404, "X-Connect-ID"},
		{strings.Repeat("x", 5000), 10, 404, "X-Connect-ID"},
		{id, 10 << 20, 413, "larger than 1048576 bytes"},
		{id, 10, 503, "no worker"},
	} {
		req, err := http.NewRequestWithContext(t.Context(), "POST", url+"/ask", bytes.NewReader(make([]byte, c.size)))
		must(t, err)
		req.Header.Set("X-Connect-ID", c.id)
		response, err := http.DefaultClient.Do(req)
		must(t, err)
		text, err := io.ReadAll(response.Body)
		must(t, err)
		response.Body.Close()
		if response.StatusCode != c.status || !strings.Contains(string(text), c.text) {
			t.Errorf("%d bytes for %.20q: %s %s", c.size, c.id, response.Status, text)
		}
	}
	b.leave()
}

// requestFor requests a stream for the browser with this id, and ignores the response.
func requestFor(t *testing.T, url, id string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "POST", url+"/ask", nil)
	must(t, err)
	req.Header.Set("X-Connect-ID", id)
	go func() {
		if response, err := http.DefaultClient.Do(req); err == nil {
			response.Body.Close()
		}
	}()
}

func TestMessagesCannotInjectEvents(t *testing.T) {
	dir := examplePrograms(t)
	s := startServer(t)
	serveInjections(t, s, "forge")
	gateway := start(t, dir+"/gateway", "NATS_URL="+s.url, "SUBJECT=forge", "LISTEN=127.0.0.1:0")
	url := "http://" + gateway.waitForLine(t, "listening on (.*)")
	b := browse(t, url+"/events")
	kind, id := b.event(t)
	if kind != "id" {
		t.Error(kind, id)
	}
	requestFor(t, url, id)
	b.checkNoInjection(t)
	b.leave()
}

// The browser's machine answers nothing any more, not even with a reset.
func TestVanishedBrowserStopsItsWorker(t *testing.T) {
	dir := examplePrograms(t)
	s := startServer(t)
	worker := connect(t, s)
	left := make(chan error, 1)
	serve(t, worker, "vanish", func(ctx context.Context, req *Request, s *Sender) error {
		must(t, s.Send([]byte("first")))
		left <- waitForEnd(t, ctx) // without sending anything that could be acknowledged
		return nil
	})
	gateway := start(t, dir+"/gateway", "NATS_URL="+s.url, "SUBJECT=vanish", "LISTEN=127.0.0.1:0",
		"KEEP_ALIVE=100ms", "USER_TIMEOUT=500ms")
	url := "http://" + gateway.waitForLine(t, "listening on (.*)")
	b := browse(t, url+"/events")
	id := b.data(t)
	requestFor(t, url, id)
	if data := b.data(t); data != "first" {
		t.Error(data)
	}
	for b.comments < 2 {
		if line, err := b.line(); err != nil {
			t.Fatal(err)
		} else if strings.HasPrefix(line, ":") {
			b.comments++
		}
	}
	if len(left) != 0 {
		t.Error("the worker stopped early")
	}
	raw, err := b.conn.(*net.TCPConn).SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) {
		dropAll := []syscall.SockFilter{{Code: syscall.BPF_RET | syscall.BPF_K}}
		must(t, syscall.AttachLsf(int(fd), dropAll))
	}))
	wantError(t, receive(t, left), ErrOffline, id)
	gateway.waitForLine(t, "stream client="+id+" received=1 why=.*offline")
}

// The README's programs work; the test changes only their addresses.
func TestReadmePrograms(t *testing.T) {
	buildsPrograms(t)
	readme, err := os.ReadFile("README.md")
	must(t, err)
	programs := regexp.MustCompile("(?s)```go\n(package main.*?)```").FindAllSubmatch(readme, -1)
	if len(programs) != 2 {
		t.Fatalf("the README has %d programs, want 2", len(programs))
	}
	s := startServer(t)
	free, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	free.Close()
	dir := t.TempDir()
	here, err := filepath.Abs(".")
	must(t, err)
	must(t, os.WriteFile(dir+"/go.mod", fmt.Appendf(nil,
		"module readme\n\ngo 1.24\n\nrequire %s v0.0.0\n\nreplace %s => %s\n", module, module, here), 0o644))
	for i, name := range []string{"worker", "gateway"} {
		text := programs[i][1]
		code := regexp.MustCompile(`(?s)import \(.*?\)\n`).ReplaceAll(text, nil)
		if lines := len(regexp.MustCompile(`(?m)^.*\S`).FindAll(code, -1)); lines > 26 {
			t.Errorf("%s has %d lines without its imports", name, lines)
		}
		text = bytes.ReplaceAll(text, []byte("nats://127.0.0.1:4222"), []byte(s.url))
		text = bytes.ReplaceAll(text, []byte("127.0.0.1:8080"), []byte(free.Addr().String()))
		must(t, os.Mkdir(dir+"/"+name, 0o755))
		must(t, os.WriteFile(dir+"/"+name+"/main.go", text, 0o644))
	}
	if bad := run(t, dir, "gofmt", "-l", "."); bad != "" {
		t.Error("not formatted by gofmt: ", bad)
	}
	run(t, dir, "go", "vet", "./...")
	run(t, dir, "go", "build", "-o", dir+"/bin/", "./...")
	start(t, dir+"/bin/gateway")
	injecting := serveInjections(t, s, "count")
	victim := browse(t, "http://"+free.Addr().String()+"/count")
	victim.checkNoInjection(t)
	victim.leave()
	injecting.stop()
	must(t, receive(t, injecting.result))
	worker := start(t, dir+"/bin/worker")
	probe := connect(t, s)
	_, err = request(t, probe, "count", "probe", With("retries", "1000"), With("retry_delay_ms", "10")).Next(t.Context())
	must(t, err)
	b := browse(t, "http://"+free.Addr().String()+"/count")
	for i := range 3 {
		if data := b.data(t); data != fmt.Sprint(i) {
			t.Error(i, data)
		}
	}
	b.leave()
	worker.waitForLine(t, "[0-9A-Z]{26}: presence: .*cancelled")
}

// The package builds from another module's vendor folder. The static program needs no file of the library.
func TestVendoredPackageBuildsSharedAndStatic(t *testing.T) {
	buildsPrograms(t)
	dir := t.TempDir()
	here, err := filepath.Abs(".")
	must(t, err)
	must(t, os.WriteFile(dir+"/go.mod", fmt.Appendf(nil,
		"module user\n\ngo 1.24\n\nrequire %s v0.0.0\n\nreplace %s => %s\n", module, module, here), 0o644))
	must(t, os.WriteFile(dir+"/main.go", []byte(`package main

import presence "`+module+`"

func main() {
	if presence.MarkClientOnline("me") != nil || !presence.IsClientOnline("me") {
		panic("not online")
	}
	println("online", presence.Version())
}
`), 0o644))
	run(t, dir, "go", "mod", "vendor")
	run(t, dir, "go", "build", "-mod=vendor", "-o", "shared")
	run(t, dir, "go", "build", "-mod=vendor", "-tags", "presence_static", "-o", "static")
	want := "online " + Version() + "\n"
	if out := run(t, dir, "./shared"); out != want {
		t.Errorf("the shared program printed %q", out)
	}
	if out := run(t, dir, "env", "-u", "LD_LIBRARY_PATH", "./static"); out != want {
		t.Errorf("the static program printed %q", out)
	}
	if out := run(t, dir, "ldd", "./static"); strings.Contains(out, "nats_presence") {
		t.Errorf("the static program needs %s", out)
	}
}
