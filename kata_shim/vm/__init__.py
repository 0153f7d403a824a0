"""The virtual machine: QEMU, its monitor, its console and the agent inside, as one thing."""
