"""``python -m cryoai`` is the command ``cryoai``."""

import sys

from cryoai.cli import main

sys.exit(main())
