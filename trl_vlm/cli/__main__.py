"""`python -m trl_vlm.cli` is `trl-vlm`, for launchers."""

import sys

from trl_vlm.cli.main import main

sys.exit(main())
