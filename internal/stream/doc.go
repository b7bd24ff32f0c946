// Package stream unpacks streams, whoever has packed them, and carries them from one goroutine to
// another.
package stream
