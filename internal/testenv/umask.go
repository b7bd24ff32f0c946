package testenv

import "syscall"

// OthersOut keeps all other users from writing to what this process makes, also where its umask
// would let them: t.TempDir asks for directories that all may write to, and below such no store of
// ours can be.
func OthersOut() { syscall.Umask(syscall.Umask(0o022) | 0o022) }
