"""A configuration -> parameters, memory, disk and steps, from shapes alone."""
