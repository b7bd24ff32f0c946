#!/bin/busybox sh
# The lab's first program. With it in the initramfs: busybox, kernel modules
# and /lab, see initramfs.go. Whatever fails ends the lab; who runs it sees what
# was said.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev

fail() {
	[ -c /dev/lab/control ] && echo "fail $*" >/dev/lab/control
	# We are killed when that has been read. It need not be.
	$b usleep 500000
	echo "lab: $*"
	echo o >/proc/sysrq-trigger
	while :; do $b sleep 60; done
}

# Devices appear some time after their driver.
eventually() {
	n=0
	until "$@" 2>/dev/null; do
		n=$((n + 1))
		[ $n -lt 1000 ] || return 1
		$b usleep 2000
	done
}

insert() {
	while read -r module; do
		$b insmod "$module" || return 1
	done <"$1"
}

. /lab/config.sh
insert /lab/first-modules || fail "insert modules"
insert /lab/then-modules &
inserting=$!

# The numbers in a port's device name depend on what else is there.
link_ports() {
	for port in /sys/class/virtio-ports/*; do
		read -r name <$port/name && $b ln -sf ../${port##*/} /dev/lab/$name
	done
	[ -c /dev/lab/control ] && [ -c /dev/lab/stdout ] && [ -c /dev/lab/stderr ]
}
$b mkdir /dev/lab
eventually link_ports || fail "find the ports"

$b mkdir /lower /upper /new
p9=trans=virtio,version=9p2000.L,msize=512000
eventually $b mount -t 9p -o $p9,ro,cache=loose root /lower || fail "mount this machine's root"
$b mount -t tmpfs tmpfs /upper && $b mkdir /upper/files /upper/work || fail "mount a tmpfs"
$b mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work overlay /new || fail "mount the overlay"
for dir in proc sys dev; do
	$b mkdir -p /new/$dir && $b mount --move /$dir /new/$dir || fail "move /$dir"
done
$b mkdir -p /new/run /new/tmp /new/lib/modules/"$release"
$b mount -t tmpfs -o mode=755 tmpfs /new/run && $b mkdir /new/run/lab || fail "mount /run"
$b mount -o bind "/lower$modules" /new/lib/modules/"$release" || fail "mount modules"
i=0
while eval "dir=\$share$i" && [ -n "$dir" ]; do
	$b mkdir -p "/new$dir" && $b mount -t 9p -o $p9,cache=mmap share$i "/new$dir" || fail "mount $dir"
	i=$((i + 1))
done
$b cp $b /lab/* /new/run/lab/ || fail "copy files"
wait $inserting || fail "insert modules"
exec $b switch_root /new /run/lab/busybox sh /run/lab/start.sh
