//go:build !amd64 && !arm64

package agentbin

import "embed"

var bin embed.FS

const path = "none"
