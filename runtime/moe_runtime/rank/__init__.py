"""A rank: its Ray actor, its step loop, and the two kinds of work the loop drives, serving and training."""
