"""``python -m sqa_fx``."""

import sys

from sqa_fx.cli import main

sys.exit(main())
