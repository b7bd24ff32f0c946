package base

import (
	"bytes"
	"cmp"
	"context"
	"encoding/xml"
	"fmt"
	"io/fs"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
)

const (
	ciRoot     = "firecracker-ci/"
	maxListing = 8 << 20 // bytes of a page
	maxPages   = 20
	maxDated   = 3 // of the dated prefixes, how many are looked into: the newest may not be whole yet
)

// ciPatterns are compiled when the CI is first asked: most processes never do.
var ciPatterns = sync.OnceValue(func() (p struct{ kernel, rootfs, dated *regexp.Regexp }) {
	// Kernels that are none for ordinary use have more after the version: "-no-acpi", ".config".
	p.kernel = regexp.MustCompile(`^vmlinux-[0-9]{1,4}\.[0-9]{1,4}(\.[0-9]{1,4})?$`)
	p.rootfs = regexp.MustCompile(`^ubuntu-[A-Za-z0-9._-]{1,30}\.(squashfs|ext4)$`)
	p.dated = regexp.MustCompile(`^` + ciRoot + `([0-9]{8}-[A-Za-z0-9._-]{1,40})/$`)
	return p
})

var versionPattern = regexp.MustCompile(`^v?([0-9]{1,6}\.[0-9]{1,6})\.[0-9]{1,6}$`)

// ci plans what the CI of a Firecracker version has: of the version's own train, else the newest.
func (s *Store) ci(ctx context.Context, version string) (*plan, error) {
	m := versionPattern.FindStringSubmatch(version)
	if m == nil {
		return nil, fmt.Errorf("firecracker version %.70q: %w", version, fs.ErrInvalid)
	}
	p, err := s.train(ctx, "v"+m[1])
	if p == nil && err == nil {
		p, err = s.newestTrain(ctx)
	}
	if err != nil {
		return nil, err
	}
	if p == nil {
		return nil, &ResolveError{
			fmt.Sprintf("the CI of Firecracker %s has no kernel with a root file system for %s", version, s.opts.Arch),
		}
	}
	p.version = "v" + strings.TrimPrefix(version, "v")
	return p, nil
}

// newestTrain looks into the trains that are named by their date.
func (s *Store) newestTrain(ctx context.Context) (*plan, error) {
	l, err := s.list(ctx, ciRoot, "/")
	if err != nil {
		return nil, err
	}
	var dated []string
	for _, prefix := range l.prefixes {
		if m := ciPatterns().dated.FindStringSubmatch(prefix); m != nil {
			dated = append(dated, m[1])
		}
	}
	slices.Sort(dated)
	slices.Reverse(dated)
	for _, name := range dated[:min(len(dated), maxDated)] {
		if p, err := s.train(ctx, name); p != nil || err != nil {
			return p, err
		}
	}
	return nil, nil
}

// train plans what is below a prefix, or returns nil if that is not enough.
func (s *Store) train(ctx context.Context, name string) (*plan, error) {
	prefix := ciRoot + name + "/" + s.opts.Arch + "/"
	l, err := s.list(ctx, prefix, "")
	if err != nil {
		return nil, err
	}
	kernel, rootfs := choose(l.objects, prefix)
	if kernel == nil || rootfs == nil {
		return nil, nil
	}
	p := &plan{rootfsType: "ext4"}
	if strings.HasSuffix(rootfs.key, ".squashfs") {
		p.rootfsType, p.readOnly = "squashfs", true
	}
	for of, to := range map[*object]*artifact{kernel: &p.kernel, rootfs: &p.rootfs} {
		*to = artifact{
			url: s.opts.BucketURL + "/" + of.key, etag: of.etag, size: of.size,
			fileName: strings.TrimPrefix(of.key, prefix),
		}
	}
	p.id = strings.Join([]string{name, s.opts.Arch, p.kernel.fileName, p.rootfs.fileName}, "-")
	p.name = "Firecracker CI " + name + ", " + strings.TrimSuffix(p.rootfs.fileName, "."+p.rootfsType)
	return p, nil
}

