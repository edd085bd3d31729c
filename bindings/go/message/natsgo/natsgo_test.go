package natsgo

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base32"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
	presence "github.com/nats-presence/nats-presence/bindings/go"
)

var readyOn = regexp.MustCompile(`client connections on 127.0.0.1:(\d+)`)

// startServer starts a nats-server that ends with the test, and returns its URL.
func startServer(t *testing.T, config string) string {
	t.Helper()
	binary := os.Getenv("NATS_SERVER_BIN")
	if binary == "" {
		binary = "nats-server"
	}
	path := filepath.Join(t.TempDir(), "server.conf")
	must(t, os.WriteFile(path, []byte(config), 0o600))
	command := exec.Command(binary, "-a", "127.0.0.1", "-p", "-1", "-c", path)
	log, err := command.StderrPipe()
	must(t, err)
	must(t, command.Start())
	t.Cleanup(func() {
		command.Process.Kill()
		command.Wait()
	})
	lines, port := bufio.NewScanner(log), ""
	for lines.Scan() && !strings.Contains(lines.Text(), "Server is ready") {
		if match := readyOn.FindStringSubmatch(lines.Text()); match != nil {
			port = match[1]
		}
	}
	go func() {
		for lines.Scan() {
		}
	}()
	return "nats://127.0.0.1:" + port
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// works connects by nats.go, then by presence with the same options, and with the settings of the first connection.
func works(t *testing.T, url string, opts ...nats.Option) {
	t.Helper()
	nc, err := nats.Connect(url, opts...)
	must(t, err)
	nc.Close()
	own, err := ConnectOptions(opts...)
	must(t, err)
	first, err := presence.Connect(url, own...)
	must(t, err)
	second, err := Connect(nc, presence.Name("other"))
	must(t, err)
	for _, conn := range []*presence.Conn{first, second} {
		must(t, conn.ListenOffline()) // a round trip
		must(t, conn.Close(context.Background()))
	}
}

func TestPasswordsAndTokens(t *testing.T) {
	url := startServer(t, `authorization { user: me, password: "se:cret" }`)
	works(t, url, nats.UserInfo("me", "se:cret"))
	works(t, url, nats.UserInfoHandler(func() (string, string) { return "me", "se:cret" }))
	works(t, strings.Replace(url, "//", "//me:se%3Acret@", 1), nats.Name("with credentials in the URL"))
	url = startServer(t, `authorization { token: secret }`)
	works(t, url, nats.Token("secret"))
	works(t, url, nats.TokenHandler(func() string { return "secret" }))
}

func TestNKeys(t *testing.T) {
	user, err := nkeys.CreateUser()
	must(t, err)
	public, err := user.PublicKey()
	must(t, err)
	url := startServer(t, fmt.Sprintf("authorization { users: [ { nkey: %s } ] }", public))
	works(t, url, nats.Nkey(public, user.Sign))
	opts, err := ConnectOptions(nats.Nkey(public, func([]byte) ([]byte, error) { return nil, errors.New("sealed") }))
	must(t, err)
	if _, err := presence.Connect(url, opts...); err == nil || !strings.Contains(err.Error(), "sealed") {
		t.Error(err)
	}
}

// jwt returns a JWT in which the issuer makes these claims about the subject.
func jwt(t *testing.T, issuer, subject nkeys.KeyPair, name string, claims map[string]any) string {
	t.Helper()
	claims["version"] = 2
	iss, err := issuer.PublicKey()
	must(t, err)
	sub, err := subject.PublicKey()
	must(t, err)
	all := map[string]any{"iat": time.Now().Unix(), "iss": iss, "sub": sub, "name": name, "nats": claims}
	text, err := json.Marshal(all)
	must(t, err)
	hash := sha256.Sum256(text)
	all["jti"] = base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(hash[:])
	text, err = json.Marshal(all)
	must(t, err)
	encode := base64.RawURLEncoding.EncodeToString
	signed := encode([]byte(`{"typ":"JWT","alg":"ed25519-nkey"}`)) + "." + encode(text)
	signature, err := issuer.Sign([]byte(signed))
	must(t, err)
	return signed + "." + encode(signature)
}

func TestUserJWTs(t *testing.T) {
	operator, err := nkeys.CreateOperator()
	must(t, err)
	account, err := nkeys.CreateAccount()
	must(t, err)
	user, err := nkeys.CreateUser()
	must(t, err)
	limits := map[string]any{"wildcards": true}
	for _, name := range []string{"subs", "data", "payload", "imports", "exports", "conn", "leaf"} {
		limits[name] = -1
	}
	public, err := account.PublicKey()
	must(t, err)
	url := startServer(t, fmt.Sprintf("operator: %s\nresolver: MEMORY\nresolver_preload: { %s: %s }",
		jwt(t, operator, operator, "operator", map[string]any{"type": "operator"}), public,
		jwt(t, operator, account, "tenant", map[string]any{"type": "account", "limits": limits})))
	own := jwt(t, account, user, "user", map[string]any{"type": "user", "subs": -1, "data": -1, "payload": -1})
	works(t, url, nats.UserJWT(func() (string, error) { return own, nil }, user.Sign))
	seed, err := user.Seed()
	must(t, err)
	works(t, url, nats.UserJWTAndSeed(own, string(seed)))
	file := filepath.Join(t.TempDir(), "user.creds")
	must(t, os.WriteFile(file, fmt.Appendf(nil,
		"-----BEGIN NATS USER JWT-----\n%s\n------END NATS USER JWT------\n\n"+
			"-----BEGIN USER NKEY SEED-----\n%s\n------END USER NKEY SEED------\n", own, seed), 0o600))
	works(t, url, nats.UserCredentials(file))
}

func writePEM(t *testing.T, path, kind string, der []byte) string {
	t.Helper()
	must(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
	return path
}

func TestTLS(t *testing.T) {
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	authority := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, authority, authority, &key.PublicKey, key)
	must(t, err)
	ca := writePEM(t, filepath.Join(dir, "ca.pem"), "CERTIFICATE", der)
	own := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "both ends"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter:    time.Now().Add(time.Hour),
		IPAddresses: []net.IP{{127, 0, 0, 1}},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err = x509.CreateCertificate(rand.Reader, own, authority, &key.PublicKey, key)
	must(t, err)
	certFile := writePEM(t, filepath.Join(dir, "cert.pem"), "CERTIFICATE", der)
	der, err = x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	keyFile := writePEM(t, filepath.Join(dir, "key.pem"), "PRIVATE KEY", der)
	const config = "tls { cert_file: %q, key_file: %q, ca_file: %q, verify: true, handshake_first: %v }"
	url := startServer(t, fmt.Sprintf(config, certFile, keyFile, ca, false))
	works(t, url, nats.RootCAs(ca), nats.ClientCert(certFile, keyFile))
	certificate, err := tls.LoadX509KeyPair(certFile, keyFile)
	must(t, err)
	pool := x509.NewCertPool()
	text, err := os.ReadFile(ca)
	must(t, err)
	pool.AppendCertsFromPEM(text)
	settings := &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12}
	works(t, url, nats.Secure(settings))
	first := startServer(t, fmt.Sprintf(config, certFile, keyFile, ca, true))
	works(t, first, nats.Secure(settings), nats.TLSHandshakeFirst())
	// What presence cannot use is refused, not ignored.
	opts, err := ConnectOptions(nats.Secure(&tls.Config{InsecureSkipVerify: true}))
	must(t, err)
	if _, err := presence.Connect(url, opts...); !errors.Is(err, presence.ErrInvalid) {
		t.Error(err)
	}
	if _, err := ConnectOptions(nats.RootCAs("/no/file")); err == nil {
		t.Error("a missing file is accepted")
	}
}

