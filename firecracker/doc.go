// Package firecracker is a typed client of the API that one Firecracker process serves on its unix
// socket.
//
// It speaks the whole API of Firecracker [MinVersion] to 1.16: every published endpoint, and the
// unpublished DELETEs of 1.16; and of 1.17 discards and the choice of huge pages. One [Client]
// belongs to one VMM process and keeps one connection to it, because the VMM accepts ten at most
// and serves requests strictly one after another.
//
// # Versions
//
// Firecracker refuses a body with a field it does not know, so a field (or endpoint, or a field's
// value) newer than the VMM is refused here, by name and before anything is sent, with a
// [*VersionError] that names the version needed. [CheckVersion] asks the same question without a
// VMM. The other way round decoding is lenient: unknown fields in answers are skipped, and
// enumerations are strings, so a newer VMM's values pass through.
//
// # Bodies
//
// Field names and limits are those of the API. Fields without omitempty are required by the VMM; a
// zero value in any other field means "absent", and the VMM's default applies. Paths are opened by
// the VMM: relative to its working directory, or to its jail.
//
// # Errors
//
// An answer that is not a success becomes an [*APIError] with the VMM's own words. A call whose
// context ends leaves the VMM in doubt: a request that the VMM has read is carried out even when no
// call waits for its answer.
package firecracker
