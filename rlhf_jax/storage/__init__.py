"""What stays on disk: workdirs, checkpoints, models by path, exports."""
