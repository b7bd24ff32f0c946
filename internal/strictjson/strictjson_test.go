package strictjson_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/internal/strictjson"
)

type part struct {
	PartID string `json:"partId"`
	On     bool   `json:"on,omitempty"`
	Self   *part  `json:"self,omitempty"`
}

type doc struct {
	Name    string            `json:"name"`
	Count   int               `json:"count"`
	Small   int8              `json:"small"`
	Port    uint16            `json:"port"`
	Big     uint64            `json:"big"`
	Part    part              `json:"part"`
	Opt     *part             `json:"opt"`
	Flag    *bool             `json:"flag"`
	Parts   []part            `json:"parts"`
	Names   []string          `json:"names"`
	Labels  map[string]string `json:"labels"`
	Raw     json.RawMessage   `json:"raw"`
	When    time.Time         `json:"when"`
	Rate    float64           `json:"rate"`
	Any     any               `json:"any"`
	Pair    [2]int            `json:"pair"`
	NoTag   string
	Skipped string `json:"-"`
	hidden  string
}

const limit = 1 << 16

func TestUnmarshal_Accepts(t *testing.T) {
	in := ` {"name":"a","count":-3,"small":-128,"port":65535,"big":18446744073709551615,"part":{"partId":"p"},
		"opt":{"partId":"q","on":true,"self":{"partId":"r","self":null}},"flag":false,"parts":[{"partId":"s"}],"names":["x","y"],
		"labels":{"a.b":"c"},"raw":{"x":[1, null]},"when":"2024-01-02T03:04:05Z","rate":0.5,"any":[1],"pair":[1,2],"NoTag":"n"} `
	no := false
	want := doc{
		Name: "a", Count: -3, Small: -128, Port: 65535, Big: 1<<64 - 1, Part: part{PartID: "p"},
		Opt:  &part{PartID: "q", On: true, Self: &part{PartID: "r"}},
		Flag: &no, Parts: []part{{PartID: "s"}}, Names: []string{"x", "y"}, Labels: map[string]string{"a.b": "c"},
		Raw: json.RawMessage(`{"x":[1, null]}`), When: time.Date(2024, 1, 2, 3, 4, 5, 0, time.UTC),
		Rate: 0.5, Any: []any{1.0}, Pair: [2]int{1, 2}, NoTag: "n",
	}
	got, err := strictjson.Unmarshal[doc]([]byte(in), limit)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, ignoreHidden); diff != "" || got.hidden != "" {
		t.Errorf("-want +got:\n%s", diff)
	}

	in = `{"opt":null,"flag":null,"parts":null,"names":null,"labels":null,"any":null}`
	got, err = strictjson.Unmarshal[doc]([]byte(in), limit)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(doc{}, got, ignoreHidden); diff != "" {
		t.Errorf("null is not absence, -want +got:\n%s", diff)
	}
}

var ignoreHidden = cmp.FilterPath(func(p cmp.Path) bool { return p.String() == "hidden" }, cmp.Ignore())

