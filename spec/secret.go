package spec

import "fmt"

// Secret is a file of the host whose content the guest gets as /run/secrets/NAME, in memory, for
// the user of its command alone. It is read at each start; what is in it stands nowhere on the host
// but there.
type Secret struct {
	Name string `json:"name"` // 1-64 of [A-Za-z0-9_.-], beginning with a letter or digit
	Path string `json:"path"`
}

// Bounds of what a guest gets besides drives.
const (
	maxSecrets  = 64
	maxEnvFiles = 16
)

func (s Spec) checkSecrets(p *problems) {
	p.require(s.Image != "" || len(s.Secrets) == 0, "secrets", nil, "is only for a VM with an image")
	p.require(s.Image != "" || len(s.EnvFiles) == 0, "envFiles", nil, "is only for a VM with an image")
	p.require(len(s.Secrets) <= maxSecrets, "secrets", len(s.Secrets), fmt.Sprintf("must be at most %d", maxSecrets))
	p.require(len(s.EnvFiles) <= maxEnvFiles, "envFiles", len(s.EnvFiles), fmt.Sprintf("must be at most %d", maxEnvFiles))
	seen := map[string]string{}
	for i, secret := range s.Secrets {
		at := fmt.Sprintf("secrets[%d]", i)
		p.hostPath(at+".path", secret.Path, maxPathBytes)
		if p.given(at+".name", secret.Name) {
			p.require(isID(secret.Name, "_.-") && isID(secret.Name[:1], ""), at+".name", secret.Name,
				"must be 1 to 64 letters, digits, underscores, dots or hyphens and begin with a letter or digit")
			p.unique(at+".name", secret.Name, seen)
		}
	}
	for i, path := range s.EnvFiles {
		p.hostPath(fmt.Sprintf("envFiles[%d]", i), path, maxPathBytes)
	}
}
