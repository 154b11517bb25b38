"""The command `baklava-search` as a script: ray job submit --working-dir . -- python jobs/search.py --help."""

import sys

from tuning.search.cli import main

if __name__ == "__main__":
    sys.exit(main())
