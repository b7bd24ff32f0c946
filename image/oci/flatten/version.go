package flatten

// Version is of what Layers makes of the same layers. Raise it with each change that makes another
// file system of them: stores make theirs anew then.
const Version = 3
