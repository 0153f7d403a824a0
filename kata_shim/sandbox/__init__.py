"""One sandbox: its state, its record, and the operations that keep guest, QEMU and host in agreement."""
