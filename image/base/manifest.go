package base

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/strictjson"
)

// ManifestSchema is the only one there is.
const ManifestSchema = 1

const maxManifest = 1 << 20 // bytes

// ManifestError says all that is wrong with a manifest: an errors.Join of *strictjson.Error.
type ManifestError struct {
	Source string // its path, or its URL
	Err    error
}

func (e *ManifestError) Error() string { return fmt.Sprintf("manifest %s: %v", e.Source, e.Err) }
func (e *ManifestError) Unwrap() error { return e.Err }

// manifest describes a bundle, as the original's does.
type manifest struct {
	SchemaVersion      int       `json:"schemaVersion"`
	BundleID           string    `json:"bundleId"`
	Name               string    `json:"name"`
	Arch               string    `json:"arch"`
	FirecrackerVersion string    `json:"firecrackerVersion"`
	RootfsType         string    `json:"rootfsType"`
	RootfsIsReadOnly   *bool     `json:"rootfsIsReadOnly"` // default: squashfs is
	BootArgs           string    `json:"bootArgs"`
	Kernel             *hostedBy `json:"kernel"`
	Rootfs             *hostedBy `json:"rootfs"`
}

// hostedBy is a file that a manifest names.
type hostedBy struct {
	URL       string `json:"url"`
	Path      string `json:"path"`
	SHA256    string `json:"sha256"`
	SizeBytes int64  `json:"sizeBytes"`
	FileName  string `json:"fileName"`
}

// hosted plans what the manifest says.
func (s *Store) hosted(ctx context.Context) (*plan, error) {
	from := &origin{arch: s.opts.Arch}
	var data []byte
	var err error
	switch {
	case s.opts.ManifestURL != "":
		if from.url, err = url.Parse(s.opts.ManifestURL); err != nil {
			return nil, fmt.Errorf("manifest's URL: %w", fs.ErrInvalid)
		}
		data, err = s.opts.client.Get(ctx, s.opts.ManifestURL, maxManifest)
	case s.opts.ManifestPath != "":
		if from.path, err = filepath.Abs(s.opts.ManifestPath); err == nil {
			data, err = readManifest(from.path)
		}
	default:
		return nil, fmt.Errorf("%w: there is no manifest", fs.ErrInvalid)
	}
	if err != nil {
		return nil, fmt.Errorf("read manifest: %w", err)
	}
	p, err := parseManifest(data, from)
	if err != nil {
		source := from.path
		if from.url != nil {
			shown := url.URL{Scheme: from.url.Scheme, Host: from.url.Host, Path: from.url.Path}
			source = shown.String()
		}
		return nil, &ManifestError{source, err}
	}
	return p, nil
}

func readManifest(path string) ([]byte, error) {
	fi, err := os.Stat(path)
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%s: %w: no regular file", path, fs.ErrInvalid)
	}
	if err != nil {
		return nil, err
	}
	return atomicfile.Read(path, maxManifest)
}

// origin is where a manifest comes from, and for what.
type origin struct {
	path string // absolute; empty: url
	url  *url.URL
	arch string
}

