// A worker that asks a language model at a server with OpenAI's interface, and stops the model the moment the client
// leaves: the HTTP request has the context of the handler, so its connection is closed, which stops the model.
//
// The payload of a request is the body of a chat completion, such as {"messages": [{"role": "user", "content": "Hi"}]}.
// Each message of the stream is the next piece of the answer's text.
//
// Environment variables: NATS_URL, SUBJECT, QUEUE, OPENAI_BASE_URL (http://127.0.0.1:8000/v1), OPENAI_API_KEY, MODEL
// (for requests that do not name one).
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"net/http"
	"os"
	"os/signal"
	"syscall"

	presence "github.com/nats-presence/nats-presence/bindings/go"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	conn, err := presence.Connect(cmp.Or(os.Getenv("NATS_URL"), "nats://127.0.0.1:4222"), presence.Name("openai-worker"))
	if err != nil {
		log.Fatal(err)
	}
	model := &model{
		url:  cmp.Or(os.Getenv("OPENAI_BASE_URL"), "http://127.0.0.1:8000/v1") + "/chat/completions",
		key:  os.Getenv("OPENAI_API_KEY"),
		name: os.Getenv("MODEL"),
	}
	err = conn.Serve(ctx, cmp.Or(os.Getenv("SUBJECT"), "chat"), cmp.Or(os.Getenv("QUEUE"), "workers"), model.handle)
	if err != nil {
		log.Fatal(err)
	}
	conn.Close(context.Background())
}

type model struct{ url, key, name string }

// handle answers one request. Its errors are logged, and not sent, unless SendError sends them.
func (m *model) handle(ctx context.Context, req *presence.Request, s *presence.Sender) error {
	var body map[string]any
	if err := json.Unmarshal(req.Data, &body); err != nil {
		return s.SendError(fmt.Errorf("the request is not a JSON object: %w", err))
	}
	body["stream"] = true
	if body["model"] == nil {
		body["model"] = m.name
	}
	text, err := json.Marshal(body)
	if err != nil {
		return err
	}
	ask, err := http.NewRequestWithContext(ctx, "POST", m.url, bytes.NewReader(text)) // ctx: aborted when s is stopped
	if err != nil {
		return err
	}
	ask.Header.Set("Content-Type", "application/json")
	ask.Header.Set("Authorization", "Bearer "+m.key)
	answer, err := http.DefaultClient.Do(ask)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return s.SendError(errors.New("the model's server answered " + answer.Status))
	}
	return forward(answer, s)
}

// forward sends the pieces of the model's answer, which are server-sent events.
func forward(answer *http.Response, s *presence.Sender) error {
	lines := bufio.NewScanner(answer.Body)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		data, isData := bytes.CutPrefix(lines.Bytes(), []byte("data:"))
		if data = bytes.TrimSpace(data); !isData || len(data) == 0 {
			continue
		}
		if string(data) == "[DONE]" {
			return s.End()
		}
		var chunk struct {
			Choices []struct{ Delta struct{ Content string } }
		}
		if err := json.Unmarshal(data, &chunk); err != nil {
			return fmt.Errorf("the model's server sent %.100q: %w", data, err)
		}
		for _, choice := range chunk.Choices {
			if choice.Delta.Content == "" {
				continue
			}
			if err := s.Send([]byte(choice.Delta.Content)); err != nil {
				return err
			}
		}
	}
	return cmp.Or(lines.Err(), errors.New("the model's answer ended without [DONE]"))
}
