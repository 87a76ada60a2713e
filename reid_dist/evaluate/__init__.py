"""Scores of trained models on benchmarks: what `launch/evaluate.py` runs.

`command.evaluate` is the whole of it, of the parts beside it: which models (`candidates`) that were trained on what
(`training_data`) are asked which tasks of which sets (`benchmarks`), what is known already (`records`), the one that
`--select` chooses (`selection`), and how it is told to people (`tables`) and machines (`results`).
"""
