//go:build cgo

package presence

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Credentials are what one attempt to connect authenticates with. Fields that are empty are not used.
type Credentials struct {
	User, Password string
	Token          string
	JWT            string // of a user; it needs Signature
	NKey           string // the public key of a user; it needs Signature
	Signature      []byte // of the nonce, by the user's key
}

type credentialsOption func(nonce []byte) (Credentials, error)

func (f credentialsOption) apply(o *options) { o.credentials = f }
func (credentialsOption) forConnect()        {}

// CredentialsFunc makes [Connect] call f for each attempt to connect, at first and after the connection was lost: use
// it for credentials that change, or whose seed the process does not have. nonce is what nats-server wants signed; it
// is empty if the server does not use JWTs and NKeys. If f fails, the attempt fails with the text of its error.
//
// The calls come one after the other, from a goroutine of the connection. f replaces all other credentials.
func CredentialsFunc(f func(nonce []byte) (Credentials, error)) ConnectOption {
	return credentialsOption(f)
}

// AuthSocket makes [Connect] ask an agent, which listens on this Unix socket, for the credentials of each attempt to
// connect. nats_presence.h describes what an agent reads and writes (option auth_socket).
func AuthSocket(path string) ConnectOption { return pair{"auth_socket", path} }

// agent answers the library's questions for credentials, on a Unix socket that only this user can reach.
type agent struct {
	dir      string
	listener net.Listener
	ask      func(nonce []byte) (Credentials, error)
}

// agentTimeout limits how long a question or an answer may take on the way.
const agentTimeout = 5 * time.Second

func newAgent(ask func(nonce []byte) (Credentials, error)) (*agent, error) {
	dir, err := os.MkdirTemp("", "presence-") // with the permissions 0700
	if err != nil {
		return nil, fmt.Errorf("cannot make a socket for CredentialsFunc: %w", err)
	}
	a := &agent{dir: dir, ask: ask}
	if a.listener, err = net.Listen("unix", filepath.Join(dir, "auth")); err != nil {
		os.RemoveAll(dir)
		return nil, fmt.Errorf("cannot make a socket for CredentialsFunc: %w", err)
	}
	go a.run()
	return a, nil
}

func (a *agent) path() string { return a.listener.Addr().String() }

func (a *agent) close() {
	a.listener.Close()
	os.RemoveAll(a.dir)
}

func (a *agent) run() {
	for {
		conn, err := a.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			a.answer(conn)
		}
	}
}

func (a *agent) answer(conn net.Conn) {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(agentTimeout))
	nonce, err := bufio.NewReader(conn).ReadBytes('\n')
	if err != nil {
		return
	}
	credentials, err := a.ask(nonce[:len(nonce)-1])
	var text strings.Builder
	if err != nil {
		fmt.Fprintf(&text, "error %s\n", strings.Join(strings.Fields(err.Error()), " "))
	} else {
		text.WriteString("password " + credentials.Password + "\n") // the answer must not be empty
		for name, value := range map[string]string{
			"user": credentials.User, "token": credentials.Token, "jwt": credentials.JWT, "nkey": credentials.NKey,
			"signature": hex.EncodeToString(credentials.Signature),
		} {
			if value != "" {
				text.WriteString(name + " " + value + "\n")
			}
		}
	}
	conn.SetDeadline(time.Now().Add(agentTimeout)) // the function may have taken long
	conn.Write([]byte(text.String()))
}
