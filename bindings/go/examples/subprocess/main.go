// A worker that runs a program for each request, and kills it the moment the client leaves, with all processes that it
// has started. The payload is the program's standard input. Each line of its standard output is a message.
//
//	SUBJECT=lines go run ./examples/subprocess sh -c 'while sleep 0.1; do date; done'
//
// Environment variables: NATS_URL, SUBJECT, QUEUE.
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"log"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	presence "github.com/nats-presence/nats-presence/bindings/go"
)

func main() {
	if len(os.Args) < 2 {
		log.Fatal("usage: subprocess PROGRAM [ARGUMENT]...")
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	conn, err := presence.Connect(cmp.Or(os.Getenv("NATS_URL"), "nats://127.0.0.1:4222"), presence.Name("subprocess"))
	if err != nil {
		log.Fatal(err)
	}
	subject, queue := cmp.Or(os.Getenv("SUBJECT"), "lines"), cmp.Or(os.Getenv("QUEUE"), "workers")
	if err := conn.Serve(ctx, subject, queue, program(os.Args[1:]).handle); err != nil {
		log.Fatal(err)
	}
	conn.Close(context.Background())
}

// program is a program and its arguments.
type program []string

func (p program) handle(ctx context.Context, req *presence.Request, s *presence.Sender) error {
	cmd := exec.CommandContext(ctx, p[0], p[1:]...)
	cmd.Stdin = bytes.NewReader(req.Data)
	cmd.Stderr = os.Stderr
	// The program leads a process group, so that those that it starts are killed with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second // for a process that left the group and holds the pipes
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	sendErr := sendLines(out, s)
	if sendErr != nil {
		cmd.Cancel() // also if the output cannot be sent for another reason than that the client left
	}
	err = cmd.Wait()
	if failure := new(exec.ExitError); sendErr == nil && errors.As(err, &failure) {
		return s.SendError(errors.New("the program failed: " + failure.Error())) // such as "exit status 1"
	}
	return cmp.Or(sendErr, err)
}

// sendLines sends each line as a message, with its line end, and a line of more than 64 KiB as several messages.
func sendLines(out io.Reader, s *presence.Sender) error {
	lines := bufio.NewReaderSize(out, 64<<10)
	for {
		line, err := lines.ReadSlice('\n')
		if len(line) > 0 {
			if err := s.Send(line); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil && err != bufio.ErrBufferFull {
			return err
		}
	}
}
