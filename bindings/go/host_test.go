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

// Tests of what programs do around the library: exit at any moment, start programs, fork in C, profile, end threads.

func init() {
	roles["exit while sending"] = exitWhileSending
	roles["start a program"] = startAProgram
	roles["fork"] = fork
}

// exitWhileSending sends on 50 streams to itself and then exits in the way that the second command says.
func exitWhileSending(conn *Conn, commands *bufio.Scanner) error {
	go conn.Serve(context.Background(), "exit", "workers", tick)
	for commands.Scan() && commands.Text() != "request" {
	}
	var begun sync.WaitGroup
	for i := range 50 {
		stream, err := conn.Request(context.Background(), "exit", nil, fmt.Sprint("exiting ", i))
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
	fmt.Println("all streams run")
	commands.Scan()
	switch commands.Text() {
	case "exit":
		go os.Exit(7)
		select {}
	case "exit while closing":
		go conn.Close(context.Background())
		os.Exit(7)
	case "panic":
		go func() { panic("requested by the test") }()
		select {}
	case "terminate":
		syscall.Kill(os.Getpid(), syscall.SIGTERM)
		select {}
	}
	return nil // main returns
}

func TestProcessExitsWhileSending(t *testing.T) {
	t.Parallel()
	for way, want := range map[string]string{
		"return": "exit status 0", "exit": "exit status 7", "exit while closing": "exit status 7",
		"panic": "exit status 2", "terminate": "signal: terminated",
	} {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			// A server of its own: a process that exits must not serve the streams of another.
			cmd, in, lines := startCommand(t, startServer(t), "exit while sending")
			waitFor := func(line string) {
				for lines.Scan() {
					if strings.HasPrefix(lines.Text(), line) {
						return
					}
				}
				t.Fatalf("it exited before it printed %q: %v", line, cmd.Wait())
			}
			waitFor("serving")
			fmt.Fprintln(in, "request")
			waitFor("all streams run")
			fmt.Fprintln(in, way)
			for lines.Scan() {
			}
			cmd.Wait()
			if got := cmd.ProcessState.String(); got != want {
				t.Errorf("%s, want %s", got, want)
			}
		})
	}
}

// startCommand starts this test binary in a role, for tests that check how it exits. It is killed after testTimeout.
func startCommand(t *testing.T, s *server, role string) (*exec.Cmd, io.Writer, *bufio.Scanner) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
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

func startAProgram(conn *Conn, _ *bufio.Scanner) error {
	if !conn.Stats().Connected {
		return errors.New("not connected")
	}
	out, err := exec.Command("ls", "-l", "/proc/self/fd").CombinedOutput()
	os.Stdout.Write(out)
	return err
}

func TestStartedProgramsInheritNoDescriptors(t *testing.T) {
	t.Parallel()
	cmd, _, lines := startCommand(t, startServer(t), "start a program")
	shown := 0
	for ; lines.Scan(); shown++ {
		for _, kind := range []string{"socket:", "anon_inode:"} {
			if strings.Contains(lines.Text(), kind) {
				t.Error(lines.Text())
			}
		}
	}
	must(t, cmd.Wait())
	if shown < 4 {
		t.Errorf("ls printed only %d lines", shown)
	}
}

// fork sends a stream to itself while C code forks the process and goroutines wait in the library.
func fork(conn *Conn, commands *bufio.Scanner) error {
	ctx := context.Background()
	go conn.Serve(ctx, "fork", "workers", tick)
	commands.Scan() // sent once it serves
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
			return errors.New("a mark of the child changed the parent")
		}
	}
	if _, err := stream.Next(ctx); err != nil {
		return fmt.Errorf("after the forks: %w", err)
	}
	fmt.Println("forked")
	return nil
}

func TestForkInCLeavesTheParentWorking(t *testing.T) {
	t.Parallel()
	cmd, in, lines := startCommand(t, startServer(t), "fork")
	output := ""
	for lines.Scan() {
		output += lines.Text() + "\n"
		if strings.HasPrefix(lines.Text(), "serving") {
			fmt.Fprintln(in, "go on")
		}
	}
	if err := cmd.Wait(); err != nil || !strings.Contains(output, "forked\n") {
		t.Error(err, output)
	}
}

// Profiling interrupts every thread, also the library's own, while memory is collected all the time.
func TestCPUProfileWithConstantGarbageCollection(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(1))
	var profile bytes.Buffer
	must(t, pprof.StartCPUProfile(&profile))
	defer pprof.StopCPUProfile()

	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	serve(t, worker, "numbers", func(ctx context.Context, req *Request, s *Sender) error {
		for i := 0; ; i++ {
			if err := s.Send(numberedMessage(i, 100)); err != nil {
				return err
			}
		}
	})
	var streams []*Stream
	for i := range 4 {
		streams = append(streams, request(t, gateway, "numbers", fmt.Sprint("profiled ", i)))
	}
	begun := cpu()
	for i := 0; i < 1000 || cpu() < begun+2*time.Second; i++ {
		for _, stream := range streams {
			message, err := stream.Next(t.Context())
			must(t, err)
			if number(message) != i {
				t.Fatalf("got message %d, want %d", number(message), i)
			}
		}
	}
	pprof.StopCPUProfile()
	unpacked, err := gzip.NewReader(&profile)
	must(t, err)
	names, err := io.ReadAll(unpacked)
	must(t, err)
	if !bytes.Contains(names, []byte("(*Sender).Send")) {
		t.Error("the profile contains no send")
	}
}

// A goroutine that ends while it is locked to its thread ends the thread.
func TestCallsFromThreadsThatEnd(t *testing.T) {
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
		onThread(func() { stream = request(t, gateway, "echo", id) })
		onThread(func() { checkOnline(t, id, true) })
		onThread(func() {
			if messages, err := read(t, stream); err != nil || len(messages) == 0 {
				t.Error(messages, err)
			}
		})
		onThread(func() { must(t, MarkClientOffline(id)) })
	}
}
