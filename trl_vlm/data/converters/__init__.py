"""Public preference datasets as rows of the row contract: one pure function each, and `convert` around them."""

from trl_vlm.data.converters.conversion import Report, convert
from trl_vlm.data.converters.records import BadRecord, Converted, MissingColumns
from trl_vlm.data.converters.registry import CONVERTERS, Converter
from trl_vlm.data.io.source import Source

__all__ = ["CONVERTERS", "BadRecord", "Converted", "Converter", "MissingColumns", "Report", "Source", "convert"]
