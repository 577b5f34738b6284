"""A policy judged: figures with their errors."""
