"""`python -m slime.cli`: the same as `slime`."""

import sys

from slime.cli import main

sys.exit(main())
