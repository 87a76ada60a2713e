"""reid_dist: distributed training of one vision encoder for image and text queries in person re-identification."""
