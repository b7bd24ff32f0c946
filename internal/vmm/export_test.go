package vmm

// Standstill is one look of Hung, and Waiting its look at the threads of a process.
var (
	Standstill = (*Process).standstill
	Waiting    = waiting
)
