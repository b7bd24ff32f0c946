package vmm_test

import (
	"os"
	"testing"

	"push.rocks/smartvm/internal/vmm"
)

func TestUsageOf(t *testing.T) {
	self := vmm.UsageOf([]int{os.Getpid()})
	if self.Memory < 1<<20 || self.Memory > 1<<40 {
		t.Errorf("we have %d bytes", self.Memory)
	}
	for vmm.UsageOf([]int{os.Getpid()}).CPU == self.CPU { // until it shows that we do something
	}
	twice := vmm.UsageOf([]int{os.Getpid(), os.Getpid(), 1 << 30})
	if twice.Memory < self.Memory*3/2 || twice.CPU < self.CPU {
		t.Errorf("twice us is %+v, once %+v", twice, self)
	}
	if none := vmm.UsageOf([]int{1 << 30}); none != (vmm.Usage{}) {
		t.Errorf("nobody uses %+v", none)
	}
}
