package message

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// program is a program that runs until the test ends; lines receives its log.
type program struct {
	lines chan string
	stop  func()
}

func startProgram(t testing.TB, path string, env ...string) *program {
	t.Helper()
	cmd := exec.Command(path)
	cmd.Env = append(os.Environ(), env...)
	log, err := cmd.StderrPipe()
	must(t, err)
	must(t, cmd.Start())
	p := &program{lines: make(chan string, 1024)}
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		for lines := bufio.NewScanner(log); lines.Scan(); {
			p.lines <- lines.Text()
		}
		cmd.Wait()
	}()
	p.stop = func() {
		cmd.Process.Signal(os.Interrupt)
		receive(t, exited)
	}
	t.Cleanup(p.stop)
	return p
}

// waitForLine waits for a line that matches, and returns what the group of the expression matched.
func (p *program) waitForLine(t testing.TB, expression string) string {
	t.Helper()
	for {
		if found := regexp.MustCompile(expression).FindStringSubmatch(receive(t, p.lines)); found != nil {
			return found[len(found)-1]
		}
	}
}

// A worker and a gateway for such a package, with only the import path changed: the worker stops when the browser
// leaves, and goes on for another browser.
func TestExamplesStopForABrowserThatLeaves(t *testing.T) {
	dir := t.TempDir()
	build := exec.Command("go", "build", "-o", dir+"/", "./examples/...")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	s := startServer(t, "")
	free, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	listen := free.Addr().String()
	free.Close()
	worker := startProgram(t, filepath.Join(dir, "worker"), "NATS_URL="+s.url)
	gateway := startProgram(t, filepath.Join(dir, "gateway"), "NATS_URL="+s.url, "LISTEN="+listen)
	worker.waitForLine(t, "serving count")
	gateway.waitForLine(t, "listening")
	connect := func(name string) (id string, events *bufio.Scanner, leave func()) {
		ctx, cancel := context.WithTimeout(t.Context(), 2*testTimeout)
		t.Cleanup(cancel)
		request, err := http.NewRequestWithContext(ctx, "GET", "http://"+listen+"/events", nil)
		must(t, err)
		var response *http.Response
		eventually(t, "the gateway listens", func() bool {
			response, err = http.DefaultClient.Do(request)
			return err == nil
		})
		events = bufio.NewScanner(response.Body)
		id = strings.TrimPrefix(nextData(t, events), "data: ")
		go func() {
			for status := http.StatusBadGateway; status == http.StatusBadGateway; { // until the worker serves
				question := strings.NewReader(name)
				request, err := http.NewRequestWithContext(t.Context(), "POST", "http://"+listen+"/ask", question)
				if err != nil {
					return
				}
				request.Header.Set("X-Connect-ID", id)
				response, err := http.DefaultClient.Do(request)
				if err != nil {
					return
				}
				response.Body.Close()
				status = response.StatusCode
			}
		}()
		return id, events, cancel
	}
	left, leaving, leave := connect("leaves")
	_, staying, _ := connect("stays")
	for i := range 3 {
		texts{nextData(t, leaving)}.want(t, fmt.Sprint("data: leaves ", i))
	}
	leave()
	gateway.waitForLine(t, left+" left")
	worker.waitForLine(t, left+`: stop at \d+: 客户端已离线: `+left)
	for i := range 5 {
		texts{nextData(t, staying)}.want(t, fmt.Sprint("data: stays ", i))
	}
	worker.stop()
}

func nextData(t testing.TB, events *bufio.Scanner) string {
	t.Helper()
	for events.Scan() {
		if strings.HasPrefix(events.Text(), "data: ") {
			return events.Text()
		}
	}
	t.Fatal("the connection ended: ", events.Err())
	return ""
}
