package presence

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"
)

// openFiles returns how many files this process has open.
func openFiles(t *testing.T) int {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(files)
}

func TestCredentialsFuncIsCalledForEachAttempt(t *testing.T) {
	const secret = "hunter2"
	t.Setenv("TMPDIR", t.TempDir())
	s := startServer(t, "--user", "me", "--pass", secret)
	before := openFiles(t)
	var calls atomic.Int64
	f := func(nonce []byte) (Credentials, error) {
		if len(nonce) != 0 {
			t.Errorf("nonce %q", nonce)
		}
		calls.Add(1)
		return Credentials{User: "me", Password: secret}, nil
	}
	c := connect(t, s, CredentialsFunc(f), Password("is replaced"), ReconnectMax(100*time.Millisecond))
	if calls.Load() != 1 {
		t.Errorf("%d calls", calls.Load())
	}
	s.kill()
	c.events.wait(t, Disconnected, "")
	startServer(t, "-p", s.port, "--user", "me", "--pass", secret)
	c.events.wait(t, Connected, s.port)
	if calls.Load() < 2 {
		t.Errorf("%d calls", calls.Load())
	}
	must(t, closeConn(c.Conn))
	for name, test := range map[string]struct {
		credentials Credentials
		err         error
		text        string
	}{
		"wrong": {Credentials{User: "me", Password: "wrong"}, nil, "authorization violation"},
		"none":  {Credentials{}, nil, "authorization violation"},
		"error": {Credentials{}, errors.New("the vault\nis sealed"), "the vault is sealed"},
	} {
		t.Run(name, func(t *testing.T) {
			s := startServer(t, "--user", "me", "--pass", secret)
			_, err := Connect(s.url, CredentialsFunc(func([]byte) (Credentials, error) {
				return test.credentials, test.err
			}))
			wantError(t, err, ErrDisconnected, test.text)
		})
	}
	_, err := Connect("http://x", CredentialsFunc(f))
	wantError(t, err, ErrInvalid, "http")
	left, err := os.ReadDir(os.Getenv("TMPDIR"))
	if err != nil || len(left) != 0 {
		t.Error("files are left: ", left, err)
	}
	eventually(t, "no file is open", func() bool { return openFiles(t) <= before })
}

// authority issues certificates.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	must(t, err)
	certificate, err := x509.ParseCertificate(der)
	must(t, err)
	return &authority{certificate, key}
}

func (a *authority) issue(t *testing.T, name string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		IPAddresses: []net.IP{{127, 0, 0, 1}}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter:    time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.certificate, &key.PublicKey, a.key)
	must(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func writePEM(t *testing.T, path, kind string, der []byte) string {
	t.Helper()
	must(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
	return path
}

// startTLSServer starts a nats-server that requires a client certificate of the authority.
func startTLSServer(t *testing.T, a *authority) *server {
	t.Helper()
	dir, own := t.TempDir(), a.issue(t, "server")
	key, err := x509.MarshalPKCS8PrivateKey(own.PrivateKey)
	must(t, err)
	return startServer(t, "--tlsverify",
		"--tlscert", writePEM(t, filepath.Join(dir, "cert.pem"), "CERTIFICATE", own.Certificate[0]),
		"--tlskey", writePEM(t, filepath.Join(dir, "key.pem"), "PRIVATE KEY", key),
		"--tlscacert", writePEM(t, filepath.Join(dir, "ca.pem"), "CERTIFICATE", a.certificate.Raw))
}

func TestTLSConfigIsUsed(t *testing.T) {
	a, other := newAuthority(t), newAuthority(t)
	s := startTLSServer(t, a)
	roots, wrong := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(other.certificate)
	roots.AddCert(a.certificate)
	wrong.AddCert(other.certificate)
	own := a.issue(t, "client")
	before := openFiles(t)
	for name, config := range map[string]*tls.Config{
		"certificates": {RootCAs: roots, Certificates: []tls.Certificate{own}},
		"callback": {RootCAs: roots, GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &own, nil
		}},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := Connect(s.url, TLSConfig(config))
			must(t, err)
			must(t, c.ListenOffline()) // a round trip
			must(t, c.Close(context.Background()))
		})
	}
	for name, config := range map[string]*tls.Config{
		"no client certificate":    {RootCAs: roots},
		"another authority":        {RootCAs: wrong, Certificates: []tls.Certificate{own}},
		"the system's authorities": {Certificates: []tls.Certificate{own}},
		"another's certificate":    {RootCAs: roots, Certificates: []tls.Certificate{other.issue(t, "client")}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Connect(s.url, TLSConfig(config))
			wantError(t, err, ErrDisconnected, "127.0.0.1")
		})
	}
	eventually(t, "no file is open", func() bool { return openFiles(t) <= before })
}

func TestTLSConfigWithUnsupportedFieldsIsRefused(t *testing.T) {
	own := newAuthority(t).issue(t, "client")
	for text, config := range map[string]*tls.Config{
		"InsecureSkipVerify":    {InsecureSkipVerify: true},
		"ServerName":            {ServerName: "x"},
		"VerifyConnection":      {VerifyConnection: func(tls.ConnectionState) error { return nil }},
		"VerifyPeerCertificate": {VerifyPeerCertificate: func([][]byte, [][]*x509.Certificate) error { return nil }},
		"MinVersion":            {MinVersion: tls.VersionTLS13},
		"2 certificates":        {Certificates: []tls.Certificate{own, own}},
		"private key":           {Certificates: []tls.Certificate{{Certificate: own.Certificate}}},
		"RootCAs":               {RootCAs: x509.NewCertPool()},
		"no token": {GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return nil, errors.New("no token in the slot")
		}},
	} {
		t.Run(text, func(t *testing.T) {
			_, err := Connect("nats://127.0.0.1:1", TLSConfig(config))
			wantError(t, err, ErrInvalid, text)
		})
	}
}
