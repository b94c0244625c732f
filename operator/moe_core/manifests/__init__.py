"""Rendering: from what was accepted to whole Kubernetes objects. Pure; owner, namespace and uid are the shell's to add.

The local shell reads the same manifests and starts `moe-pod` with the same environment, paths apart.
"""
