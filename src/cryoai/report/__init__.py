"""Pictures of results; reads run folders and never runs anything."""
