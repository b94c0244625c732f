"""Who takes part in steps: epochs agreed among the ranks themselves, and the process group of each epoch."""
