"""From the samples of a converter to a finished shard set."""