func TestUnmarshal_Refuses(t *testing.T) {
	deep := strings.Repeat("[", 65) + strings.Repeat("]", 65)
	tests := []struct {
		in    string
		path  string
		want  string // in Reason
		value any
	}{
		{``, "$", "is empty", nil},
		{" \n", "$", "is empty", nil},
		{`[]`, "$", "must be an object, not an array", nil},
		{`null`, "$", "must be an object, not null", nil},
		{"{\n  \"name\": \"ü\" x}", "$", "line 2, column 15: invalid character 'x'", nil},
		{`{"name":"a"`, "$", "line 1, column 11: unexpected end", nil},
		{`{"name":"a"} {}`, "$", "line 1, column 14: invalid character '{' after top-level value", nil},
		{`{"name":"a",}`, "$", "line 1, column 13: invalid character '}'", nil},
		{"{\"name\":\"\xff\"}", "$", "not UTF-8", nil},
		{`{"raw":` + deep + `}`, "$", "line 1, column 71: nested more than 64 deep", nil},
		{`{"name":"` + strings.Repeat("x", limit) + `"}`, "$", "is 65547 bytes long, more than the 65536 allowed", nil},

		{`{"nam":"a"}`, "nam", `unknown field, did you mean "name"?`, nil},
		{`{"NAME":"a"}`, "NAME", `unknown field, did you mean "name"?`, nil},
		{`{"part":{"part_id":"a"}}`, "part.part_id", `unknown field, did you mean "partId"?`, nil},
		{`{"parts":[{},{"PartID":"a"}]}`, "parts[1].PartID", `did you mean "partId"?`, nil},
		{`{"hidden":"a"}`, "hidden", "unknown field", nil},
		{`{"Skipped":"a"}`, "Skipped", "unknown field", nil},
		{`{"a b":1}`, `["a b"]`, "unknown field", nil},
		{`{"":1}`, `[""]`, "unknown field", nil},
		{`{"` + strings.Repeat("k", 99) + `":1}`, `["` + strings.Repeat("k", 64) + `…"]`, "unknown field", nil},

		{`{"name":"a","name":"a"}`, "name", "more than once", nil},
		{`{"name":"a","n\u0061me":"a"}`, "name", "more than once", nil},
		{`{"labels":{"a":"1","a":"2"}}`, `labels["a"]`, "more than once", nil},

		{`{"name":5}`, "name", "must be a string, not a number", json.Number("5")},
		{`{"name":null}`, "name", "must be a string, not null", nil},
		{`{"count":"5"}`, "count", "must be a number, not a string", "5"},
		{`{"count":null}`, "count", "must be a number, not null", nil},
		{`{"count":true}`, "count", "must be a number, not a boolean", true},
		{
			`{"count":1.5}`, "count", "must be a whole number from -9223372036854775808 to 9223372036854775807",
			json.Number("1.5"),
		},
		{`{"count":1e2}`, "count", "must be a whole number", json.Number("1e2")},
		{`{"small":128}`, "small", "must be a whole number from -128 to 127", json.Number("128")},
		{`{"port":65536}`, "port", "must be a whole number from 0 to 65535", json.Number("65536")},
		{`{"port":-1}`, "port", "must be a whole number from 0 to 65535", json.Number("-1")},
		{`{"big":18446744073709551616}`, "big", "from 0 to 18446744073709551615", json.Number("18446744073709551616")},
		{`{"opt":{"on":0}}`, "opt.on", "must be a boolean, not a number", json.Number("0")},
		{`{"opt":{"on":null}}`, "opt.on", "must be a boolean, not null", nil},
		{`{"flag":"true"}`, "flag", "must be a boolean, not a string", "true"},
		{`{"part":null}`, "part", "must be an object, not null", nil},
		{`{"part":[]}`, "part", "must be an object, not an array", nil},
		{`{"parts":{}}`, "parts", "must be an array, not an object", nil},
		{`{"parts":[null]}`, "parts[0]", "must be an object, not null", nil},
		{`{"names":["a",1]}`, "names[1]", "must be a string, not a number", json.Number("1")},
		{`{"labels":[]}`, "labels", "must be an object, not an array", nil},
		{`{"labels":{"a.b":1}}`, `labels["a.b"]`, "must be a string, not a number", json.Number("1")},
		{`{"labels":{"a":null}}`, `labels["a"]`, "must be a string, not null", nil},
		{`{"when":"soon"}`, "when", "cannot parse", "soon"},
		{`{"rate":1e999}`, "rate", "cannot unmarshal number", json.Number("1e999")},
		{`{"count":"` + strings.Repeat("ü", 40) + `"}`, "count", "must be a number", strings.Repeat("ü", 32) + "…"},
	}
	for _, tt := range tests {
		name := tt.in[:min(40, len(tt.in))]
		t.Run(name, func(t *testing.T) {
			got, err := strictjson.Unmarshal[doc]([]byte(tt.in), limit)
			if diff := cmp.Diff(doc{}, got, ignoreHidden); diff != "" {
				t.Errorf("an error came with a value: %s", diff)
			}
			all := problems(t, err)
			if len(all) != 1 {
				t.Fatalf("got %d problems, want 1: %v", len(all), err)
			}
			if e := all[0]; e.Path != tt.path || !strings.Contains(e.Reason, tt.want) || e.Value != tt.value {
				t.Errorf("got %q %q (value %#v), want %q %q (value %#v)", e.Path, e.Reason, e.Value, tt.path, tt.want, tt.value)
			}
		})
	}
}

