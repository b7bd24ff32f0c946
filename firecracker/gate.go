package firecracker

import (
	"errors"
	"net/http"
	"reflect"
	"strings"
)

// since lists the releases that introduced something, oldest first: one, or one for each minor
// series it was backported to. Empty means "in every supported version".
type since []Version

// ok reports whether v has it: the series of v decides if it is listed, else the newest entry.
func (s since) ok(v Version) bool {
	if len(s) == 0 {
		return true
	}
	return v.AtLeast(s.need(v))
}

// need returns the version that a VMM of version v must be upgraded to, or one not newer than v
// that has it.
func (s since) need(v Version) Version {
	for _, release := range s {
		if sameSeries := release.Major == v.Major && release.Minor == v.Minor; sameSeries || !v.AtLeast(release) {
			return release
		}
	}
	return s[len(s)-1]
}

// parseSince reads the struct tag `since:"1.14.4,1.15.1"` of a field.
func parseSince(tag string) since {
	if tag == "" {
		return nil
	}
	var s since
	for text := range strings.SplitSeq(tag, ",") {
		v, err := ParseVersion(text)
		if err != nil {
			panic("firecracker: since tag: " + err.Error()) // a typo in this package; its tests read every tag
		}
		s = append(s, v)
	}
	return s
}

// endpointSince says since when an endpoint exists. Path is a request's path, with or without an
// object's id.
func endpointSince(method, path string) since {
	resource, _, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	switch {
	case method == http.MethodDelete:
		return since{{1, 16, 0}}
	case resource == "pmem" && method == http.MethodPatch:
		return since{{1, 16, 0}}
	case resource == "pmem", resource == "serial", path == "/hotplug/memory", strings.HasPrefix(path, "/balloon/hinting/"):
		return since{{1, 14, 0}}
	}
	return nil
}

// endpointOf names the endpoint that takes a body of this type, without an id; it is empty for
// other types.
func endpointOf(body any) (method, path string) {
	switch body.(type) {
	case BootSource:
		return http.MethodPut, "/boot-source"
	case MachineConfiguration:
		return http.MethodPut, "/machine-config"
	case PartialMachineConfiguration:
		return http.MethodPatch, "/machine-config"
	case CPUConfig:
		return http.MethodPut, "/cpu-config"
	case Drive:
		return http.MethodPut, "/drives"
	case PartialDrive:
		return http.MethodPatch, "/drives"
	case NetworkInterface:
		return http.MethodPut, "/network-interfaces"
	case PartialNetworkInterface:
		return http.MethodPatch, "/network-interfaces"
	case Pmem:
		return http.MethodPut, "/pmem"
	case PartialPmem:
		return http.MethodPatch, "/pmem"
	case Vsock:
		return http.MethodPut, "/vsock"
	case EntropyDevice:
		return http.MethodPut, "/entropy"
	case SerialDevice:
		return http.MethodPut, "/serial"
	case Balloon:
		return http.MethodPut, "/balloon"
	case MemoryHotplugConfig:
		return http.MethodPut, "/hotplug/memory"
	case MMDSConfig:
		return http.MethodPut, "/mmds/config"
	case Logger:
		return http.MethodPut, "/logger"
	case Metrics:
		return http.MethodPut, "/metrics"
	case SnapshotCreateParams:
		return http.MethodPut, "/snapshot/create"
	case SnapshotLoadParams:
		return http.MethodPut, "/snapshot/load"
	}
	return "", ""
}

// CheckVersion reports whether a VMM of version v takes body: a request body of this package, by
// value or pointer, or a [FullVMConfiguration]. Everything too new is reported at once, as joined
// [*VersionError]s.
func CheckVersion(v Version, body any) error {
	if value := reflect.ValueOf(body); value.Kind() == reflect.Pointer && !value.IsNil() {
		body = value.Elem().Interface()
	}
	method, path := endpointOf(body)
	return checkRequest(v, method, path, body)
}

// checkRequest is CheckVersion for a request about to be sent.
func checkRequest(v Version, method, path string, body any) error {
	c := gateChecker{have: v}
	if method != "" {
		c.endpoint = method + " " + path
	}
	if s := endpointSince(method, path); !s.ok(v) {
		// The fields of an endpoint that is not there are not worth a mention.
		return &VersionError{Endpoint: c.endpoint, Need: s.need(v), Have: v}
	}
	c.walk("", reflect.ValueOf(body))
	return errors.Join(c.errs...)
}

// valueSince says since when the fields that take a value of an enumeration do.
func valueSince(value any) since {
	if value == HugePagesTransparent {
		return since{{1, 17, 0}}
	}
	return nil
}

type gateChecker struct {
	endpoint string
	have     Version
	errs     []error
}

// walk visits every field that would be encoded, and collects those that are too new, by their
// since tags or values.
func (c *gateChecker) walk(prefix string, value reflect.Value) {
	switch value.Kind() {
	case reflect.Pointer:
		c.walk(prefix, value.Elem())
	case reflect.Slice:
		if value.Type().Elem().Kind() == reflect.Struct {
			for i := range value.Len() {
				c.walk(prefix, value.Index(i))
			}
		}
	case reflect.Struct:
		for field, fieldValue := range value.Fields() {
			if !field.IsExported() || fieldValue.IsZero() {
				continue
			}
			name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
			path := strings.TrimPrefix(prefix+"."+name, ".")
			if s := parseSince(field.Tag.Get("since")); !s.ok(c.have) {
				c.errs = append(c.errs, &VersionError{Endpoint: c.endpoint, Field: path, Need: s.need(c.have), Have: c.have})
				continue
			}
			if s := valueSince(fieldValue.Interface()); !s.ok(c.have) {
				c.errs = append(c.errs,
					&VersionError{Endpoint: c.endpoint, Field: path, Value: fieldValue.String(), Need: s.need(c.have), Have: c.have})
			}
			c.walk(path, fieldValue)
		}
	}
}
