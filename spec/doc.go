// Package spec is the inert half of smartvm: what a VM shall be, as Go values and as JSON, and what
// is wrong with it. It looks at nothing but the value; what the host has to say comes when a VM is
// made of it.
package spec