func TestUnmarshal_AllAtOnce(t *testing.T) {
	in := `{"nmae":1,"name":2,"part":{"partid":"a","on":"yes"},"parts":[{"on":1},{"on":true,"on":true}],"labels":{"b":1,"a":2}}`
	var got []string
	_, err := strictjson.Unmarshal[doc]([]byte(in), limit)
	for _, e := range problems(t, err) {
		got = append(got, e.Path)
	}
	want := []string{"nmae", "name", "part.partid", "part.on", "parts[0].on", "parts[1].on", `labels["b"]`, `labels["a"]`}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestUnmarshal_BoundsItsReport(t *testing.T) {
	var in strings.Builder
	in.WriteString(`{"names":[`)
	in.WriteString(strings.Repeat("1,", 5000) + `1],"parts":[{`)
	for i := range 3000 {
		fmt.Fprintf(&in, `"x%d":1,`, i)
	}
	in.WriteString(`"on":1}]}`)
	_, err := strictjson.Unmarshal[doc]([]byte(in.String()), limit)
	all := problems(t, err)
	if got, want := len(all), 100; got != want {
		t.Fatalf("got %d problems, want %d", got, want)
	}
	last := &strictjson.Error{Path: "$", Reason: "has more problems than are listed here"}
	if diff := cmp.Diff(last, all[99]); diff != "" {
		t.Error(diff)
	}
}

// FuzzUnmarshal holds Unmarshal to its promise: what it accepts, encoding/json accepts with the
// same value, and what it refuses it refuses with typed problems.
func FuzzUnmarshal(f *testing.F) {
	for _, seed := range []string{
		`{}`, `null`, `{"name":"a","parts":[{"partId":"x"}],"labels":{"k":"v"},"raw":[1,{}],"port":1}`,
		`{"raw":null,"opt":null}`,
		`{"count":-0}`, `{"big":-0}`, `{"name":"\ud800"}`, `{"a":1,"a":1}`, "{\"\u017fmall\":1}",
		`{"when":null,"any":{"a":1}}`,
		`{"opt":{"self":{"self":{"on":true}}}}`, `[[[[`, `{"name":"x"}}`, `{"rate":1e5,"pair":[1,2,3]}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := strictjson.Unmarshal[doc](data, limit)
		if err != nil {
			problems(t, err)
			return
		}
		dec := json.NewDecoder(strings.NewReader(string(data)))
		dec.DisallowUnknownFields()
		var want doc
		if err := dec.Decode(&want); err != nil {
			t.Fatalf("accepted what encoding/json refuses: %v", err)
		}
		if diff := cmp.Diff(want, got, ignoreHidden); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	})
}

// problems takes an error apart and fails the test where it is not made of complete *Errors.
func problems(t *testing.T, err error) []*strictjson.Error {
	t.Helper()
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		t.Fatalf("not joined errors: %v", err)
	}
	var all []*strictjson.Error
	for _, err := range joined.Unwrap() {
		var e *strictjson.Error
		if !errors.As(err, &e) || e.Path == "" || e.Reason == "" {
			t.Fatalf("not a complete problem: %#v", err)
		}
		all = append(all, e)
	}
	return all
}
