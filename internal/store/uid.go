package store

import "hash/fnv"

// The user ids that VMMs get in jails. systemd's list of ranges leaves what is above its
// containers' free (systemd.io/UIDS-GIDS). A runtime directory has a part of it, chosen by its
// path.
const (
	firstUID = 1_900_000_000
	uidSlots = 2000
	// UIDs is how many a runtime directory has.
	UIDs = 65536
)

// UID is the user id that a VM of a runtime directory tries as its n-th.
func UID(dir, id string, n uint32) int {
	return firstUID + int(hash(dir)%uidSlots)*UIDs + int((hash(id)+n)%UIDs)
}

func hash(s string) uint32 {
	h := fnv.New32a()
	_, _ = h.Write([]byte(s))
	return h.Sum32()
}
