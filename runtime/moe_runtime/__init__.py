"""The runtime in moerator's pods: steps, membership, experts. It measures and degrades; it never plans placement."""
