package agentbin

import "embed"

//go:embed bin/amd64
var bin embed.FS

const path = "bin/amd64/smartvm-agent"
