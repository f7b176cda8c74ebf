"""DPO: losses on weighted replies, fresh pairs, the reference on disk."""
