"""What a run leaves on the disk: checkpoints of a stage in training, and the portable export of a finished one."""
