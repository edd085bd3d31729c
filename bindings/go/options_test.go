package presence

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"regexp"
	"strings"
	"testing"
	"time"
)

// optionCase is a typed option, the pair that the C library must get, and the option with a wrong value, if it can have
// one.
type optionCase[O option] struct {
	option      O
	name, value string
	wrong       []O
}

var connectOptions = []optionCase[ConnectOption]{
	{Name("worker 1"), "name", "worker 1", []ConnectOption{Name("a\nb")}},
	{User("me"), "user", "me", nil},
	{Password("secret"), "password", "secret", nil},
	{Token("secret"), "token", "secret", []ConnectOption{Token("")}},
	{NKeySeed("SUAM"), "nkey_seed", "SUAM", []ConnectOption{NKeySeed("")}},
	{CredsFile("/no/creds"), "creds_file", "/no/creds", []ConnectOption{CredsFile("")}},
	{AuthSocket("/no/socket"), "auth_socket", "/no/socket", []ConnectOption{AuthSocket("")}},
	{TLSRequired(), "tls_required", "true", nil},
	{TLSFirst(), "tls_first", "true", nil},
	{TLSCAFile("/no/ca"), "tls_ca_file", "/no/ca", []ConnectOption{TLSCAFile("")}},
	{TLSCertFile("/no/cert"), "tls_cert_file", "/no/cert", []ConnectOption{TLSCertFile("")}},
	{TLSKeyFile("/no/key"), "tls_key_file", "/no/key", []ConnectOption{TLSKeyFile("")}},
	{ConnectTimeout(2 * time.Second), "connect_timeout_ms", "2000",
		[]ConnectOption{ConnectTimeout(0), ConnectTimeout(-1)}},
	{RetryOnInitialConnect(), "retry_on_initial_connect", "true", nil},
	{ReconnectMin(10 * time.Millisecond), "reconnect_min_ms", "10", []ConnectOption{ReconnectMin(0)}},
	{ReconnectMax(time.Minute), "reconnect_max_ms", "60000", []ConnectOption{ReconnectMax(0)}},
	{MaxReconnects(7), "max_reconnects", "7", []ConnectOption{MaxReconnects(-1)}},
	{PingInterval(90 * time.Second), "ping_interval_ms", "90000", []ConnectOption{PingInterval(9 * time.Millisecond)}},
	{InboxPrefix("_IN.me"), "inbox_prefix", "_IN.me",
		[]ConnectOption{InboxPrefix("a b"), InboxPrefix(strings.Repeat("x", 1025))}},
	{OfflineSubject("gone"), "offline_subject", "gone", []ConnectOption{OfflineSubject("a.*")}},
	{Announce("streams"), "announce", "streams", []ConnectOption{Announce("loudly")}},
	{NoLanes(), "lanes", "false", nil},
	{NoDiscovery(), "discovery", "false", nil},
	{HeartbeatInterval(500 * time.Millisecond), "heartbeat_ms", "500",
		[]ConnectOption{HeartbeatInterval(9 * time.Millisecond)}},
	{PeerGrace(0), "peer_grace_ms", "0", []ConnectOption{PeerGrace(-time.Nanosecond)}},
	{SendBuffer(1 << 20), "send_buffer_bytes", "1048576", []ConnectOption{SendBuffer(0), SendBuffer(-1)}},
	{ReceiveBuffer(8 << 20), "receive_buffer_bytes", "8388608", []ConnectOption{ReceiveBuffer(0)}},
	{SessionGrace(0), "session_grace_ms", "0", []ConnectOption{SessionGrace(-time.Second)}},
	{WorkerThreads(2), "worker_threads", "2", []ConnectOption{WorkerThreads(0), WorkerThreads(65)}},
}

var requestOptions = []optionCase[RequestOption]{
	{Timeout(time.Minute), "timeout_ms", "60000",
		[]RequestOption{Timeout(-time.Second), Timeout(11 * 366 * 24 * time.Hour)}},
	{Retries(3), "retries", "3", []RequestOption{Retries(-1)}},
	{RetryDelay(20 * time.Millisecond), "retry_delay_ms", "20", []RequestOption{RetryDelay(-1)}},
	{StreamBuffer(100_000), "stream_buffer_bytes", "100000", []RequestOption{StreamBuffer(0)}},
	{OnlyOnline(), "only_online", "true", nil},
	{Header("X-Model", "gpt"), "header.X-Model", "gpt",
		[]RequestOption{Header("X", "a\r\nb"), Header("Connect-ID", "y"), Header("", "y")}},
}

var serveOptionCases = []optionCase[ServeOption]{
	{MaxStreams(5), "max_streams", "5", []ServeOption{MaxStreams(-1), MaxStreams(1 << 32)}},
	{Detached(), "detached", "true", nil},
	{DrainTimeout(30 * time.Second), "drain_ms", "30000",
		[]ServeOption{DrainTimeout(-time.Second), DrainTimeout(1 << 32 * time.Millisecond)}},
	{StopTimeout(5 * time.Second), "stop_timeout_ms", "5000", []ServeOption{StopTimeout(-time.Nanosecond)}},
}

