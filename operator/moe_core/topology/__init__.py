"""Placement: ranks to nodes. The immutable domain tree, room per node, and the gang fit with its counted exclusions."""
