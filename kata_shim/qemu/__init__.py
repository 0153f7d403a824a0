"""QEMU: what to start it with (pure), and how to drive it (monitor, process, hotplug)."""
