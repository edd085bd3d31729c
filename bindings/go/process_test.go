package presence

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc64"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// roles are what this test binary does when it is started as another process: it reads commands and prints lines.
var roles = map[string]func(conn *Conn, commands *bufio.Scanner) error{
	"ticking worker":  tickingWorker,
	"ticking gateway": tickingGateway,
	"steady worker":   steadyWorker,
	"steady gateway":  steadyGateway,
}

func TestMain(m *testing.M) {
	role := roles[os.Getenv("PRESENCE_TEST_ROLE")]
	if role == nil {
		code := m.Run()
		if sharedServer != nil {
			sharedServer.kill()
		}
		os.RemoveAll(exampleDir)
		os.Exit(code)
	}
	opts := []ConnectOption{WithLog(func(e Event) { fmt.Println(e.Kind, e.Text) })}
	for i := 1; i+1 < len(os.Args); i += 2 {
		opts = append(opts, With(os.Args[i], os.Args[i+1]))
	}
	conn, err := Connect(os.Getenv("PRESENCE_TEST_URL"), opts...)
	if err == nil {
		err = role(conn, bufio.NewScanner(os.Stdin))
	}
	if err != nil {
		fmt.Println("failed:", err)
		os.Exit(1)
	}
}

// process is this test binary in a role. It ends with the test.
type process struct {
	*program
	*os.Process
	in io.Writer
}

func startRole(t testing.TB, s *server, role string, options ...string) *process {
	t.Helper()
	cmd := exec.Command(os.Args[0], options...)
	cmd.Env = append(os.Environ(), "PRESENCE_TEST_ROLE="+role, "PRESENCE_TEST_URL="+s.url)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	p := &process{&program{make(chan string, 1<<16)}, cmd.Process, in}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			p.lines <- lines.Text()
		}
		cmd.Wait()
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		receive(t, done)
	})
	return p
}

// tick sends a message every few milliseconds until the stream ends.
func tick(ctx context.Context, req *Request, s *Sender) error {
	for s.Send([]byte("tick")) == nil {
		time.Sleep(5 * time.Millisecond)
	}
	return s.Err()
}

func tickingWorker(conn *Conn, _ *bufio.Scanner) error {
	return conn.Serve(context.Background(), "tick", "workers", tick)
}

func tickingGateway(conn *Conn, _ *bufio.Scanner) error {
	stream, err := conn.Request(context.Background(), "tick", nil, fmt.Sprint("gateway ", os.Getpid()))
	if err != nil {
		return err
	}
	for _, err := range stream.Messages() {
		if err != nil {
			return err
		}
	}
	return io.EOF
}

// A process that was killed or stopped (SIGSTOP) is gone for its peers.
func TestKilledOrStoppedPeerIsGone(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]struct {
		signal syscall.Signal
		opts   []ConnectOption
	}{
		"killed":  {syscall.SIGKILL, []ConnectOption{With("peer_grace_ms", "0"), With("heartbeat_ms", "500")}},
		"stopped": {syscall.SIGSTOP, []ConnectOption{With("heartbeat_ms", "500")}},
	} {
		t.Run("gateway "+name, func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			worker := connect(t, s, end.opts...)
			begun, ends := make(chan struct{}), make(chan error, 1)
			serve(t, worker, "tick", func(ctx context.Context, req *Request, s *Sender) error {
				context.AfterFunc(ctx, func() { ends <- context.Cause(ctx) })
				close(begun)
				return tick(ctx, req, s)
			})
			gateway := startRole(t, s, "ticking gateway")
			receive(t, begun)
			must(t, gateway.Signal(end.signal))
			begin := time.Now()
			id := fmt.Sprint("gateway ", gateway.Pid)
			wantError(t, receive(t, ends), ErrPeerGone, id)
			checkFasterThanDefaults(t, begin)
			eventually(t, "its client is offline", func() bool { return !IsClientOnline(id) })
		})
		t.Run("worker "+name, func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			worker := startRole(t, s, "ticking worker")
			worker.waitForLine(t, "serving")
			stream := request(t, connect(t, s, end.opts...), "tick", t.Name())
			_, err := stream.Next(t.Context())
			must(t, err)
			must(t, worker.Signal(end.signal))
			begin := time.Now()
			_, err = read(t, stream)
			wantError(t, err, ErrPeerGone, "")
			checkFasterThanDefaults(t, begin)
			checkOnline(t, t.Name(), false)
		})
	}
}

// checkFasterThanDefaults checks that a peer was gone sooner than with the default options.
func checkFasterThanDefaults(t *testing.T, begin time.Time) {
	t.Helper()
	took := time.Since(begin)
	if took > 4*time.Second {
		t.Error("took ", took)
	}
	t.Log("took ", took)
}

