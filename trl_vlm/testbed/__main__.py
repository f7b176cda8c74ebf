"""Writes a contact sheet of the testbed: `python -m trl_vlm.testbed --out sheet.html` (or `.png`)."""

import argparse
import logging

from trl_vlm.testbed.contact_sheet import write_contact_sheet
from trl_vlm.testbed.world import World


def main() -> None:
    """Reads the options and writes the sheet."""
    parser = argparse.ArgumentParser(prog="python -m trl_vlm.testbed", description=__doc__)
    parser.add_argument("--out", default="testbed.html", help="The page (.html) or picture (.png) to write.")
    parser.add_argument("--world", type=int, default=0, help="Seed of the world: names, shapes and colors.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the scenes.")
    parser.add_argument("--count", type=int, default=6, help="Pictures of each split.")
    options = parser.parse_args()
    path = write_contact_sheet(World(seed=options.world), options.out, count=options.count, seed=options.seed)
    logging.getLogger(__name__).info("Wrote %s", path)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
