"""What the methods claim, measured on the procedural world: arms, worlds, runs, verdicts, report."""
