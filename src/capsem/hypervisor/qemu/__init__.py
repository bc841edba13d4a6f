"""The QEMU driver (7.2 or newer)."""
