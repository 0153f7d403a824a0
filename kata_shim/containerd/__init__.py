"""What containerd and its runtimes say to each other: protocol buffers, and nothing else."""
