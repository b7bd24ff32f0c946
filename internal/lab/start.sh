# The lab's first program once the root file system is in place.
b=/run/lab/busybox
. /run/lab/config.sh

fail() {
	echo "fail $*" >/dev/lab/control
	while :; do $b sleep 60; done
}

$b mkdir -p /dev/pts /dev/shm /run/netns
$b mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts &&
	$b mount -t tmpfs -o mode=1777 tmpfs /dev/shm &&
	$b mount -t cgroup2 cgroup2 /sys/fs/cgroup || fail "mount file systems"
$b ln -sf /proc/self/fd /dev/fd
$b ln -sf /proc/self/fd/0 /dev/stdin
$b ln -sf /proc/self/fd/1 /dev/stdout
$b ln -sf /proc/self/fd/2 /dev/stderr
[ -c /dev/kvm ] || fail "no /dev/kvm"
$b chmod 666 /dev/kvm /dev/net/tun
# For guests: see LargePages.
echo 640 >/proc/sys/vm/nr_hugepages
# Guests' timers come when they are due: coming early means turning until then, by a clock that emulation does not keep.
echo 0 >/sys/module/kvm/parameters/lapic_timer_advance_ns
$b hostname smartvm-lab
$b ip link set lo up
ulimit -n 1048576

# The command writes to pipes, as programs expect, and not to the ports, which
# only one process can open.
$b mkfifo /run/lab/stdout /run/lab/stderr
$b cat /run/lab/stdout >/dev/lab/stdout &
$b cat /run/lab/stderr >/dev/lab/stderr &
$b mkfifo /run/lab/never
exec 5>/dev/lab/control 6<>/run/lab/stdout 7<>/run/lab/stderr
echo ready >&5
# A sign of life, without a new process each time. Nobody writes to the FIFO.
while echo alive; do read -r -t 3 line; done <>/run/lab/never >&5 6>&- 7>&- &
$b sh /run/lab/job.sh </dev/null >&6 2>&7 5>&- 6>&- 7>&-
status=$?
# The marker tells that all output has come through; the descriptors may be
# open in processes that the command left behind.
printf '\0%s' "$marker" >&6
printf '\0%s' "$marker" >&7
$b sync
echo "exit $status" >&5
while :; do $b sleep 60; done
