"""One page to look at pairs, runs and evaluated replies: an HTML file that opens with a double click.

Layer: beside `evaluation`, below `cli`. Neither torch nor TRL is imported.
"""
