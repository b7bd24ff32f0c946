// Package agentbin carries the guest's first program in the programs that use this module.
package agentbin

// Agent is smartvm-agent, a static program for the architecture that this one was built for; nil if
// it was not there when this one was built, which make sees to, or for an architecture that has no
// VMM.
func Agent() []byte {
	data, err := bin.ReadFile(path)
	if err != nil {
		return nil
	}
	return data
}
