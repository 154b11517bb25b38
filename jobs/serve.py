"""The command `baklava-serve` as a script: python jobs/serve.py --help."""

import sys

from serve_app.cli import main

if __name__ == "__main__":
    sys.exit(main())
