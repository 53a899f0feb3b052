"""Benchmarks are tests, too: they find their own rooms, and the settings that all tests have."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def pytest_xdist_auto_num_workers():
    "What is timed runs alone."
    return 0
