"""Re-rankings: other similarities than cosine, from the neighbours that queries and gallery have in common."""
