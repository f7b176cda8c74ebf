"""The command line: `trl-vlm`."""
