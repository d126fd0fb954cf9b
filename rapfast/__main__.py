"""`python -m rapfast`, the same as `rapfast`."""

import sys

from .cli import main

sys.exit(main())
