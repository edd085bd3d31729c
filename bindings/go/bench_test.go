package presence

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"syscall"
	"testing"
	"time"
)

func init() {
	// Streams as many messages, of as many bytes, as a request asks for. Prints the CPU time it used after each
	// command.
	roles["source"] = func(conn *Conn, commands *bufio.Scanner) error {
		before := cpu()
		go func() {
			for commands.Scan() {
				fmt.Println("used", (cpu() - before).Nanoseconds())
			}
		}()
		return conn.Serve(context.Background(), "source", "workers", func(ctx context.Context, req *Request, s *Sender) error {
			message := make([]byte, binary.LittleEndian.Uint64(req.Data[8:]))
			for range binary.LittleEndian.Uint64(req.Data) {
				if err := s.Send(message); err != nil {
					return err
				}
			}
			return nil
		})
	}
}

// cpu returns the CPU time that this process has used.
func cpu() time.Duration {
	var used syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &used)
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}

// BenchmarkStream measures streams from one process to another: the time for each message, and the CPU time at each
// end.
func BenchmarkStream(b *testing.B) {
	for _, shape := range []struct{ streams, size int }{{1, 16}, {1, 128}, {1, 1024}, {1000, 16}} {
		b.Run(fmt.Sprintf("streams=%d/size=%d", shape.streams, shape.size), func(b *testing.B) {
			s := startServer(b)
			source := startRole(b, s, "source")
			source.waitForLine(b, "serving")
			conn, err := Connect(s.url)
			must(b, err)
			defer conn.Close(context.Background())
			each := max(b.N/shape.streams, 1)
			request := binary.LittleEndian.AppendUint64(nil, uint64(each))
			request = binary.LittleEndian.AppendUint64(request, uint64(shape.size))
			b.ReportAllocs()
			b.ResetTimer()
			used := cpu()
			var all sync.WaitGroup
			for i := range shape.streams {
				stream, err := conn.Request(b.Context(), "source", request, fmt.Sprint("reader ", i))
				must(b, err)
				all.Add(1)
				go func() {
					defer all.Done()
					read := 0
					for message, err := range stream.Messages() {
						if err != nil || len(message) != shape.size {
							b.Error(err, len(message))
							return
						}
						read++
					}
					if read != each {
						b.Error(read)
					}
				}()
			}
			all.Wait()
			b.StopTimer()
			total := float64(each * shape.streams)
			b.ReportMetric(float64((cpu()-used).Nanoseconds())/total, "ns-CPU/read")
			b.ReportMetric(total/b.Elapsed().Seconds(), "msgs/s")
			fmt.Fprintln(source.in)
			nanoseconds := 0.0
			fmt.Sscan(source.waitForLine(b, "used (.*)"), &nanoseconds)
			b.ReportMetric(nanoseconds/total, "ns-CPU/send")
		})
	}
}
