package smartvm_test

import (
	"bytes"
	"go/scanner"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"
)

// Columns of a line, each character one: what is read beside other text, or in a terminal, must not
// be wider.
const (
	maxCode  = 120
	maxProse = 100
	// longString is how many characters of strings let a line be wider: a text is easier to find if it
	// is whole.
	longString = 40
)

func TestHouse_Columns(t *testing.T) {
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name := d.Name(); path != "." && strings.HasPrefix(name, ".") || name == "bin" || name == "target" {
				return filepath.SkipDir
			}
			return nil
		}
		wide := map[string]func([]byte) []int{".go": wideCode, ".md": wideProse}[filepath.Ext(path)]
		if wide == nil {
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, line := range wide(text) {
			t.Errorf("%s:%d: too wide: comments and prose %d columns, code %d", path, line, maxProse, maxCode)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// wideCode returns the numbers of lines of Go that are too wide, but for those with long strings.
func wideCode(text []byte) (wide []int) {
	lines := bytes.Split(text, []byte("\n"))
	limits := make([]int, len(lines)+1)
	for i := range limits {
		limits[i] = maxCode
	}
	set := token.NewFileSet()
	file := set.AddFile("", -1, len(text))
	var s scanner.Scanner
	s.Init(file, text, nil, scanner.ScanComments)
	strung := map[int]int{} // characters of strings, by line
	for {
		pos, tok, literal := s.Scan()
		if tok == token.EOF {
			break
		}
		line := file.Line(pos)
		switch {
		case tok == token.STRING:
			strung[line] += len(literal)
			if more := strings.Count(literal, "\n"); more > 0 || strung[line] >= longString {
				for i := range 1 + more {
					limits[line+i] = len(text)
				}
			}
		case tok == token.COMMENT && strings.HasPrefix(string(bytes.TrimSpace(lines[line-1])), "// "):
			limits[line] = maxProse
		}
	}
	for i, line := range lines {
		if utf8.RuneCount(line) > limits[i+1] {
			wide = append(wide, i+1)
		}
	}
	return wide
}

// wideProse returns the numbers of lines of Markdown that are too wide, but for tables and code.
func wideProse(text []byte) (wide []int) {
	code := false
	for i, line := range strings.Split(string(text), "\n") {
		if strings.HasPrefix(strings.TrimSpace(line), "```") {
			code = !code
		}
		if code || strings.HasPrefix(line, "|") || strings.HasPrefix(line, "    ") {
			continue
		}
		if utf8.RuneCountInString(line) > maxProse {
			wide = append(wide, i+1)
		}
	}
	return wide
}

func TestColumns(t *testing.T) {
	long := strings.Repeat("x ", 60)
	for name, tt := range map[string]struct {
		wide func([]byte) []int
		text string
		want int
	}{
		"code":           {wideCode, "package a\n\nvar _ = a(" + strings.Repeat("1, ", 40) + "1)\n", 1},
		"a comment":      {wideCode, "package a\n\n// " + long + "\nvar a int\n", 1},
		"a string":       {wideCode, "package a\n\nvar a = \"" + long + "\"\n", 0},
		"lines of text":  {wideCode, "package a\n\nvar a = `b\n" + long + "\n`\n", 0},
		"prose":          {wideProse, "# A\n\n" + long + "\n", 1},
		"code and table": {wideProse, "```\n" + long + "\n```\n    " + long + "\n| " + long + "|\n", 0},
	} {
		if got := tt.wide([]byte(tt.text)); len(got) != tt.want {
			t.Errorf("%s: lines %v are too wide, want %d", name, got, tt.want)
		}
	}
}
