package human

import (
	"strings"
	"unicode"
)

// Printable is a foreign text as a terminal may have it: on one line, without what commands the
// terminal.
func Printable(text string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, text)
}
