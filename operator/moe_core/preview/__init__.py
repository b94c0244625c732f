"""What would come of a resource, before any pod exists: the same accept, fit and assignment that the operator runs."""
