"""The coordinator of a group: tells members what the wish and the living ranks make of each other; never in a step."""
