package logfile

import "bytes"

// LastLines cuts text to its last n lines; a negative n leaves it whole.
func LastLines(text []byte, n int) []byte {
	if n < 0 {
		return text
	}
	end := len(bytes.TrimSuffix(text, []byte("\n")))
	for range n {
		end = bytes.LastIndexByte(text[:end], '\n')
		if end < 0 {
			return text
		}
	}
	if n == 0 {
		return nil
	}
	return text[end+1:]
}
