package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	presence "github.com/nats-presence/nats-presence/bindings/go"
	"github.com/nats-presence/nats-presence/bindings/go/presencetest"
)

// start starts a worker whose model is at this server, and returns a connection to ask it.
func start(t *testing.T, server http.HandlerFunc) (*presencetest.Worker, *presence.Conn) {
	t.Helper()
	upstream := httptest.NewServer(server)
	t.Cleanup(upstream.Close)
	nats := presencetest.StartServer(t)
	m := &model{url: upstream.URL + "/v1/chat/completions", key: "secret", name: "small"}
	return presencetest.StartWorker(t, nats.URL, "chat", m.handle), presencetest.Connect(t, nats.URL)
}

// ask returns the answer to a request, and the error of its stream.
func ask(t *testing.T, conn *presence.Conn, body string) (answer string, err error) {
	t.Helper()
	stream, err := conn.Request(t.Context(), "chat", []byte(body), "me")
	if err != nil {
		t.Fatal(err)
	}
	for message, err := range stream.Messages() {
		if err != nil {
			return answer, err
		}
		answer += string(message) + "|"
	}
	return answer, nil
}

const question = `{"messages": [{"role": "user", "content": "Hi"}]}`

func send(w http.ResponseWriter, data string) {
	fmt.Fprintf(w, "data: %s\n\n", data)
	w.(http.Flusher).Flush()
}

func TestAnswerIsForwarded(t *testing.T) {
	_, conn := start(t, func(w http.ResponseWriter, r *http.Request) {
		var body map[string]any
		json.NewDecoder(r.Body).Decode(&body)
		if body["stream"] != true || body["model"] != "small" || body["messages"] == nil ||
			r.Header.Get("Authorization") != "Bearer secret" {
			t.Error(body, r.Header)
		}
		send(w, `{"choices": [{"delta": {"role": "assistant"}}]}`)
		fmt.Fprint(w, ": a comment\n\nevent: x\n")
		send(w, `{"choices": [{"delta": {"content": "Hel\nlo"}}]}`)
		send(w, `{"choices": [{"delta": {"content": " you"}}]}`)
		send(w, `{"choices": [], "usage": {"total_tokens": 2}}`)
		send(w, "[DONE]")
	})
	if answer, err := ask(t, conn, question); err != nil || answer != "Hel\nlo| you|" {
		t.Error(answer, err)
	}
}

// The server gets no further byte, and sends none: only the closed connection ends its work.
func TestLeavingAbortsTheModel(t *testing.T) {
	for _, first := range []string{"", `{"choices": [{"delta": {"content": "one"}}]}`} {
		asked, aborted := make(chan struct{}, 1), make(chan struct{}, 1)
		worker, conn := start(t, func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body) // before that, package http does not see that the connection was closed
			if first != "" {
				send(w, first)
			}
			asked <- struct{}{}
			<-r.Context().Done()
			aborted <- struct{}{}
		})
		stream, err := conn.Request(t.Context(), "chat", []byte(question), "me")
		if err != nil {
			t.Fatal(err)
		}
		defer stream.Close()
		<-asked
		presence.MarkClientOffline("me")
		if why := worker.WaitStopped("me"); !errors.Is(why, presence.ErrOffline) {
			t.Error(why)
		}
		select {
		case <-aborted:
		case <-time.After(presencetest.Timeout):
			t.Error("the model was not aborted")
		}
	}
}

func TestIncompleteAnswerIsAnError(t *testing.T) {
	for name, c := range map[string]struct {
		server http.HandlerFunc
		body   string
		want   string
	}{
		"status": {
			func(w http.ResponseWriter, r *http.Request) { http.Error(w, "secret", 429) },
			question, "the model's server answered 429 Too Many Requests",
		},
		"cut": {
			func(w http.ResponseWriter, r *http.Request) {
				send(w, `{"choices": [{"delta": {"content": "one"}}]}`)
				panic(http.ErrAbortHandler)
			},
			question, "the handler failed",
		},
		"without end": {
			func(w http.ResponseWriter, r *http.Request) { send(w, `{"choices": []}`) },
			question, "the handler failed",
		},
		"not JSON": {
			func(w http.ResponseWriter, r *http.Request) { send(w, "x") },
			question, "the handler failed",
		},
		"request": {nil, "x", "the request is not a JSON object: "},
	} {
		_, conn := start(t, c.server)
		_, err := ask(t, conn, c.body)
		if !errors.Is(err, presence.ErrRemote) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %s", name, err, c.want)
		}
	}
}