func parseManifest(data []byte, from *origin) (*plan, error) {
	m, err := strictjson.Unmarshal[manifest](data, maxManifest)
	if err != nil {
		return nil, err
	}
	c := &problems{}
	c.require(m.SchemaVersion == ManifestSchema, "schemaVersion", m.SchemaVersion, fmt.Sprint("must be ", ManifestSchema))
	c.require(validID(m.BundleID), "bundleId", clip(m.BundleID), "must be 1 to 128 of A-Z a-z 0-9 . _ -, not a dot first")
	c.require(printable(m.Name, 200), "name", clip(m.Name), "must be at most 200 bytes on one line")
	c.require(m.Arch == from.arch, "arch", clip(m.Arch), "must be "+from.arch+", as this store's")
	version := versionPattern.MatchString(m.FirecrackerVersion)
	c.require(m.FirecrackerVersion == "" || version, "firecrackerVersion", clip(m.FirecrackerVersion),
		"must be vMAJOR.MINOR.PATCH")
	c.require(m.RootfsType == "ext4" || m.RootfsType == "squashfs", "rootfsType", clip(m.RootfsType),
		"must be ext4 or squashfs")
	squashfs := m.RootfsType == "squashfs"
	readOnly := squashfs
	if m.RootfsIsReadOnly != nil {
		readOnly = *m.RootfsIsReadOnly
	}
	c.require(readOnly || !squashfs, "rootfsIsReadOnly", readOnly, "must be true for squashfs")
	c.require(printable(m.BootArgs, 2047), "bootArgs", clip(m.BootArgs), "must be shorter than 2048 bytes, on one line")
	p := &plan{
		id: m.BundleID, name: cmp.Or(m.Name, m.BundleID), rootfsType: m.RootfsType, readOnly: readOnly, hosted: true,
		bootArgs: m.BootArgs,
		kernel:   c.artifact("kernel", m.Kernel, from, "vmlinux"),
		rootfs:   c.artifact("rootfs", m.Rootfs, from, "rootfs."+m.RootfsType),
	}
	if version {
		p.version = "v" + strings.TrimPrefix(m.FirecrackerVersion, "v")
	}
	c.require(p.kernel.fileName != p.rootfs.fileName, "rootfs.fileName", clip(p.rootfs.fileName),
		"must not be the kernel's too")
	if c.errs != nil {
		return nil, errors.Join(c.errs...)
	}
	return p, nil
}

// problems are those of a manifest.
type problems struct{ errs []error }

func (c *problems) require(ok bool, path string, value any, reason string) {
	if !ok {
		c.errs = append(c.errs, &strictjson.Error{Path: path, Value: value, Reason: reason})
	}
}

func (c *problems) artifact(at string, f *hostedBy, from *origin, name string) artifact {
	if f == nil {
		c.require(false, at, nil, "is required")
		return artifact{fileName: at}
	}
	a := artifact{sha256: strings.ToLower(f.SHA256), size: f.SizeBytes, fileName: cmp.Or(f.FileName, name)}
	switch {
	case (f.URL == "") == (f.Path == ""):
		c.require(false, at, nil, "must have either url or path")
	case f.URL != "":
		a.url = f.URL
		u, err := url.Parse(f.URL)
		c.require(err == nil && (u.Scheme == "https" || u.Scheme == "http") &&
			u.Host != "", at+".url", nil, "must be a URL of https or http")
	case from.url == nil:
		a.path = f.Path
		if !filepath.IsAbs(f.Path) {
			a.path = filepath.Join(filepath.Dir(from.path), f.Path)
		}
		c.require(!strings.Contains(f.Path, "\x00"), at+".path", nil, "must be a path")
	default:
		// A manifest from elsewhere must not have us read this machine's files.
		c.require(!strings.HasPrefix(f.Path, "/"), at+".path", clip(f.Path),
			"must be relative to the manifest, which comes from a URL")
		a.url = from.url.ResolveReference(&url.URL{Path: f.Path}).String()
	}
	sum, err := hex.DecodeString(f.SHA256)
	c.require(f.SHA256 == "" || err == nil && len(sum) == 32, at+".sha256", clip(f.SHA256),
		"must be 64 hexadecimal digits")
	c.require(f.SHA256 != "" || a.url == "", at+".sha256", nil, "is required for what is fetched")
	c.require(f.SizeBytes >= 0, at+".sizeBytes", f.SizeBytes, "must not be negative")
	c.require(plainName(a.fileName), at+".fileName", clip(a.fileName), "must be a plain file name")
	return a
}

func printable(s string, most int) bool {
	return len(s) <= most && !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f })
}

func clip(s string) string { return s[:min(len(s), 64)] }
