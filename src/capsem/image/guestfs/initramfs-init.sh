#!/bin/busybox sh
# The guest's first program: mounts the image and the VM's volume, then becomes /usr/lib/capsem/init in the new root.
#
# Under emulation every process costs milliseconds, so there are few: what can be mounted in one go is, from a table.
# A failure ends in a reset rather than in a power-off: the host can tell it from a guest that shut down.

fail() {
    echo "capsem: the guest cannot start: $1"
    /bin/busybox reboot -f
}

# The shell finds its own applets through /proc/self/exe, so the first one needs its full name.
/bin/busybox mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t devtmpfs -o nosuid,noexec devtmpfs /dev
while read -r module; do
    insmod "/modules/$module.ko" || fail "kernel module $module does not load"
done < /modules/order
[ -b /dev/vda ] || fail "there is no image"
[ -b /dev/vdb ] || fail "there is no volume"

mount -t erofs -o ro /dev/vda /lower || fail "the image does not mount"
mount -t ext4 -o data=ordered,noatime,discard /dev/vdb /volume || fail "the volume does not mount"
# They are there from the start, but the guest's owner can remove them.
[ -d /volume/upper ] || mkdir /volume/upper
[ -d /volume/work ] || mkdir -m 0700 /volume/work
[ -d /volume/workspace ] || mkdir -m 0700 /volume/workspace
mkdir /dev/pts /dev/shm
mount -a -T /mounts || fail "the root does not mount"
rm -f /new/dev/mem /new/dev/port
# What programs know the descriptors by that they were given, bash its `<(...)` too.
ln -s /proc/self/fd /new/dev/fd
ln -s fd/0 /new/dev/stdin
ln -s fd/1 /new/dev/stdout
ln -s fd/2 /new/dev/stderr
# Until here the shell needed /proc, and this is the last it gets.
/bin/busybox mount -o move /proc /new/proc
exec /bin/busybox switch_root /new /usr/lib/capsem/init
