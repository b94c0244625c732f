"""The runtime inside moerator's pods: fast loop, steps, membership, experts. It measures and degrades; it never plans placement."""
