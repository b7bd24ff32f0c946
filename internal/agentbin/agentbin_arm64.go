package agentbin

import "embed"

//go:embed bin/arm64
var bin embed.FS

const path = "bin/arm64/smartvm-agent"
