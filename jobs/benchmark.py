"""The command `baklava-benchmark` as a script: ray job submit --working-dir . -- python jobs/benchmark.py --help."""

import sys

from benchmarks.cli import main

if __name__ == "__main__":
    sys.exit(main())
