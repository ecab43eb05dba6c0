"""`python -m ds_minis.cli`."""

import sys

from ds_minis.cli.command import main

sys.exit(main())
