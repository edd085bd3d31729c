// worker MODE URL TEXT: answers with words of a book, and stops when the client leaves.
//
// MODE is "presence" or "plain". "plain" does the same with nothing but NATS: it publishes each word to the request's
// reply subject, and never learns that the client has left.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
	presence "github.com/nats-presence/nats-presence/bindings/go"
	"github.com/nats-presence/nats-presence/demo/report"
)

const reportInterval = 100 * time.Millisecond

// The demo's heartbeats come more often than by default, so that a frozen gateway is noticed after 3 s instead of 15.
const heartbeat = time.Second

var book []string

func main() {
	mode, url := os.Args[1], os.Args[2]
	text, err := os.ReadFile(os.Args[3])
	check(err)
	book = strings.Fields(string(text))
	ctx, stop := context.WithCancel(context.Background())
	go func() {
		bufio.NewReader(os.Stdin).ReadByte() // returns when the demo ends
		stop()
	}()
	work.report()
	go work.run()
	if mode == "plain" {
		servePlain(ctx, url)
	} else {
		serve(ctx, url)
	}
}

func serve(ctx context.Context, url string) {
	conn, err := presence.Connect(url, presence.Name("Go worker"), presence.HeartbeatInterval(heartbeat))
	check(err)
	var services sync.WaitGroup
	for _, subject := range []string{"presence.any", "presence.go"} {
		service, err := conn.Listen(ctx, subject, "workers")
		check(err)
		services.Add(1)
		go func() {
			defer services.Done()
			service.Serve(answer)
		}()
	}
	report.Event("ready", report.Fields{})
	services.Wait()
	check(conn.Close(context.Background()))
}

// answer answers a request. When the client leaves, its context is cancelled and its sender refuses to send.
func answer(ctx context.Context, request *presence.Request, sender *presence.Sender) error {
	r, err := parse(request.Data)
	if err != nil {
		return sender.SendError(err)
	}
	r.begin()
	made := 0
	for made < r.length && ctx.Err() == nil {
		word := r.word(made)
		made++
		work.made(r.name)
		if sender.SendContext(ctx, []byte(word)) != nil {
			break
		}
		work.sent()
		select {
		case <-time.After(r.pause):
		case <-ctx.Done():
		}
	}
	err = sender.End()
	r.done(status(err))
	return err
}

func servePlain(ctx context.Context, url string) {
	conn, err := nats.Connect(url, nats.Name("plain Go worker"), nats.MaxReconnects(-1),
		nats.ReconnectWait(100*time.Millisecond))
	check(err)
	for _, subject := range []string{"plain.any", "plain.go"} {
		_, err := conn.QueueSubscribe(subject, "workers", func(m *nats.Msg) { go answerPlain(conn, m) })
		check(err)
	}
	check(conn.Flush())
	report.Event("ready", report.Fields{})
	<-ctx.Done()
}

// answerPlain answers a request as one would with NATS alone.
func answerPlain(conn *nats.Conn, m *nats.Msg) {
	r, err := parse(m.Data)
	if err != nil {
		conn.Publish(m.Reply, []byte("__STREAM_ERROR__:"+err.Error()))
		return
	}
	r.begin()
	for made := range r.length {
		work.made(r.name)
		conn.Publish(m.Reply, []byte(r.word(made)))
		work.sent()
		time.Sleep(r.pause)
	}
	conn.Publish(m.Reply, []byte("__STREAM_END__"))
	r.done(0)
}

type request struct {
	name   string
	length int
	pause  time.Duration
	start  int
}

// parse parses a payload, which is "NAME LENGTH PAUSE_MS PROMPT".
func parse(data []byte) (r request, err error) {
	var pause int
	parts := strings.SplitN(string(data), " ", 4)
	if len(parts) == 4 {
		_, err = fmt.Sscan(parts[1]+" "+parts[2], &r.length, &pause)
	}
	if len(parts) != 4 || err != nil || r.length < 1 || pause < 0 {
		return r, errors.New("the request is not NAME LENGTH PAUSE_MS PROMPT")
	}
	hash := fnv.New32a()
	hash.Write(data)
	r.name, r.pause, r.start = parts[0], time.Duration(pause)*time.Millisecond, int(hash.Sum32())
	return r, nil
}

func (r request) word(n int) string { return book[(r.start+n)%len(book)] }

func (r request) begin() {
	work.count(1, "begin", report.Fields{"stream": r.name, "length": r.length})
}

func (r request) done(status presence.Status) {
	at := report.Now()
	work.report()
	work.count(-1, "done", report.Fields{"stream": r.name, "status": status, "at": at})
}

// workLog collects when words were made, for a report every reportInterval.
type workLog struct {
	mu      sync.Mutex
	times   map[string][]int64
	nSent   int
	running int // streams
	changed bool
}

var work = workLog{times: map[string][]int64{}}

func (w *workLog) made(stream string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.times[stream] = append(w.times[stream], report.Now())
	w.changed = true
}

func (w *workLog) sent() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.nSent++
}

// count counts a stream that begins or ends. The events are in the order of their counts.
func (w *workLog) count(change int, event string, fields report.Fields) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.running += change
	fields["running"] = w.running
	report.Event(event, fields)
}

func (w *workLog) report() {
	var usage syscall.Rusage
	check(syscall.Getrusage(syscall.RUSAGE_SELF, &usage))
	cpu := time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
	w.mu.Lock()
	defer w.mu.Unlock()
	report.Event("work", report.Fields{"cpu_us": cpu.Microseconds(), "sent": w.nSent, "made": w.times,
		"running": w.running})
	w.times, w.changed = map[string][]int64{}, false
}

func (w *workLog) run() {
	for range time.Tick(reportInterval) {
		w.mu.Lock()
		changed := w.changed
		w.mu.Unlock()
		if changed {
			w.report()
		}
	}
}

// status returns the status of an error, which is the same number in all languages; 0 for nil.
func status(err error) presence.Status {
	var failed *presence.Error
	if errors.As(err, &failed) {
		return failed.Status
	}
	return 0
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
