"""Retrieval evaluation: ranking metrics, closed-form baselines, feature extraction on all ranks, reports."""
