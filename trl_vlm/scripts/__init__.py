"""One script for each method, and what they have in common."""

import trl_vlm.scripts.quiet  # noqa: F401  before anything that talks while it is imported
