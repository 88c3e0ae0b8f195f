"""``python -m wsn_fast.doctor``."""

import sys

from .findings import main

sys.exit(main())
