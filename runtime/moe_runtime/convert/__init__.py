"""From one checkpoint to another."""
