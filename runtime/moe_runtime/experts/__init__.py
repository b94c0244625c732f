"""Slots, weights and what answers for an expert that was lost."""
