package smartvm_test

import (
	"os"
	"syscall"
	"testing"

	"push.rocks/smartvm/internal/fakefc"
	"push.rocks/smartvm/internal/testenv"
)

// children are programs that this test binary can be: SMARTVM_TEST_CHILD names one, which gets the
// arguments.
var children = map[string]func(args []string) int{}

func TestMain(m *testing.M) {
	testenv.OthersOut()
	if fakefc.Called(os.Args) {
		// Not os.Exit, in which the race detector would sleep for a second.
		syscall.Exit(fakefc.Main(os.Args, os.Stdout, os.Stderr))
	}
	if child, ok := children[os.Getenv("SMARTVM_TEST_CHILD")]; ok {
		os.Exit(child(os.Args[1:]))
	}
	os.Exit(m.Run())
}
