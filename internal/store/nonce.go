package store

import (
	"encoding/json"
	"os"
	"path/filepath"
)

// Nonce tells a VM from another that has had its id. A whole record takes ten times as long to
// read.
func (s *Store) Nonce(id string) (string, error) {
	var now struct {
		Nonce string `json:"nonce"`
	}
	data, err := os.ReadFile(filepath.Join(s.Dir(id), MachineFile))
	if err == nil {
		err = json.Unmarshal(data, &now)
	}
	return now.Nonce, err
}
