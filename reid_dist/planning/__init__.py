"""What a recipe will need before anything runs: memory, work, communication and time."""
