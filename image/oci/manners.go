package oci

import (
	"fmt"
	"net/http"

	"push.rocks/smartvm/internal/download"
)

// manners is how registries are spoken to: not in plain text unless they are on this machine, and
// with patience.
type manners struct {
	download.Transport
	local    bool // the registry is on this machine; another could lead us to this machine's own services
	insecure bool // somebody has said that plain HTTP will do
}

func (m *manners) RoundTrip(req *http.Request) (*http.Response, error) {
	switch plain, near := req.URL.Scheme != "https", here(req.URL.Hostname()); {
	case plain && !near && !m.insecure:
		return nil, fmt.Errorf("%s: %w", req.URL.Host, ErrPlainHTTP)
	case plain && near && !m.local:
		return nil, fmt.Errorf("a registry elsewhere leads to %s: %w", req.URL.Host, ErrPlainHTTP)
	}
	return m.Transport.RoundTrip(req)
}
