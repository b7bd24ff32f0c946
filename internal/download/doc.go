// Package download brings content from servers that may be slow, broken or hostile: files and small
// documents over HTTP, and whatever can be read from an offset on.
//
// A file comes to its path whole and verified, or not at all. Until then it is beside it, with
// PartialSuffix, and an interruption, of a connection, a process or a machine, costs nothing of it.
// Several processes that bring the same path take turns, and those that waited find it there.
//
// Patience has two parts. Transport makes a request again when the server does not answer it, and
// Client.Bring asks for what is missing when an answer breaks off.
package download
