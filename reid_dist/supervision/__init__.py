"""What keeps ranks from being lost, left alone or stuck: signals, parents that die, heartbeats, a guardian."""
