"""What touches the world: files, text, terminals and the loops."""
