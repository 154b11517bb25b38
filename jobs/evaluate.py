"""The command `baklava-evaluate` as a script: ray job submit --working-dir . -- python jobs/evaluate.py --help."""

import sys

from tuning.evaluation.cli import main

if __name__ == "__main__":
    sys.exit(main())
