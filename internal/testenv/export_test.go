package testenv

import "time"

// SetSettleTime shortens the wait of tests in which something is left on purpose.
func SetSettleTime(d time.Duration) (restore func()) {
	before := settleTime
	settleTime = d
	return func() { settleTime = before }
}
