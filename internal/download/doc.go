// Package download fetches files and small documents over HTTP from servers that may be slow, broken or hostile.
//
// A file comes to its path whole and verified, or not at all. Until then it is beside it, with PartialSuffix, and is
// gone on with after an interruption: that of a connection, a process or a machine. Several processes that fetch the same
// path take turns, and those that waited find it there.
package download