// choose takes the newest kernel and the newest root file system directly below a prefix, squashfs
// before ext4.
func choose(objects []object, prefix string) (kernel, rootfs *object) {
	newest := func(pattern *regexp.Regexp, suffix string) *object {
		var best *object
		for i := range objects {
			o := &objects[i]
			name, ok := strings.CutPrefix(o.key, prefix)
			if ok && pattern.MatchString(name) && strings.HasSuffix(name, suffix) &&
				(best == nil || natural(o.key, best.key) > 0) {
				best = o
			}
		}
		return best
	}
	return newest(ciPatterns().kernel, ""),
		cmp.Or(newest(ciPatterns().rootfs, ".squashfs"), newest(ciPatterns().rootfs, ".ext4"))
}

// natural compares texts, numbers in them as such.
func natural(a, b string) int {
	digits := func(s string) int { return len(s) - len(strings.TrimLeft(s, "0123456789")) }
	for a != "" && b != "" {
		n, m := digits(a), digits(b)
		if n > 0 && m > 0 {
			x, y := strings.TrimLeft(a[:n], "0"), strings.TrimLeft(b[:m], "0")
			if c := cmp.Or(cmp.Compare(len(x), len(y)), cmp.Compare(x, y)); c != 0 {
				return c
			}
			a, b = a[n:], b[m:]
			continue
		}
		if a[0] != b[0] {
			return cmp.Compare(a[0], b[0])
		}
		a, b = a[1:], b[1:]
	}
	return cmp.Compare(len(a), len(b))
}

// object is one in a bucket.
type object struct {
	key, etag string
	size      int64 // bytes, 0: unknown
}

type listing struct {
	objects  []object
	prefixes []string
}

// list reads all pages of a bucket's listing.
func (s *Store) list(ctx context.Context, prefix, delimiter string) (*listing, error) {
	all := &listing{}
	token := ""
	for range maxPages {
		q := url.Values{"list-type": {"2"}, "prefix": {prefix}}
		if delimiter != "" {
			q.Set("delimiter", delimiter)
		}
		if token != "" {
			q.Set("continuation-token", token)
		}
		data, err := s.opts.client.Get(ctx, s.opts.BucketURL+"/?"+q.Encode(), maxListing)
		if err != nil {
			return nil, err
		}
		page, next, err := parseListing(data)
		if err != nil {
			return nil, fmt.Errorf("list %s: %w", prefix, err)
		}
		all.objects, all.prefixes = append(all.objects, page.objects...), append(all.prefixes, page.prefixes...)
		if token = next; token == "" {
			return all, nil
		}
	}
	return nil, &ResolveError{fmt.Sprintf("the list of %s does not end", prefix)}
}

// parseListing reads a page, and how to ask for the next one; "": there is none. What it does not
// know it leaves out.
func parseListing(data []byte) (l listing, next string, err error) {
	var doc struct {
		XMLName  xml.Name `xml:"ListBucketResult"`
		Contents []struct {
			Key, ETag, Size string
		}
		CommonPrefixes        []struct{ Prefix string }
		IsTruncated           string
		NextContinuationToken string
	}
	d := xml.NewDecoder(bytes.NewReader(data))
	d.Strict = false
	if err := d.Decode(&doc); err != nil {
		return listing{}, "", &ResolveError{fmt.Sprintf("the bucket's list cannot be read: %v", err)}
	}
	for _, c := range doc.Contents {
		size, err := strconv.ParseInt(c.Size, 10, 64)
		if err != nil || size < 0 {
			size = 0
		}
		l.objects = append(l.objects, object{c.Key, c.ETag, size})
	}
	for _, p := range doc.CommonPrefixes {
		l.prefixes = append(l.prefixes, p.Prefix)
	}
	if strings.TrimSpace(doc.IsTruncated) != "true" {
		return l, "", nil
	}
	if doc.NextContinuationToken == "" {
		return listing{}, "", &ResolveError{"the bucket's list is cut short"}
	}
	return l, doc.NextContinuationToken, nil
}
