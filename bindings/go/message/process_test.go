package message

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	presence "github.com/nats-presence/nats-presence/bindings/go"
)

// roles are what this test binary does when it is started as another process. Each prints a line for each message.
var roles = map[string]func(url string) error{
	"gateway": func(url string) error {
		pool, err := New(Config{Servers: []string{url}})
		if err != nil {
			return err
		}
		return pool.StreamRequestWithClient(context.Background(), "killed", nil, "killed-client", func(m *nats.Msg) bool {
			fmt.Println(string(m.Data))
			return true
		})
	},
	"worker": func(url string) error {
		worker, err := NewSubscriber([]string{url})
		if err != nil {
			return err
		}
		return worker.StreamSubscribeHandler(context.Background(), "killed", tick)
	},
}

// tick sends until the client leaves.
func tick(ctx context.Context, msg *nats.Msg, sender ResponseSender) error {
	for i := 0; ; i++ {
		if err := sender.Send(fmt.Append(nil, "tick ", i)); err != nil {
			return err
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestMain(m *testing.M) {
	if role := roles[os.Getenv("MESSAGE_TEST_ROLE")]; role != nil {
		fmt.Println("failed:", role(os.Getenv("MESSAGE_TEST_URL")))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// startRole starts this test binary in a role. It ends with the test.
func startRole(t *testing.T, s *server, role string) (process *os.Process, lines <-chan string) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "MESSAGE_TEST_ROLE="+role, "MESSAGE_TEST_URL="+s.url)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	printed, done := make(chan string, 1<<16), make(chan struct{})
	go func() {
		defer close(done)
		for all := bufio.NewScanner(out); all.Scan(); {
			printed <- all.Text()
		}
		cmd.Wait()
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		receive(t, done)
	})
	return cmd.Process, printed
}

func TestGatewayThatIsKilledStopsItsWorkers(t *testing.T) {
	s := startServer(t, "")
	worker := newSubscriber(t, s, SubscriberConfig{})
	stopped := make(chan error, 1)
	serve(t, worker, "killed", func(ctx context.Context, msg *nats.Msg, sender ResponseSender) error {
		err := tick(ctx, msg, sender)
		receive(t, ctx.Done())
		stopped <- err
		return err
	})
	gateway, lines := startRole(t, s, "gateway")
	texts{receive(t, lines)}.want(t, "tick 0")
	must(t, gateway.Kill())
	wantText(t, receive(t, stopped), "客户端已离线: killed-client", presence.ErrPeerGone)
	eventually(t, "the client is not online", func() bool { return !IsClientOnline("killed-client") })
}

func TestWorkerThatIsKilledEndsItsStreams(t *testing.T) {
	s := startServer(t, "")
	pool := newPool(t, s)
	worker, _ := startRole(t, s, "worker")
	begun, ended := make(chan struct{}, 1<<16), make(chan error, 1)
	go func() {
		for {
			err := pool.StreamRequest(t.Context(), "killed", nil, func(m *nats.Msg) bool {
				begun <- struct{}{}
				return true
			})
			if !errors.Is(err, presence.ErrNoResponders) { // until the worker serves
				ended <- err
				return
			}
		}
	}()
	receive(t, begun)
	must(t, worker.Kill())
	wantCause(t, receive(t, ended), presence.ErrPeerGone)
}
