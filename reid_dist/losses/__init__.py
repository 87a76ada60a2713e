"""One file per loss. Every loss is the mean over ranks of what each rank returns (see `reid_dist.distributed`)."""
