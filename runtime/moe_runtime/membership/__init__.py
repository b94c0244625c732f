"""Who takes part in steps: epochs agreed among the ranks, the groups built on them, and the fencing of who is out."""
