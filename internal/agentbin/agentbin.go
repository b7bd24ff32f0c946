// Package agentbin carries the guest's first program in the programs that use this module.
package agentbin

import "embed"

//go:embed bin
var bin embed.FS

// Agent is smartvm-agent, a static program for the machine that this one was built for; nil if it was not there when this
// one was built, which make sees to.
func Agent() []byte {
	data, err := bin.ReadFile("bin/smartvm-agent")
	if err != nil {
		return nil
	}
	return data
}
