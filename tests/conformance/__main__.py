"`python tests/conformance`: every architecture, each in a process of its own; a table for the site."

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(TESTS), str(TESTS.parent)]  # instead of this folder: `audit` is beside it, the package above

if __name__ == "__main__":
    from conformance.cli import main

    sys.exit(main())
