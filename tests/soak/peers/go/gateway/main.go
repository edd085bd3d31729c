// gateway URL NAME OPTIONS: gateway.c in Go, with a goroutine for each client and each stream.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	presence "github.com/nats-presence/nats-presence/bindings/go"
	"github.com/nats-presence/nats-presence/tests/soak/peers/go/soak"
)

const silence = 10 * time.Second

var (
	workers = []string{"c", "c", "c", "go", "go", "go", "python", "victim"}
	// Of a hundred clients.
	kinds = []struct {
		name  string
		share int
	}{{"reads", 50}, {"leaves", 15}, {"cancels", 10}, {"slow", 5}, {"marked", 5}, {"fails", 5}, {"races", 10}}
	statuses = map[presence.Status]string{
		presence.ErrInvalid: "INVALID", presence.ErrOffline: "OFFLINE", presence.ErrClosed: "CLOSED",
		presence.ErrCancelled: "CANCELLED", presence.ErrFull: "FULL", presence.ErrDisconnected: "DISCONNECTED",
		presence.ErrPeerGone: "PEER_GONE", presence.ErrNoResponders: "NO_RESPONDERS", presence.ErrTimeout: "TIMEOUT",
		presence.ErrRemote: "REMOTE", presence.ErrBusy: "BUSY",
	}
	conns [2]*presence.Conn
	name  string
)

// cycle is one round in which all clients come and leave.
type cycle struct {
	mu     sync.Mutex
	counts map[string]int
	here   atomic.Int64
	most   atomic.Int64
}

func main() {
	name = os.Args[2]
	conns = soak.Connect(os.Args[1], os.Args[3])
	for _, conn := range conns {
		soak.Check(conn.ListenOffline())
	}
	soak.Run(conns, func() map[string]any { return nil }, func(line string) {
		var seed uint64
		var clients, ms int
		if _, err := fmt.Sscanf(line, "cycle %d %d %d", &seed, &clients, &ms); err == nil {
			go run(seed, clients, time.Duration(ms)*time.Millisecond)
		} else {
			go settle()
		}
	})
	for _, conn := range conns {
		soak.Check(conn.Close(context.Background()))
	}
}

// run has all clients come during the first 0.4 of this time, and leave during its second half.
func run(seed uint64, clients int, length time.Duration) {
	c := &cycle{counts: map[string]int{}}
	var gone sync.WaitGroup
	for i := range clients {
		soak.Go(&gone, func() {
			c.client(fmt.Sprintf("%s-%x-%d", name, seed, i), rand.New(rand.NewPCG(seed, uint64(i))), length)
		})
	}
	gone.Wait()
	soak.Emit(map[string]any{"event": "cycle", "clients": clients, "most": c.most.Load(), "counts": c.counts})
}

func (c *cycle) client(id string, random *rand.Rand, length time.Duration) {
	begin := time.Now()
	comes, leaves := random.Int64N(int64(length)*4/10), int64(length)/2+random.Int64N(int64(length)*3/10)
	time.Sleep(time.Duration(comes))
	share, kind := random.IntN(100), 0
	for ; share >= kinds[kind].share; kind++ {
		share -= kinds[kind].share
	}
	for here := c.here.Add(1); here > c.most.Load(); {
		c.most.Store(here)
	}
	var session *presence.Session
	var err error
	if random.IntN(2) == 0 {
		session, err = presence.OpenSession(id)
	} else {
		err = presence.MarkClientOnline(id)
	}
	soak.Check(err)
	leave := func() {
		if session != nil {
			session.Close()
		} else {
			soak.Check(presence.MarkClientOffline(id))
		}
		c.here.Add(-1)
	}

	count := 1
	if kinds[kind].name == "cancels" || random.IntN(4) == 0 {
		count = 2
	}
	var streams sync.WaitGroup
	first := time.Duration(random.Int64N(leaves - comes))
	for i := range count {
		name, after := kinds[kind].name, first
		if name == "reads" {
			after = time.Duration(random.Int64N(leaves - comes))
		} else if name == "cancels" && i == 1 {
			name = "reads" // of two streams, only one is cancelled
		}
		r := rand.New(rand.NewPCG(random.Uint64(), uint64(i)))
		soak.Go(&streams, func() {
			time.Sleep(after)
			c.stream(id, name, workers[r.IntN(len(workers))], r.IntN(8) != 0, r.IntN(8) > 1, r)
		})
	}
	switch kinds[kind].name {
	case "races":
		time.Sleep(first)
		leave()
	case "leaves":
		time.Sleep(first + time.Duration(random.Int64N(int64(500*time.Millisecond))))
		leave()
	default:
		defer leave()
		streams.Wait()
		if kinds[kind].name != "marked" {
			time.Sleep(time.Until(begin.Add(time.Duration(leaves))))
		}
	}
	streams.Wait()
}

