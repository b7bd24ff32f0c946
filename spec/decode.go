package spec

import (
	"bytes"
	"errors"

	"push.rocks/smartvm/internal/strictjson"
)

// MaxBytes is the longest JSON document that Parse reads.
const MaxBytes = 1 << 20

// Parse decodes one Spec from JSON. Unknown and duplicate fields, wrong types and whatever follows
// the document are refused, all at once: the error is an errors.Join of *FieldError, where the path
// "$" stands for the document as a whole. What the fields say is checked by Spec.Validate, which
// Parse does not call.
func Parse(data []byte) (Spec, error) {
	s, err := strictjson.Unmarshal[Spec](data, MaxBytes)
	if err == nil {
		if bytes.Equal(s.CPUConfig, []byte("null")) { // null is absence, as for the other optional objects
			s.CPUConfig = nil
		}
		return s, nil
	}
	joined, ok := err.(interface{ Unwrap() []error }) //nolint:errorlint // the error itself is the joined one
	if !ok {
		return Spec{}, err
	}
	all := joined.Unwrap()
	for i, err := range all {
		if e, ok := errors.AsType[*strictjson.Error](err); ok {
			all[i] = &FieldError{Path: e.Path, Value: e.Value, Reason: e.Reason}
		}
	}
	return Spec{}, errors.Join(all...)
}
