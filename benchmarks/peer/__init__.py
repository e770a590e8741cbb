"""What benchmarks/peers.py measures: engines, each in a process of its own and, where it isn't ours, its own venv."""