// testOptions checks the pairs of options, that call accepts each and refuses each with a wrong value, and that it
// refuses the options of other calls.
func testOptions[O option](t *testing.T, cases []optionCase[O], others []string, call func(O) error) {
	for _, c := range cases {
		if o := collect([]O{c.option}); len(o.pairs) != 1 || o.pairs[0] != (pair{c.name, c.value}) {
			t.Errorf("%s: %q", c.name, o.pairs)
		}
		if err := call(c.option); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		for _, wrong := range c.wrong {
			err, named := call(wrong), strings.TrimPrefix(c.name, "header.X-Model")
			if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), named) {
				t.Errorf("%s: %v", c.name, err)
			}
		}
	}
	for _, name := range others {
		err := call(any(With(name, "1")).(O))
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestConnectOptions(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	closed.Close()
	testOptions(t, connectOptions, []string{"retries", "max_streams"}, func(o ConnectOption) error {
		opts := []ConnectOption{o, ConnectTimeout(time.Second)}
		switch p, _ := o.(pair); p.name {
		case "connect_timeout_ms":
			opts = opts[:1]
		case "tls_cert_file":
			opts = append(opts, TLSKeyFile("/no/key"))
		case "tls_key_file":
			opts = append(opts, TLSCertFile("/no/cert"))
		case "retry_on_initial_connect": // connects later
			conn, err := Connect("nats://"+closed.Addr().String(), opts...)
			if err == nil {
				conn.Close(t.Context())
			}
			return err
		}
		conn, err := Connect("nats://"+closed.Addr().String(), opts...)
		if conn != nil {
			t.Errorf("%v: connected", o)
		}
		// The options were accepted if the server could not be reached, or if they were used: their files are read.
		p, _ := o.(pair)
		used := p.value != "" && (p.name == "nkey_seed" || strings.HasPrefix(p.value, "/no/"))
		if errors.Is(err, ErrDisconnected) || used && err != nil && !strings.Contains(err.Error(), "worker_threads") {
			return nil
		}
		return err
	})
}

func TestRequestOptions(t *testing.T) {
	s := startServer(t)
	c := connect(t, s)
	must(t, MarkClientOnline("options"))
	defer MarkClientOffline("options")
	testOptions(t, requestOptions, []string{"lanes", "drain_ms"}, func(o RequestOption) error {
		stream, err := c.Request(t.Context(), "options", nil, "options", o)
		if err == nil {
			stream.Close()
		}
		return err
	})
}

func TestServeOptions(t *testing.T) {
	s := startServer(t)
	c := connect(t, s)
	testOptions(t, serveOptionCases, []string{"lanes", "retries"}, func(o ServeOption) error {
		v, err := c.Listen(t.Context(), "options", "", o)
		if err == nil {
			v.Close()
		}
		return err
	})
}

// The error for an unknown option lists all options of the C library: each has a function here.
func TestEachOptionHasAFunction(t *testing.T) {
	setting := func(name string) string {
		o := options{pairs: []pair{{name, "\x01"}}}
		config, err := o.config()
		freeConfig(config)
		return fmt.Sprint(err)
	}
	known := map[string]bool{"manual_credit": true}
	for _, c := range connectOptions {
		known[c.name] = true
	}
	for _, c := range requestOptions {
		known[c.name] = true
	}
	found := 0
	for _, name := range regexp.MustCompile(`[a-z_]+`).FindAllString(setting("unknown"), -1) {
		err := setting(name)
		if strings.Contains(err, "receive_buffer_bytes") && strings.Contains(err, "worker_threads") {
			continue // the word is not an option: its error lists the options too
		}
		if found++; !known[name] {
			t.Errorf("option %s has no function", name)
		}
	}
	if want := len(known) - 1; found < want { // all but header.NAME
		t.Errorf("%d options were found, not %d", found, want)
	}
}

// A short time must not become 0, which means "no limit".
func TestDurationsAreRoundedAwayFromZero(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0", 1: "1", time.Millisecond: "1", time.Millisecond + 1: "2", -1: "-1", -time.Millisecond - 1: "-2",
		1500 * time.Microsecond: "2", time.Hour: "3600000",
	} {
		if p := milliseconds("x", d); p.value != want {
			t.Errorf("%v: %s, want %s", d, p.value, want)
		}
	}
}

func TestUserPasswordAndToken(t *testing.T) {
	connect(t, startServer(t, "--user", "me", "--pass", "secret"), User("me"), Password("secret"))
	connect(t, startServer(t, "--auth", "secret"), Token("secret"))
}

func TestLoggerGetsTheEvents(t *testing.T) {
	s := startServer(t)
	lines := make(lineWriter, 100)
	c, err := Connect(s.url, WithLogger(slog.New(slog.NewTextHandler(lines, nil))))
	must(t, err)
	t.Cleanup(func() { closeConn(c) })
	v, err := c.Listen(t.Context(), "logged", "")
	must(t, err)
	result := serveIn(v, func(context.Context, *Request, *Sender) error { return errors.New("no such model") })
	_, err = read(t, request(t, &client{Conn: c}, "logged", "ann"))
	wantError(t, err, ErrRemote, handlerFailed)
	c.logEvent(Event{Kind: Disconnected, Status: ErrDisconnected, Subject: "logged", Text: "why"})
	c.logEvent(Event{Kind: Connected, Text: "where"})
	for _, want := range []string{
		`level=INFO msg="presence: serving" text=logged` + "\n",
		`level=WARN msg="presence: log" text=".*no such model" client=ann` + "\n",
		`level=WARN msg="presence: disconnected" text=why status=".*" subject=logged` + "\n",
		`level=INFO msg="presence: connected" text=where` + "\n",
	} {
		if line := receive(t, lines); !regexp.MustCompile(want).MatchString(line) {
			t.Errorf("%q, want %q", line, want)
		}
	}
	must(t, v.Close())
	must(t, receive(t, result))
}
