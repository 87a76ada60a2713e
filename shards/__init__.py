"""Raw data sets to shards: one small file per data set, and the procedural world that imitates them."""
