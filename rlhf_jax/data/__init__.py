"""Files and data sets to rows, to arrays, to batches in a fixed order."""
