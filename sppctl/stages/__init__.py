"""The arrows of the pipeline, one file each: input and output, and the order of things; the mathematics is below."""
