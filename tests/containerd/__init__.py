"""The shim under Debian's own containerd."""
