"""The runtime inside moerator's pods: steps, membership, experts. It measures and degrades; it never plans placement."""
