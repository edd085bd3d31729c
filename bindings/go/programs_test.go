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
	"syscall"
	"testing"
)

const module = "github.com/nats-presence/nats-presence/bindings/go"

// run runs a command to its end.
func run(t *testing.T, dir string, command ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), command[0], command[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=-buildvcs=false", "GOPROXY=off")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", command, err, out)
	}
	return string(out)
}

// program is one that runs until the test ends; lines is what it says on its standard error.
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

// says waits for a line, and returns what the expression's group matched.
func (p *program) says(t testing.TB, expression string) string {
	t.Helper()
	for {
		if found := regexp.MustCompile(expression).FindStringSubmatch(receive(t, p.lines)); found != nil {
			return found[len(found)-1]
		}
	}
}

// browser reads server-sent events until it leaves.
type browser struct {
	body     *bufio.Reader
	afterCR  bool // the last line ended with CR, so that a LF now belongs to it
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
			t.Fatal("no more events: ", err)
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
			t.Errorf("a line that no gateway sends: %q", line)
		}
	}
}

// data returns the data of the next event.
func (b *browser) data(t *testing.T) string {
	t.Helper()
	_, data := b.event(t)
	return data
}

// forged are messages that would add events and fields where their line ends reach the browser as they are.
var forged = []string{
	"a\n\nevent: evil\ndata: x\n\n", "b\r\revent: evil\rdata: x\r\r", "c\r\n\r\nevent: evil\r\ndata: x\r\n\r\n",
	"d\n\r\n\revent: evil\n\rdata: x\n\r", "\nid: 7\n", "\rretry: 1\r", "\r\nid: 7", ":comment", "", "event: evil", "  spaces ",
	"\n", "\r", "\r\n", "\r\r\n\n", "last\r",
}

// forge serves a subject with these messages.
func forge(t *testing.T, s *server, subject string) *serving {
	t.Helper()
	return serve(t, connect(t, s), subject, func(ctx context.Context, req *Request, s *Sender) error {
		for _, message := range forged {
			must(t, s.Send([]byte(message)))
		}
		return nil
	})
}

// seesNoForgery reads the events of forged messages: one for each, with the message's lines.
func (b *browser) seesNoForgery(t *testing.T) {
	t.Helper()
	for _, message := range forged {
		want := strings.NewReplacer("\r\n", "\n", "\r", "\n").Replace(message)
		if kind, data := b.event(t); kind != "message" || data != want {
			t.Fatalf("%q came as an event %q with %q", message, kind, data)
		}
	}
}

