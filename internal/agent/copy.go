package agent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/treetar"
)

// CopyTo copies a file or a tree into the guest. A directory at to takes it under its name, "/." at
// the end of from means what is in it; otherwise it is called to. From "-" is a tar archive that in
// reads, to be unpacked in a directory. What cannot be read, is neither file, directory nor link,
// or would replace what is none of them either is left out: all else is copied, and an error says
// what is missing.
func (c *Client) CopyTo(ctx context.Context, from, to string, in io.Reader, o guest.CopyOptions) error {
	source, err := from, error(nil)
	if from != "-" {
		if source, err = treetar.Source(from, o.FollowLink); err != nil {
			return err
		}
	}
	var left treetar.LeftOut
	conn, err := c.open(ctx, agentproto.Request{Op: agentproto.OpWrite, Path: to, Archive: o.Owners})
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	r, err := answer(conn)
	if err != nil {
		return fmt.Errorf("copy to %s: %w", to, err)
	}
	if from == "-" && !r.IsDir {
		return fmt.Errorf("copy to %s: it is no directory of the guest", to)
	}
	// Who gives the archive may have nothing more to give for long: that is not waited for.
	piped, pipe := io.Pipe()
	if from == "-" {
		go func() {
			_, err := io.Copy(pipe, in)
			_ = pipe.CloseWithError(err)
		}()
	}
	sent := make(chan error, 1)
	go func() {
		out := conn.Writer(agentproto.KindStdin)
		w := &counter{to: bufio.NewWriterSize(remote{out}, bufferSize), told: o.Progress}
		var err error
		if from == "-" {
			_, err = io.Copy(w, piped)
		} else {
			err = treetar.Pack(w, source, topOf(from, r.IsDir), treetar.PackOptions{Left: left.Add})
		}
		err = errors.Join(err, w.to.Flush())
		if err == nil {
			err = out.Close()
		} else {
			_ = conn.Close() // half an archive is none
		}
		sent <- err
	}()
	exit, err := awaitExit(conn)
	_ = conn.Close()
	_ = pipe.CloseWithError(errUnread)
	sendErr := <-sent
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err == nil && exit.Code != 0:
		err = errors.Join(left.Err(), &GuestError{exit.Reason})
	case err == nil:
		err = left.Err()
	case sendErr != nil && !errors.Is(sendErr, ErrLost) && !errors.Is(sendErr, errUnread):
		err = sendErr // which is why the agent was left
	}
	if err != nil {
		return fmt.Errorf("copy to %s: %w", to, err)
	}
	return nil
}

// topOf is what the first part of an archive's names is: where a directory takes it its own, else
// one that is replaced.
func topOf(from string, intoDir bool) string {
	if !intoDir {
		return "top"
	}
	if treetar.Contents(from) {
		return "."
	}
	if full, err := filepath.Abs(from); err == nil {
		from = full
	}
	return strings.TrimPrefix(filepath.Base(from), "/")
}

// errUnread is what became of an archive that is not read to its end.
var errUnread = errors.New("it was not read")

// remote is a stream to the guest, whose errors are not those of what is read for it.
type remote struct{ io.Writer }

func (r remote) Write(p []byte) (int, error) {
	n, err := r.Writer.Write(p)
	if err != nil {
		err = lost(err)
	}
	return n, err
}

type counter struct {
	to   *bufio.Writer
	n    int64
	told func(int64)
}

func (w *counter) Write(p []byte) (int, error) {
	n, err := w.to.Write(p)
	if w.n += int64(n); w.told != nil {
		w.told(w.n)
	}
	return n, err
}

// CopyFrom copies a file or a tree out of the guest, by the same rules. To "-" writes a tar archive
// to out. Only what was asked for is written, no link below to is followed, and a link is made
// nowhere but in a directory, where the next copy does not follow it.
func (c *Client) CopyFrom(ctx context.Context, from, to string, out io.Writer, o guest.CopyOptions) error {
	conn, err := c.open(ctx,
		agentproto.Request{Op: agentproto.OpRead, Path: from, Contents: treetar.Contents(from), Follow: o.FollowLink})
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	in := conn.Inbox(agentproto.KindStdout)
	if _, err = answer(conn); err != nil {
		return fmt.Errorf("copy from %s: %w", from, err)
	}
	taken := make(chan error, 1)
	var left treetar.LeftOut
	go func() {
		err := destination{from, to, out, o, &left}.take(bufio.NewReaderSize(in, bufferSize))
		if err != nil && !errors.Is(err, treetar.ErrEmpty) { // why it is empty is still to come
			_ = conn.Close()
		}
		in.Discard()
		taken <- err
	}()
	exit, err := awaitExit(conn)
	if err != nil {
		_ = conn.Close()
	}
	takeErr := <-taken
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err == nil && exit.Code != 0:
		err = errors.Join(left.Err(), &GuestError{exit.Reason})
		if takeErr != nil && !errors.Is(takeErr, treetar.ErrEmpty) {
			err = takeErr
		}
	case err == nil && takeErr == nil:
		err = left.Err()
	case takeErr != nil && (err == nil || !errors.Is(takeErr, io.ErrUnexpectedEOF)):
		err = takeErr
	}
	if err != nil {
		return fmt.Errorf("copy from %s: %w", from, err)
	}
	return nil
}

// destination is where a copy goes.
type destination struct {
	from, to string
	out      io.Writer
	o        guest.CopyOptions
	left     *treetar.LeftOut
}

// take unpacks what comes from the guest.
func (d destination) take(in io.Reader) error {
	if d.to == "-" {
		_, err := io.Copy(struct{ io.Writer }{d.out}, in)
		return err
	}
	u := treetar.Options{Owners: d.o.Owners, Progress: d.o.Progress, NoFollow: true, Left: d.left.Add}
	dir, top, err := treetar.Target(d.to)
	if err != nil {
		return err
	}
	asked := path.Base(path.Clean(d.from))
	contents := treetar.Contents(d.from) || asked == "/"
	switch {
	case contents && top != "":
		if err := os.Mkdir(d.to, 0o755); err != nil {
			return err
		}
		dir = d.to
	case contents:
	case top != "":
		u.Top, u.NoLink = top, true
	default: // under its own name, whatever the guest calls it
		u.Top = asked
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	if err = treetar.Unpack(in, root, u); errors.Is(err, treetar.ErrTopLink) {
		err = hint.Add(err, "smartvm cp -L copies what it leads to")
	}
	return err
}

// Split parses "VM:PATH", as in cp; found says whether there is a VM. A path that begins with "/"
// or "." has none.
func Split(arg string) (vm, file string, found bool) {
	if strings.HasPrefix(arg, "/") || strings.HasPrefix(arg, ".") {
		return "", arg, false
	}
	vm, file, found = strings.Cut(arg, ":")
	if !found || vm == "" {
		return "", arg, false
	}
	if !path.IsAbs(file) {
		file = "/" + file // what docker makes of it
	}
	return vm, file, true
}
