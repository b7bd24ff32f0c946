package mkfs

// Hash is of a name in a directory with an index.
var Hash = hash
