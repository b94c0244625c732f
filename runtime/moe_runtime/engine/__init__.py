"""A transformers model over a group of ranks, and what serving needs around it: cache, scheduler, sampling."""