// stream requests a stream from a worker, reads it, and counts its outcome. Both our connection and the worker's subject
// are with or without lanes.
func (c *cycle) stream(client, kind, worker string, lanesHere, lanesThere bool, random *rand.Rand) {
	key, shape := random.Uint64()>>2, random.IntN(100)
	var count, size, burst, pause int
	opts := []presence.RequestOption{presence.With("timeout_ms", "60000")} // never reached
	switch {
	case kind == "slow": // more than its window
		count, size, burst = 50, 2000, 50
		opts = append(opts, presence.With("stream_buffer_bytes", "16384"))
	case shape < 70:
		count, size, burst, pause = 1+random.IntN(50), soak.Head+random.IntN(200), 1+random.IntN(10), random.IntN(100)
	case shape < 95:
		count, size, burst, pause = 200+random.IntN(1800), soak.Head+random.IntN(100), 100+random.IntN(900), random.IntN(50)
	default:
		count, size, burst, pause = 5+random.IntN(20), soak.Head+random.IntN(20000), 5, 50
	}
	what := map[string]string{"marked": "mark", "fails": "fail"}[kind]
	if what == "" {
		what = "end"
	}
	conn, subject := conns[0], "soak."+worker
	if !lanesHere {
		conn = conns[1]
	}
	if !lanesThere {
		subject += ".0"
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if kind == "cancels" {
		time.AfterFunc(time.Duration(1+random.IntN(300))*time.Millisecond, cancel)
	}
	received := 0
	finish := func(outcome string) {
		level, some := "level0", "none"
		if lanesHere && lanesThere {
			level = "lane"
		}
		if received > 0 {
			some = "some"
		}
		c.mu.Lock()
		c.counts[fmt.Sprintf("%s %s %s %s %s", level, worker, kind, some, outcome)]++
		c.mu.Unlock()
	}
	data := fmt.Appendf(nil, "%d %d %d %d %d %s", key, count, size, burst, pause, what)
	stream, err := conn.Request(ctx, subject, data, client, opts...)
	if err != nil {
		finish("REFUSED_" + statuses[soak.Status(err)])
		return
	}
	var isSilent atomic.Bool
	timer := time.AfterFunc(silence, func() { isSilent.Store(true); cancel() })
	defer timer.Stop()
	for {
		message, err := stream.Next(context.Background())
		isComplete := received == count
		if err != nil {
			finish(outcome(err, what, isComplete, isSilent.Load()))
			return
		}
		timer.Reset(silence)
		if isComplete || !soak.IsContent(message, key, uint64(received), size) {
			text := fmt.Sprintf("message %d of %d of a stream of %s is not what was sent", received, count, worker)
			soak.Emit(map[string]any{"event": "violation", "what": text})
			finish("WRONG")
			return
		}
		received++
		if kind == "slow" {
			time.Sleep(10 * time.Millisecond)
		}
	}
}

func outcome(err error, what string, isComplete, isSilent bool) string {
	var failed *presence.Error
	if err == io.EOF {
		if isComplete {
			return "END"
		}
		return "SHORT"
	}
	errors.As(err, &failed)
	switch {
	case failed.Status == presence.ErrCancelled && isSilent:
		return "SILENT"
	case failed.Status != presence.ErrRemote:
		return statuses[failed.Status]
	case failed.Message != "asked for":
		return "REMOTE"
	case what != "fail":
		return "UNASKED"
	case isComplete:
		return "FAILED"
	}
	return "FAILED_EARLY"
}

// settle has one stream from each worker, so that all lanes exist.
func settle() {
	c := &cycle{counts: map[string]int{}}
	var streams sync.WaitGroup
	for i, worker := range []string{"c", "go", "python", "victim"} {
		for levels := range 4 {
			random := rand.New(rand.NewPCG(uint64(i), uint64(levels)))
			soak.Go(&streams, func() { c.stream("", "settle", worker, levels&1 != 0, levels&2 != 0, random) })
		}
	}
	streams.Wait()
	soak.GiveBack()
	soak.Emit(map[string]any{"event": "cycle", "clients": 0, "counts": c.counts})
	soak.EmitStats("quiet", conns, nil)
}
