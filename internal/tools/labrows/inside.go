package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// insideVerb runs this program in the lab.
const insideVerb = "boot-guests"

// guest is how a guest fared. The program in the lab prints an empty one first, then a line for
// each.
type guest struct {
	Seconds float64 `json:"seconds"` // until it was up
	Stop    string  `json:"stop"`    // what went wrong
}

// inside boots guests one after another; args are a variant, how many guests, a guest's deadline,
// the VMM and its configuration.
func inside(args []string) error {
	v, err := parseVariant(args[0])
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	deadline, err := time.ParseDuration(args[2])
	if err != nil {
		return err
	}
	if err := v.setParameters(); err != nil {
		return err
	}
	out := json.NewEncoder(os.Stdout)
	err = out.Encode(guest{})
	for range n {
		if err == nil {
			err = out.Encode(v.boot(args[3], args[4], deadline))
		}
	}
	return err
}

// setParameters sets those of the lab kernel's modules.
func (v variant) setParameters() error {
	if options := v["kvm_amd"]; options != nil {
		for _, command := range [][]string{
			{"modprobe", "-r", "kvm_amd"},
			append([]string{"modprobe", "kvm_amd"}, options...),
		} {
			if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
				return fmt.Errorf("%v: %w\n%s", command, err, out)
			}
		}
	}
	for _, s := range v["sys"] {
		name, value, _ := strings.Cut(s, "=")
		module, parameter, _ := strings.Cut(name, "/")
		if err := os.WriteFile(filepath.Join("/sys/module", module, "parameters", parameter), []byte(value), 0); err != nil {
			return err
		}
	}
	return nil
}

// boot boots a guest and waits until it has ended.
func (v variant) boot(vmm, config string, deadline time.Duration) (g guest) {
	_ = os.Remove(socketPath) // of the guest before
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	cmd := exec.CommandContext(ctx, vmm, "--no-api", "--config-file", config)
	out := &console{begun: time.Now()}
	cmd.Stdout, cmd.Stderr = out, out
	err := cmd.Run()
	if v["no-serial"] != nil && err == nil {
		out.up = time.Since(out.begun) // it cannot say so before
	}
	g.Seconds = out.up.Seconds()
	if err != nil || out.up == 0 {
		var spent time.Duration
		if p := cmd.ProcessState; p != nil {
			spent = p.UserTime() + p.SystemTime()
		}
		said := out.said.Bytes()
		g.Stop = fmt.Sprintf("%v, up after %.1f s, its VMM computed %.1f s; it said %q", err, g.Seconds, spent.Seconds(),
			said[max(0, len(said)-200):])
	}
	return g
}

// console notes when the guest is up.
type console struct {
	begun time.Time
	said  bytes.Buffer
	up    time.Duration
}

func (c *console) Write(p []byte) (int, error) {
	c.said.Write(p)
	if c.up == 0 && bytes.Contains(c.said.Bytes(), []byte(announcement)) {
		c.up = time.Since(c.begun)
	}
	return len(p), nil
}
