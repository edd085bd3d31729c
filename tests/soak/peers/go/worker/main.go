// worker URL SUBJECT OPTIONS: worker.c in Go, with a goroutine for each stream.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	presence "github.com/nats-presence/nats-presence/bindings/go"
	"github.com/nats-presence/nats-presence/tests/soak/peers/go/soak"
)

const further = 10

var served, acceptedAfter atomic.Int64

func main() {
	conns := soak.Connect(os.Args[1], os.Args[3])
	ctx, stop := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	for i, conn := range conns {
		subject := os.Args[2]
		if i == 1 {
			subject += ".0"
		}
		soak.Go(&serving, func() { soak.Check(conn.Serve(ctx, subject, "soak", serve)) })
	}
	more := func() map[string]any {
		return map[string]any{"served": served.Load(), "accepted_after": acceptedAfter.Load()}
	}
	soak.Run(conns, more, func(string) {
		soak.GiveBack()
		soak.EmitStats("quiet", conns, more())
	})
	stop()
	serving.Wait()
	for _, conn := range conns {
		soak.Check(conn.Close(context.Background()))
	}
}

// serve sends what the request asks for; when the stream has ended, no further send may be accepted.
func serve(ctx context.Context, req *presence.Request, s *presence.Sender) error {
	var key uint64
	var count, size, burst, pause int
	var what string
	_, err := fmt.Sscan(string(req.Data), &key, &count, &size, &burst, &pause, &what)
	soak.Check(err)
	if send(ctx, s, key, count, size, burst, time.Duration(pause)*time.Millisecond) == nil {
		switch what {
		case "mark":
			soak.Check(presence.MarkClientOffline(req.ClientID))
		case "fail":
			s.SendError(errors.New("asked for"))
		default:
			s.End()
		}
	}
	sent := s.SendCount()
	for range further {
		s.TrySend([]byte("more"))
	}
	acceptedAfter.Add(int64(s.SendCount() - sent))
	served.Add(1)
	return nil
}

func send(ctx context.Context, s *presence.Sender, key uint64, count, size, burst int, pause time.Duration) error {
	message := make([]byte, 0, size)
	for i := range count {
		if err := s.Send(soak.AppendContent(message, key, uint64(i), size)); err != nil {
			return err
		}
		if (i+1)%burst == 0 {
			select {
			case <-time.After(pause):
			case <-ctx.Done():
			}
		}
	}
	return nil
}
