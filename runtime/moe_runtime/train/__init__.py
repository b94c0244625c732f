"""Training over the ranks of one epoch: data, steps that commit or roll back, snapshots, checkpoints."""
