"""What launch/benchmark.py and launch/quickstart.sh run to measure."""
