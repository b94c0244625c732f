"""What keeps a pod's processes: its environment, its Ray node, the guard that may end a rank, the end of them all."""
