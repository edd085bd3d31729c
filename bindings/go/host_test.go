package presence

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/nats-presence/nats-presence/bindings/go/internal/forking"
)

// What Go programs do around the library: leave at any moment, start programs, fork in C, profile themselves, end threads.

func init() {
	roles["leaving"] = leaving
	roles["starting a program"] = startingAProgram
	roles["forking"] = forks
}

// leaving sends on 50 streams to itself when it leaves, in the way that is said.
func leaving(conn *Conn, said *bufio.Scanner) error {
	go conn.Serve(context.Background(), "leave", "workers", tick)
	for said.Scan() && said.Text() != "ask" {
	}
	var begun sync.WaitGroup
	for i := range 50 {
		stream, err := conn.Request(context.Background(), "leave", nil, fmt.Sprint("leaving ", i))
		if err != nil {
			return err
		}
		begun.Add(1)
		go func() {
			_, err := stream.Next(context.Background())
			if err != nil {
				fmt.Println("failed:", err)
			}
			for begun.Done(); err == nil; {
				_, err = stream.Next(context.Background())
			}
		}()
	}
	begun.Wait()
	fmt.Println("all send")
	said.Scan()
	switch said.Text() {
	case "exit":
		go os.Exit(7)
		select {}
	case "exit while closing":
		go conn.Close(context.Background())
		os.Exit(7)
	case "panic":
		go func() { panic("as the test wants") }()
		select {}
	case "terminate":
		syscall.Kill(os.Getpid(), syscall.SIGTERM)
		select {}
	}
	return nil // from main
}

func TestProcessLeavesWhileItSends(t *testing.T) {
	s := startServer(t)
	for way, want := range map[string]string{
		"return": "exit status 0", "exit": "exit status 7", "exit while closing": "exit status 7",
		"panic": "exit status 2", "terminate": "signal: terminated",
	} {
		t.Run(way, func(t *testing.T) {
			cmd, in, lines := command(t, s, "leaving")
			until := func(said string) {
				for lines.Scan() {
					if strings.HasPrefix(lines.Text(), said) {
						return
					}
				}
				t.Fatal("it ended before it said ", said, ": ", cmd.Wait())
			}
			until("serving")
			fmt.Fprintln(in, "ask")
			until("all send")
			fmt.Fprintln(in, way)
			for lines.Scan() {
			}
			cmd.Wait()
			if got := cmd.ProcessState.String(); got != want {
				t.Errorf("%s, not %s", got, want)
			}
		})
	}
}

// command is this test's program in a role, for tests that want to know how it ends. It is killed after some seconds.
func command(t *testing.T, s *server, role string) (*exec.Cmd, io.Writer, *bufio.Scanner) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.Env = append(os.Environ(), "PRESENCE_TEST_ROLE="+role, "PRESENCE_TEST_URL="+s.url)
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	return cmd, in, bufio.NewScanner(out)
}

func startingAProgram(conn *Conn, _ *bufio.Scanner) error {
	if !conn.Stats().Connected {
		return errors.New("not connected")
	}
	out, err := exec.Command("ls", "-l", "/proc/self/fd").CombinedOutput()
	os.Stdout.Write(out)
	return err
}

func TestProgramsInheritNothing(t *testing.T) {
	cmd, _, lines := command(t, startServer(t), "starting a program")
	shown := 0
	for ; lines.Scan(); shown++ {
		for _, ours := range []string{"socket:", "anon_inode:"} {
			if strings.Contains(lines.Text(), ours) {
				t.Error(lines.Text())
			}
		}
	}
	must(t, cmd.Wait())
	if shown < 4 {
		t.Error("only ", shown, " lines")
	}
}

// forks sends a stream to itself while C code forks the process, with goroutines that wait in the library all the time.
func forks(conn *Conn, said *bufio.Scanner) error {
	ctx := context.Background()
	go conn.Serve(ctx, "fork", "workers", tick)
	said.Scan() // that it serves
	stream, err := conn.Request(ctx, "fork", nil, "forking")
	if err != nil {
		return err
	}
	for range 5 {
		if _, err := stream.Next(ctx); err != nil {
			return fmt.Errorf("before the fork: %w", err)
		}
		if err := forking.Fork(os.Getenv("PRESENCE_TEST_URL"), unsafe.Pointer(conn.handle)); err != nil {
			return err
		}
		if !IsClientOnline("forking") {
			return errors.New("what the child marks changes the parent")
		}
	}
	if _, err := stream.Next(ctx); err != nil {
		return fmt.Errorf("after the forks: %w", err)
	}
	fmt.Println("forked")
	return nil
}

func TestForkInC(t *testing.T) {
	cmd, in, lines := command(t, startServer(t), "forking")
	said := ""
	for lines.Scan() {
		said += lines.Text() + "\n"
		if strings.HasPrefix(lines.Text(), "serving") {
			fmt.Fprintln(in, "go on")
		}
	}
	if err := cmd.Wait(); err != nil || !strings.Contains(said, "forked\n") {
		t.Error(err, said)
	}
}

// Profiling interrupts every thread, also the library's own; memory is collected all the time meanwhile.
func TestProfiledWithGOGC1(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(1))
	var profile bytes.Buffer
	must(t, pprof.StartCPUProfile(&profile))
	defer pprof.StopCPUProfile()

	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	serve(t, worker, "numbers", func(ctx context.Context, req *Request, s *Sender) error {
		for i := 0; ; i++ {
			if err := s.Send(numbered(i, 100)); err != nil {
				return err
			}
		}
	})
	var streams []*Stream
	for i := range 4 {
		streams = append(streams, ask(t, gateway, "numbers", fmt.Sprint("profiled ", i)))
	}
	begun := cpu() // of all tests before
	for i := 0; i < 1000 || cpu() < begun+2*time.Second; i++ {
		for _, stream := range streams {
			message, err := stream.Next(t.Context())
			must(t, err)
			if number(message) != i {
				t.Fatal("message ", number(message), " in place of ", i)
			}
		}
	}
	pprof.StopCPUProfile()
	unpacked, err := gzip.NewReader(&profile)
	must(t, err)
	names, err := io.ReadAll(unpacked)
	must(t, err)
	if !bytes.Contains(names, []byte("(*Sender).Send")) {
		t.Error("the profile has not seen a send")
	}
}

// A goroutine that ends while it is locked to its thread takes that with it.
func TestThreadsEndBetweenCalls(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	serve(t, worker, "echo", echo)
	for i := range 100 {
		onThread := func(f func()) {
			done := make(chan struct{})
			go func() {
				defer close(done)
				runtime.LockOSThread()
				f()
			}()
			receive(t, done)
		}
		id := fmt.Sprint("thread ", i)
		var stream *Stream
		onThread(func() { must(t, MarkClientOnline(id)) })
		onThread(func() { stream = ask(t, gateway, "echo", id) })
		onThread(func() { online(t, id, true) })
		onThread(func() {
			if messages, err := read(t, stream); err != nil || len(messages) == 0 {
				t.Error(messages, err)
			}
		})
		onThread(func() { must(t, MarkClientOffline(id)) })
	}
}
