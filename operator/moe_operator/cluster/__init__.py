"""The two places moerator runs on, behind one small protocol: a Kubernetes cluster, or this machine."""
