"""`python -m saffe_cache VERB ...`, the same as `saffe VERB ...`: what torchrun starts."""

import sys

from saffe_cache.cli import main

if __name__ == "__main__":
    sys.exit(main())
