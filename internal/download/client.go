package download

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"net/url"
	"strings"
)

// MaxRedirects bounds how often a server may send us elsewhere.
const MaxRedirects = 5

// Client fetches. It follows at most MaxRedirects redirects, and none from https to http. The zero
// value serves. It is safe for concurrent use.
type Client struct {
	Transport
	// Waiting is told of the path that another process is fetching and we wait for. It may be nil.
	Waiting func(path string)
}

// Get returns a document of at most limit bytes. Errors are *StatusError, *SizeError and those of
// the network.
func (c *Client) Get(ctx context.Context, rawURL string, limit int64) ([]byte, error) {
	for try := 1; ; try++ {
		data, err := c.get(ctx, rawURL, limit)
		if try == maxTries || !errors.As(err, new(*brokenError)) {
			return data, err
		}
		if err := c.wait(ctx, try, 0, "err", err); err != nil {
			return nil, fmt.Errorf("download: %w", err)
		}
	}
}

func (c *Client) get(ctx context.Context, rawURL string, limit int64) ([]byte, error) {
	resp, err := c.do(ctx, http.MethodGet, rawURL, nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	switch {
	case err != nil:
		return nil, &brokenError{redact(rawURL), err}
	case int64(len(data)) > limit:
		return nil, &SizeError{URL: redact(rawURL), Want: limit, Got: -1}
	}
	return data, nil
}

// Location follows redirects with HEAD requests and returns the URL at their end.
func (c *Client) Location(ctx context.Context, rawURL string) (string, error) {
	resp, err := c.do(ctx, http.MethodHead, rawURL, nil)
	if err != nil {
		return "", err
	}
	return resp.Request.URL.String(), resp.Body.Close()
}

// Fetch brings f to path, as Bring does. Progress is Transfer's. Errors are *StatusError too.
func (c *Client) Fetch(ctx context.Context, f File, path string, progress func(done, total int64)) error {
	etag := f.ETag
	return c.Bring(ctx, path, Transfer{
		Name: redact(f.URL), SHA256: f.SHA256, Resumable: f.ETag != "", Size: f.Size, MaxSize: f.MaxSize, Progress: progress,
		Open: func(ctx context.Context, offset int64) (*Body, error) {
			return Range(offset, etag, func(header http.Header) (*http.Response, error) {
				resp, err := c.do(ctx, http.MethodGet, f.URL, header)
				if err == nil {
					etag = resp.Header.Get("ETag")
				}
				return resp, err
			})
		},
	})
}

// Range asks for content from offset on and, if the server cannot send that, for the whole. With an
// etag, what comes is the whole too if the content has another now. Request makes a request with a
// header; it returns an error for each status but 200 and, if the header has a Range, 206 and 416.
func Range(offset int64, etag string, request func(header http.Header) (*http.Response, error)) (*Body, error) {
	header := http.Header{}
	if offset > 0 {
		header.Set("Range", fmt.Sprintf("bytes=%d-", offset))
		if strings.HasPrefix(etag, `"`) { // a weak one does not promise the same bytes
			header.Set("If-Range", etag)
		}
	}
	resp, err := request(header)
	if err != nil {
		return nil, err
	}
	b := &Body{ReadCloser: resp.Body}
	if resp.StatusCode != http.StatusOK {
		var last int64
		// Not all servers say all of it.
		_, _ = fmt.Sscanf(resp.Header.Get("Content-Range"), "bytes %d-%d/%d", &b.Start, &last, &b.Total)
		if resp.StatusCode != http.StatusPartialContent || b.Start != offset {
			// The server does not have what is missing, or something else.
			_ = resp.Body.Close()
			return Range(0, "", request)
		}
	}
	if b.Total == 0 && resp.ContentLength > 0 {
		b.Total = b.Start + resp.ContentLength
	}
	return b, nil
}

// do makes one request: see Range for what it returns errors for. The caller closes the body.
func (c *Client) do(ctx context.Context, method, rawURL string, header http.Header) (*http.Response, error) {
	name := redact(rawURL)
	req, err := http.NewRequestWithContext(ctx, method, rawURL, nil)
	if err != nil || req.URL.Scheme != "http" && req.URL.Scheme != "https" {
		// What url.Parse says of it may hold a password.
		return nil, fmt.Errorf("get %s: %w: no URL of http or https", name, fs.ErrInvalid)
	}
	maps.Copy(req.Header, header)
	req.Header.Set("User-Agent", "smartvm")
	// Nothing between the server and us shall change the bytes that we count.
	req.Header.Set("Accept-Encoding", "identity")
	client := http.Client{Transport: &c.Transport, CheckRedirect: checkRedirect}
	resp, err := client.Do(req)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err // without the URL, and what is secret in it
		}
		return nil, fmt.Errorf("get %s: %w", name, err)
	}
	switch code := resp.StatusCode; {
	case code == http.StatusOK:
	case header.Get("Range") != "" &&
		(code == http.StatusPartialContent || code == http.StatusRequestedRangeNotSatisfiable):
	default:
		_ = resp.Body.Close()
		return nil, &StatusError{URL: name, Code: code}
	}
	return resp, nil
}

// checkRedirect is an http.Client's.
func checkRedirect(req *http.Request, via []*http.Request) error {
	from, to := via[len(via)-1].URL, req.URL
	switch {
	case len(via) > MaxRedirects:
		return fmt.Errorf("%w: more than %d of them", ErrRedirect, MaxRedirects)
	case to.Scheme != "https" && (to.Scheme != "http" || from.Scheme == "https"):
		return fmt.Errorf("%w: from %s to %s", ErrRedirect, from.Scheme, to.Scheme)
	}
	return nil
}
