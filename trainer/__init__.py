"""Learns: windows of labelled examples in, bundles out. Calls ``models``, never ``streams``."""
