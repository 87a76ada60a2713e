"""Reading, sampling and batching of shard sets."""
