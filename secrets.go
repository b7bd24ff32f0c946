package smartvm

import "push.rocks/smartvm/internal/secret"

// Secrets are what a VM's guest is told that nobody else is to see. Printed or logged, they say nothing.
type Secrets = secret.Set

// Secrets reads the files that the Spec's Secrets and EnvFiles name, nil if there are none. A Start does so by itself.
func (m *Machine) Secrets() (*Secrets, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.secrets != nil {
		return m.secrets, nil // read when the VM was made: from a pipe they come once
	}
	return secret.Load(&m.rec().Spec, secret.Options{LookupEnv: m.host.opts.LookupEnv})
}

// Provide gives the next Start in this process what Secrets has returned in another.
func (m *Machine) Provide(s *Secrets) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.secrets = s
}

// takeSecrets returns the secrets of one start.
func (m *Machine) takeSecrets() (*Secrets, error) {
	s, err := m.Secrets()
	m.Provide(nil)
	return s, err
}