func TestExamples(t *testing.T) {
	dir := t.TempDir()
	run(t, ".", "go", "build", "-o", dir+"/", "./examples/...")
	s := startServer(t)
	env := []string{"NATS_URL=" + s.url, "SUBJECT=example", "QUEUE=q", "LISTEN=127.0.0.1:0", "PIECES=100", "DELAY=1ms"}
	worker := start(t, dir+"/worker", env...)
	worker.says(t, "serving example")
	gateway := start(t, dir+"/gateway", env...)
	url := "http://" + gateway.says(t, "listening on (.*)")

	b := browse(t, url+"/events")
	id := b.data(t)
	ask := func(id string) (status int, body string) {
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
	if status, body := ask("nobody"); status != 404 {
		t.Error(status, body)
	}

	answered := make(chan string, 1)
	begin := func() {
		go func() {
			status, body := ask(id)
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
	worker.says(t, "end client="+id+" sent=100 why=<nil>")
	gateway.says(t, "stream client="+id+" received=100 why=<nil>")

	begin()
	b.data(t)
	b.leave()
	worker.says(t, "end client="+id+" sent=[0-9]+ why=presence: .*client is offline")
	gateway.says(t, "stream client="+id+" received=[0-9]+ why=.*offline")
	receive(t, answered)
}

func buildGateway(t *testing.T) (path string) {
	t.Helper()
	path = t.TempDir() + "/gateway"
	run(t, ".", "go", "build", "-o", path, "./examples/gateway")
	return path
}

// The text of a worker's error is for the gateway's log.
func TestBrowserReadsNoErrorText(t *testing.T) {
	s := startServer(t)
	serve(t, connect(t, s), "fail", func(ctx context.Context, req *Request, s *Sender) error {
		return s.SendError(errors.New("password=hunter2"))
	})
	gateway := start(t, buildGateway(t), "NATS_URL="+s.url, "SUBJECT=fail", "LISTEN=127.0.0.1:0")
	url := "http://" + gateway.says(t, "listening on (.*)")
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
	gateway.says(t, "why=.*hunter2")
	b.leave()
}

// askFor requests a stream for the browser with this id; what it is answered is of no interest.
func askFor(t *testing.T, url, id string) {
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

func TestNoMessageForgesEvents(t *testing.T) {
	s := startServer(t)
	forge(t, s, "forge")
	gateway := start(t, buildGateway(t), "NATS_URL="+s.url, "SUBJECT=forge", "LISTEN=127.0.0.1:0")
	url := "http://" + gateway.says(t, "listening on (.*)")
	b := browse(t, url+"/events")
	kind, id := b.event(t)
	if kind != "id" {
		t.Error(kind, id)
	}
	askFor(t, url, id)
	b.seesNoForgery(t)
	b.leave()
}

// A browser whose machine answers nothing any more, not even with a reset, has left.
func TestBrowserVanishes(t *testing.T) {
	s := startServer(t)
	worker := connect(t, s)
	left := make(chan error, 1)
	serve(t, worker, "vanish", func(ctx context.Context, req *Request, s *Sender) error {
		must(t, s.Send([]byte("first")))
		left <- until(t, ctx) // and sends nothing that would be acknowledged
		return nil
	})
	gateway := start(t, buildGateway(t), "NATS_URL="+s.url, "SUBJECT=vanish", "LISTEN=127.0.0.1:0",
		"KEEP_ALIVE=100ms", "USER_TIMEOUT=500ms")
	url := "http://" + gateway.says(t, "listening on (.*)")
	b := browse(t, url+"/events")
	id := b.data(t)
	askFor(t, url, id)
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
		t.Error("it left early")
	}
	raw, err := b.conn.(*net.TCPConn).SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) {
		dropAll := []syscall.SockFilter{{Code: syscall.BPF_RET | syscall.BPF_K}}
		must(t, syscall.AttachLsf(int(fd), dropAll))
	}))
	wantError(t, receive(t, left), ErrOffline, id)
	gateway.says(t, "stream client="+id+" received=1 why=.*offline")
}

// The README's programs, as they are but for the addresses.
func TestReadme(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	must(t, err)
	programs := regexp.MustCompile("(?s)```go\n(package main.*?)```").FindAllSubmatch(readme, -1)
	if len(programs) != 2 {
		t.Fatalf("%d programs in the README", len(programs))
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
		t.Error("not formatted: ", bad)
	}
	run(t, dir, "go", "vet", "./...")
	run(t, dir, "go", "build", "-o", dir+"/bin/", "./...")
	start(t, dir+"/bin/gateway")
	forging := forge(t, s, "count")
	forgery := browse(t, "http://"+free.Addr().String()+"/count")
	forgery.seesNoForgery(t)
	forgery.leave()
	forging.stop()
	must(t, receive(t, forging.result))
	worker := start(t, dir+"/bin/worker")
	probe := connect(t, s)
	_, err = ask(t, probe, "count", "probe", With("retries", "1000"), With("retry_delay_ms", "10")).Next(t.Context())
	must(t, err)
	b := browse(t, "http://"+free.Addr().String()+"/count")
	for i := range 3 {
		if data := b.data(t); data != fmt.Sprint(i) {
			t.Error(i, data)
		}
	}
	b.leave()
	worker.says(t, "[0-9A-Z]{26}: presence: .*cancelled")
}

// The package builds from another module's vendor folder, shared and static; the static program needs no file of ours.
func TestVendor(t *testing.T) {
	dir := t.TempDir()
	here, err := filepath.Abs(".")
	must(t, err)
	must(t, os.WriteFile(dir+"/go.mod", fmt.Appendf(nil,
		"module stranger\n\ngo 1.24\n\nrequire %s v0.0.0\n\nreplace %s => %s\n", module, module, here), 0o644))
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
		t.Errorf("shared says %q", out)
	}
	if out := run(t, dir, "env", "-u", "LD_LIBRARY_PATH", "./static"); out != want {
		t.Errorf("static says %q", out)
	}
	if out := run(t, dir, "ldd", "./static"); strings.Contains(out, "nats_presence") {
		t.Errorf("static needs %s", out)
	}
}