func TestTimesAndNames(t *testing.T) {
	url := startServer(t, "")
	works(t, url,
		nats.Name("a gateway"), nats.Timeout(3*time.Second), nats.PingInterval(5*time.Second), nats.MaxReconnects(7),
		nats.ReconnectWait(time.Second), nats.CustomInboxPrefix("_INBOX_gateway"),
		nats.NoReconnect(), nats.ErrorHandler(nil), nil)
	works(t, url, nats.MaxReconnects(-1))
	opts, err := ConnectOptions(nats.RetryOnFailedConnect(true))
	must(t, err)
	conn, err := presence.Connect("nats://127.0.0.1:1", opts...)
	must(t, err)
	conn.Close(t.Context())
	// Two servers, the first of which does not exist.
	works(t, "nats://127.0.0.1:1,"+url)
}

func TestOptionsThatPresenceDoesNotHave(t *testing.T) {
	for name, opt := range map[string]nats.Option{
		"CustomDialer":    nats.SetCustomDialer(new(net.Dialer)),
		"InProcessServer": nats.InProcessServer(inProcess{}),
		"ProxyPath":       nats.ProxyPath("/nats"),
	} {
		_, err := ConnectOptions(opt)
		if !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	wrong := errors.New("wrong")
	if _, err := ConnectOptions(func(*nats.Options) error { return wrong }); err != wrong {
		t.Error(err)
	}
}

type inProcess struct{}

func (inProcess) InProcessConn() (net.Conn, error) { return nil, errors.New("not used") }
