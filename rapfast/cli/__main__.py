"""`python -m rapfast.cli`."""

import sys

from . import main

sys.exit(main())