var crcTable = crc64.MakeTable(crc64.ISO)

// steadyWorker sends messages that each contain their number and random bytes. The last message contains -1, the number
// of messages and their hash.
func steadyWorker(conn *Conn, commands *bufio.Scanner) error {
	var enough atomic.Bool
	go func() {
		for commands.Scan() {
			enough.Store(true)
		}
	}()
	return conn.Serve(context.Background(), "steady", "workers", func(ctx context.Context, req *Request, s *Sender) error {
		count, hash := uint64(0), uint64(0)
		for ; !enough.Load(); count++ {
			message := binary.LittleEndian.AppendUint64(nil, count)
			for range rand.IntN(30) {
				message = binary.LittleEndian.AppendUint64(message, rand.Uint64())
			}
			hash = crc64.Update(hash, crcTable, message)
			if err := s.Send(message); err != nil {
				return err
			}
			if count%4 == 3 {
				time.Sleep(time.Duration(rand.IntN(40)) * time.Millisecond)
			}
		}
		last := binary.LittleEndian.AppendUint64(bytes.Repeat([]byte{0xff}, 8), count)
		return s.Send(binary.LittleEndian.AppendUint64(last, hash))
	})
}

const steadyStreams = 200

// steadyGateway reads streams of a steadyWorker. It answers each command once all of them have made progress since.
func steadyGateway(conn *Conn, commands *bufio.Scanner) error {
	var counts [steadyStreams]atomic.Uint64
	results := make(chan error, steadyStreams)
	for i := range steadyStreams {
		stream, err := conn.Request(context.Background(), "steady", nil, fmt.Sprint("client ", i%50))
		if err != nil {
			return err
		}
		go func() { results <- readSteady(stream, &counts[i]) }()
	}
	go func() {
		for commands.Scan() {
			var before [steadyStreams]uint64
			for i := range counts {
				before[i] = counts[i].Load()
			}
			for i := range counts {
				for counts[i].Load() < before[i]+8 {
					time.Sleep(time.Millisecond)
				}
			}
			fmt.Println("all made progress")
		}
	}()
	for range steadyStreams {
		if err := <-results; err != nil {
			return err
		}
	}
	total := uint64(0)
	for i := range counts {
		total += counts[i].Load()
	}
	fmt.Println("complete:", total)
	return nil
}

func readSteady(stream *Stream, count *atomic.Uint64) error {
	hash, complete := uint64(0), false
	for message, err := range stream.Messages() {
		if err != nil {
			return fmt.Errorf("after %d messages: %w", count.Load(), err)
		}
		if complete {
			return errors.New("a message after the last")
		}
		switch place := binary.LittleEndian.Uint64(message); place {
		case count.Load():
			count.Add(1)
			hash = crc64.Update(hash, crcTable, message)
		case 1<<64 - 1:
			sent, sentHash := binary.LittleEndian.Uint64(message[8:]), binary.LittleEndian.Uint64(message[16:])
			if complete = true; sent != count.Load() || sentHash != hash {
				return fmt.Errorf("got %d messages with hash %x, want %d with %x", count.Load(), hash, sent, sentHash)
			}
		default:
			return fmt.Errorf("got message %d, want %d", place, count.Load())
		}
	}
	if !complete {
		return fmt.Errorf("ended after %d messages", count.Load())
	}
	return nil
}

// nats-server is killed and restarted 20 times while 200 streams run between two processes. Each stream is complete and
// in order, without duplicates.
func TestStreamsSurviveTwentyServerRestarts(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	begin := time.Now()
	options := []string{"reconnect_min_ms", "10", "reconnect_max_ms", "500"}
	worker := startRole(t, s, "steady worker", options...)
	worker.waitForLine(t, "serving")
	gateway := startRole(t, s, "steady gateway", options...)
	waitForProgress := func() {
		fmt.Fprintln(gateway.in, "progress")
		gateway.waitForLine(t, "all made progress")
	}
	waitForProgress()
	restarts := 20
	if testing.Short() {
		restarts = 3
	}
	for range restarts {
		s.kill()
		worker.waitForLine(t, "^disconnected")
		gateway.waitForLine(t, "^disconnected")
		s = startServer(t, "-p", s.port)
		worker.waitForLine(t, "^connected")
		gateway.waitForLine(t, "^connected")
		waitForProgress()
	}
	fmt.Fprintln(worker.in, "enough")
	t.Log(gateway.waitForLine(t, "complete: (.*)"), " messages in ", time.Since(begin))
	if took := time.Since(begin); took > time.Minute {
		t.Error("took ", took)
	}
}
