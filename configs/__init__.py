"""One file per experiment; each imports ml_collections and nothing else."""
