"""What the sandbox's commands cost, each against the least that the same thing can cost on this machine."""
