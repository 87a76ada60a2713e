"""Contrastive kernels: public functions in `contrastive`, one file per backend."""
