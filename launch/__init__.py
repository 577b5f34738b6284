"""The commands: flags, then one call."""
