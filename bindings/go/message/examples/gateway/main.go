// Gateway serves browsers over server-sent events. A browser connects to /events, whose first event is its id. It then
// posts questions to /ask, with that id in the header X-Connect-ID, and the answers arrive over /events.
//
// It is a program for a message package on plain NATS, of which only the import path was changed.
package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strings"
	"sync"

	"github.com/nats-io/nats.go"
	"github.com/nats-presence/nats-presence/bindings/go/message"
)

// connections has the channel to the browser of each id.
var connections sync.Map

func main() {
	url := os.Getenv("NATS_URL")
	if url == "" {
		url = nats.DefaultURL
	}
	pool, err := message.New(message.Config{Servers: []string{url}})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	http.HandleFunc("GET /events", events)
	http.HandleFunc("POST /ask", func(w http.ResponseWriter, r *http.Request) { ask(pool, w, r) })
	listen := os.Getenv("LISTEN")
	if listen == "" {
		listen = "127.0.0.1:8080"
	}
	log.Print("listening on ", listen)
	log.Fatal(http.ListenAndServe(listen, nil))
}

// lineEnds begins a new data line at each line end: a message cannot add events of its own.
var lineEnds = strings.NewReplacer("\r\n", "\ndata: ", "\r", "\ndata: ", "\n", "\ndata: ")

func events(w http.ResponseWriter, r *http.Request) {
	connectID := rand.Text()
	message.MarkClientOnline(connectID)
	go func() {
		<-r.Context().Done()
		message.MarkClientOffline(connectID)
		connections.Delete(connectID)
		log.Print(connectID, " left")
	}()
	texts := make(chan string)
	connections.Store(connectID, texts)
	w.Header().Set("Content-Type", "text/event-stream")
	fmt.Fprintf(w, "event: id\ndata: %s\n\n", connectID)
	w.(http.Flusher).Flush()
	for {
		select {
		case text := <-texts:
			fmt.Fprintf(w, "data: %s\n\n", lineEnds.Replace(text))
			w.(http.Flusher).Flush()
		case <-r.Context().Done():
			return
		}
	}
}

func ask(pool *message.Pool, w http.ResponseWriter, r *http.Request) {
	connectID := r.Header.Get("X-Connect-ID")
	found, ok := connections.Load(connectID)
	if !ok || !message.IsClientOnline(connectID) {
		http.Error(w, "not connected", http.StatusGone)
		return
	}
	question, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
	if err != nil {
		http.Error(w, "cannot read the question", http.StatusBadRequest)
		return
	}
	err = forward(r.Context(), pool, connectID, question, found.(chan string))
	if err != nil {
		log.Print(connectID, ": ", err)
		http.Error(w, "the answer is incomplete", http.StatusBadGateway)
	}
}

// forward gives each message of the answer to the browser.
func forward(ctx context.Context, pool *message.Pool, connectID string, question []byte, to chan<- string) error {
	return pool.StreamRequestWithClient(ctx, "count", question, connectID, func(msg *nats.Msg) bool {
		if string(msg.Data) == "__STREAM_END__" || !message.IsClientOnline(connectID) {
			return false
		}
		select {
		case to <- string(msg.Data):
			return true
		case <-ctx.Done():
			return false
		}
	})
}
