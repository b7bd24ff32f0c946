package guestagent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/guestagent/fill"
	"push.rocks/smartvm/internal/guestagent/process"
	"push.rocks/smartvm/internal/guestagent/server"
)

// storeSecrets puts files where the command finds them: in memory, to be read by its user and
// nobody else.
func storeSecrets(b *guest.Boot, files map[string][]byte) error {
	u, err := process.Find(b.User)
	if err != nil {
		u = process.User{} // nobody will run the command, and it is that which says so
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if fi, err := os.Lstat(agentproto.SecretDir); err == nil && !fi.IsDir() {
		if err := os.Remove(agentproto.SecretDir); err != nil { // a file or a link that the image has there
			return err
		}
	}
	// What the image has there stays, but for what has the name of a secret.
	if err := mountOver(filesystem{kind: "tmpfs", target: agentproto.SecretDir, flags: flags, data: "mode=755"},
		fill.Options{}); err != nil {
		return err
	}
	if err := errors.Join(os.Chown(agentproto.SecretDir, 0, 0), os.Chmod(agentproto.SecretDir, 0o755)); err != nil {
		return errors.Join(err, detach(agentproto.SecretDir))
	}
	if err := writeSecrets(agentproto.SecretDir, files, u); err != nil {
		return errors.Join(err, detach(agentproto.SecretDir))
	}
	if err := unix.Mount("", agentproto.SecretDir, "", unix.MS_REMOUNT|unix.MS_RDONLY|flags, ""); err != nil {
		return fmt.Errorf("make %s read-only: %w", agentproto.SecretDir, err)
	}
	return nil
}

func writeSecrets(dir string, files map[string][]byte, u process.User) error {
	for name, data := range files {
		if name == "." || name == ".." || filepath.Base(name) != name {
			return fmt.Errorf("secret %q: no name of a file", name)
		}
		at := filepath.Join(dir, name)
		if err := os.RemoveAll(at); err != nil {
			return err
		}
		f, err := os.OpenFile(at, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o400)
		if err != nil {
			return err
		}
		_, err = f.Write(data)
		if err := errors.Join(err, f.Chown(int(u.UID), int(u.GID)), f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// hearSecrets has the host tell its secrets before this process becomes the image's own init.
func (g *system) hearSecrets(b *guest.Boot) error {
	l, err := listenHost()
	if err != nil {
		return err
	}
	srv := server.New(&g.reaper, b)
	srv.Secrets = func(files map[string][]byte) error { return storeSecrets(b, files) }
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(l) }()
	select {
	case <-srv.Told():
	case err := <-ended:
		return errors.Join(err, l.Close())
	}
	err = l.Close() // what serves later listens there
	<-ended         // by that, whatever it says
	return err
}

// The environment that the host has told may be longer than a boot configuration. It has its own
// place behind that.
const (
	envOffset = guest.MaxSize
	maxEnv    = 4 << 20
)

func writeEnv(boot *os.File, env []string) error {
	data, err := json.Marshal(env)
	if err == nil {
		_, err = boot.WriteAt(data, envOffset)
	}
	return err
}

func readEnv(boot io.ReaderAt) (env []string, err error) {
	err = json.NewDecoder(io.NewSectionReader(boot, envOffset, maxEnv)).Decode(&env)
	return env, err
}
