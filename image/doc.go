// Package image keeps what VMs boot: root filesystems, kernels and initramfses, each once, under
// names that people give or registries have.
//
// An image is a name for objects. An object is an immutable directory whose name is its content's
// address: a root filesystem is stored by the chain of its layers, so that a second name for it
// costs nothing. Objects are never changed after they have been moved into place, and are checked
// before they are used.
//
// Many processes share one store. Whoever adds or uses an image holds the store (Hold); whoever
// removes from it has it alone. A VM keeps its objects by a symbolic link in each that leads to the
// VM's directory: once that is gone, so is the VM's claim.
package image
