package vmflags

import (
	"errors"
	"math/bits"
	"strconv"
	"strings"

	"push.rocks/smartvm/spec"
)

// ParseRate parses bytes a second, such as 512K or 10M (powers of 1024), or bits a second, such as
// 100mbit (of 1000). 0 is no limit.
func ParseRate(text string) (*spec.RateLimiter, error) {
	want := errors.New("want bytes a second, such as 512K or 10M, bits, such as 100mbit, or 0 for no limit")
	lower := strings.ToLower(text)
	number, isBits := strings.CutSuffix(lower, "bit")
	base := uint64(1024)
	if isBits {
		base = 1000
	} else {
		number = strings.TrimSuffix(strings.TrimSuffix(number, "b"), "i")
	}
	unit := uint64(1)
	for _, c := range "kmg" {
		if unit *= base; strings.HasSuffix(number, string(c)) {
			number = number[:len(number)-1]
			break
		} else if c == 'g' {
			unit = 1
		}
	}
	n, err := strconv.ParseUint(number, 10, 64)
	over, rate := bits.Mul64(n, unit)
	if isBits {
		rate /= 8
	}
	if err != nil || over > 0 || n > 0 && rate == 0 {
		return nil, want
	}
	bucket := &spec.TokenBucket{Size: rate}
	if rate > 0 {
		bucket.RefillTime = 1000
	}
	return &spec.RateLimiter{Bandwidth: bucket}, nil
}
