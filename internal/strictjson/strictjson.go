// Package strictjson decodes JSON that people write by hand: it refuses what encoding/json lets
// pass in silence (unknown and duplicate keys, keys in another case, null for a plain value, bytes
// that are not UTF-8) and reports every problem at once, each with its JSON path.
//
// It is a check in front of encoding/json: what it accepts, encoding/json accepts with the same
// value.
package strictjson

import (
	"bytes"
	"cmp"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

const (
	maxDepth  = 64  // nesting of objects and arrays
	maxErrors = 100 // reported at most
	maxText   = 64  // bytes of the document quoted in one error
)

// Error is one problem in a document.
type Error struct {
	Path   string // JSON path, `drives[0].pathOnHost`, `labels["a"]`; "$" for the document as a whole
	Value  any    // string (cut when long), json.Number or bool as given; nil for anything else
	Reason string // holds line and column when the document is no JSON at all
}

func (e *Error) Error() string { return e.Path + ": " + e.Reason }

// Unmarshal decodes a document of at most maxBytes bytes into a T. Any failure is an errors.Join of
// one or more *Error, in document order, and comes with the zero T.
//
// Structs match their keys exactly. Null stands for absence where T has a pointer, slice or map,
// and is refused elsewhere. Types that decode themselves (json.RawMessage, time.Time) are taken as
// encoding/json takes them, and so are interfaces, floats and arrays. T must not embed structs,
// hold a []byte or use the "string" tag option.
func Unmarshal[T any](data []byte, maxBytes int) (T, error) {
	var c checker
	if c.document(data, maxBytes) {
		c.value("", bytes.TrimSpace(data), reflect.TypeFor[T]())
	}
	var v T
	if len(c.errs) == 0 {
		err := json.Unmarshal(data, &v)
		if err == nil {
			return v, nil
		}
		c.add("", nil, "%s", reason(err))
	}
	return *new(T), errors.Join(c.errs...)
}

// checker collects what is wrong with a document. Its loops end when there are maxErrors.
type checker struct{ errs []error }

func (c *checker) add(path string, value any, format string, args ...any) {
	if len(c.errs) == maxErrors-1 {
		path, value, format, args = "", nil, "has more problems than are listed here", nil
	}
	c.errs = append(c.errs, &Error{Path: cmp.Or(path, "$"), Value: value, Reason: fmt.Sprintf(format, args...)})
}

// document checks what does not depend on the wanted type. Nothing else may be checked unless it
// returns true.
func (c *checker) document(data []byte, maxBytes int) bool {
	var syntax *json.SyntaxError
	switch {
	case len(data) > maxBytes:
		c.add("", nil, "is %d bytes long, more than the %d allowed", len(data), maxBytes)
	case len(bytes.TrimSpace(data)) == 0:
		c.add("", nil, "is empty")
	case !utf8.Valid(data):
		c.add("", nil, "is not UTF-8")
	case tooDeep(data) >= 0:
		c.add("", nil, "%s: nested more than %d deep", position(data, tooDeep(data)), maxDepth)
	case errors.As(json.Unmarshal(data, new(json.RawMessage)), &syntax):
		// Offset counts the offending byte too.
		c.add("", nil, "%s: %s", position(data, int(syntax.Offset)-1), reason(syntax))
	default:
		return true
	}
	return false
}

// value checks one value against its type. raw is well-formed and without surrounding space.
func (c *checker) value(path string, raw []byte, t reflect.Type) {
	null := raw[0] == 'n'
	switch reflect.New(t).Interface().(type) {
	case json.Unmarshaler, encoding.TextUnmarshaler:
		c.whole(path, raw, t)
		return
	}
	switch t.Kind() {
	case reflect.Pointer:
		if !null {
			c.value(path, raw, t.Elem())
		}
	case reflect.Struct:
		if c.is(path, raw, "an object") {
			c.object(path, raw, structFields(t), nil)
		}
	case reflect.Map:
		if !null && c.is(path, raw, "an object") {
			c.object(path, raw, nil, t.Elem())
		}
	case reflect.Slice:
		if !null && c.is(path, raw, "an array") {
			c.array(path, raw, t.Elem())
		}
	case reflect.String:
		c.is(path, raw, "a string")
	case reflect.Bool:
		c.is(path, raw, "a boolean")
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		if c.is(path, raw, "a number") {
			c.number(path, string(raw), t)
		}
	default:
		c.whole(path, raw, t)
	}
}

// whole leaves a value to encoding/json.
func (c *checker) whole(path string, raw []byte, t reflect.Type) {
	if err := json.Unmarshal(raw, reflect.New(t).Interface()); err != nil {
		_, shown := kindOf(raw)
		c.add(path, shown, "%s", reason(err))
	}
}

// is reports whether raw is of the wanted JSON type, and says so where it is not.
func (c *checker) is(path string, raw []byte, want string) bool {
	got, shown := kindOf(raw)
	if got != want {
		c.add(path, shown, "must be %s, not %s", want, got)
	}
	return got == want
}

func (c *checker) number(path, text string, t reflect.Type) {
	_, err := strconv.ParseInt(text, 10, t.Bits())
	low, high := int64(math.MinInt64)>>(64-t.Bits()), uint64(math.MaxInt64)>>(64-t.Bits())
	if t.Kind() >= reflect.Uint {
		_, err = strconv.ParseUint(text, 10, t.Bits())
		low, high = 0, uint64(math.MaxUint64)>>(64-t.Bits())
	}
	if err != nil {
		c.add(path, json.Number(clip(text)), "must be a whole number from %d to %d", low, high)
	}
}

func (c *checker) array(path string, raw []byte, elem reflect.Type) {
	dec := json.NewDecoder(bytes.NewReader(raw))
	_, _ = dec.Token() // the bracket: document has seen to the syntax
	for i := 0; dec.More() && len(c.errs) < maxErrors; i++ {
		var item json.RawMessage
		if dec.Decode(&item) != nil {
			return
		}
		c.value(fmt.Sprintf("%s[%d]", path, i), item, elem)
	}
}

// object checks the members against a struct's fields or, where these are nil, each against elem.
func (c *checker) object(path string, raw []byte, fields map[string]reflect.Type, elem reflect.Type) {
	seen := map[string]bool{}
	dec := json.NewDecoder(bytes.NewReader(raw))
	_, _ = dec.Token()
	for dec.More() && len(c.errs) < maxErrors {
		token, _ := dec.Token()
		key, _ := token.(string)
		var item json.RawMessage
		if dec.Decode(&item) != nil {
			return
		}
		t, at := elem, fmt.Sprintf("%s[%q]", path, clip(key))
		if fields != nil {
			t, at = fields[key], join(path, clip(key))
		}
		switch {
		case seen[key]:
			c.add(at, nil, "is given more than once")
		case t != nil:
			c.value(at, item, t)
		default:
			c.add(at, nil, "unknown field%s", hint(key, slices.Sorted(maps.Keys(fields))))
		}
		seen[key] = true
	}
}

func structFields(t reflect.Type) map[string]reflect.Type {
	fields := map[string]reflect.Type{}
	for field := range t.Fields() {
		tag := field.Tag.Get("json")
		name, _, _ := strings.Cut(tag, ",")
		if field.Anonymous && name == "" && field.Type.Kind() == reflect.Struct {
			maps.Copy(fields, structFields(field.Type))
			continue
		}
		if field.IsExported() && tag != "-" {
			fields[cmp.Or(name, field.Name)] = field.Type
		}
	}
	return fields
}

// kindOf names the JSON type of a well-formed value, and gives what an Error shows of it.
func kindOf(raw []byte) (kind string, shown any) {
	switch raw[0] {
	case '{':
		return "an object", nil
	case '[':
		return "an array", nil
	case 'n':
		return "null", nil
	case 't', 'f':
		return "a boolean", raw[0] == 't'
	case '"':
		var s string
		_ = json.Unmarshal(raw, &s)
		return "a string", clip(s)
	}
	return "a number", json.Number(clip(string(raw)))
}

// tooDeep returns the offset of the first bracket that opens level maxDepth+1, or -1.
func tooDeep(data []byte) int {
	depth, quoted := 0, false
	for off := 0; off < len(data); off++ {
		switch b := data[off]; {
		case quoted && b == '\\':
			off++
		case b == '"':
			quoted = !quoted
		case quoted:
		case b == '{' || b == '[':
			if depth++; depth > maxDepth {
				return off
			}
		case b == '}' || b == ']':
			depth--
		}
	}
	return -1
}

// position tells an offset as an editor would, columns counted in characters.
func position(data []byte, off int) string {
	before := data[:max(0, min(off, len(data)))]
	start := bytes.LastIndexByte(before, '\n') + 1
	return fmt.Sprintf("line %d, column %d", 1+bytes.Count(before, []byte("\n")), 1+utf8.RuneCount(before[start:]))
}

// reason is an encoding/json error without the name of that package.
func reason(err error) string { return strings.TrimPrefix(err.Error(), "json: ") }

var plainKey = regexp.MustCompile(`^[\w-]+$`)

// join appends a struct's key to a path. A key that no struct would have is quoted.
func join(path, key string) string {
	if !plainKey.MatchString(key) {
		return fmt.Sprintf("%s[%q]", path, key)
	}
	return strings.TrimPrefix(path+"."+key, ".")
}

func clip(s string) string {
	if len(s) <= maxText {
		return s
	}
	return strings.ToValidUTF8(s[:maxText], "") + "…"
}

// hint names the field that key was most likely meant to be, or is "". Case, "_" and "-" count for
// nothing: the VMM's own JSON writes vcpu_count where ours has vcpuCount.
func hint(key string, names []string) string {
	fold := func(s string) string { return strings.ToLower(strings.NewReplacer("_", "", "-", "").Replace(s)) }
	best, bestDistance := "", 3
	for _, name := range names {
		if d := distance(fold(clip(key)), fold(name)); d < bestDistance && d <= len(name)/3 {
			best, bestDistance = fmt.Sprintf(", did you mean %q?", name), d
		}
	}
	return best
}

// distance is the Levenshtein distance in bytes.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
