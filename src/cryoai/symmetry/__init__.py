"""Point-group symmetry: the groups, averaging over them, and finding the one that a map obeys."""
