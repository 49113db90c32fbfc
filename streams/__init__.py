"""Moves: topics, the Faust app and its agents, tables, mirrors, metrics. Calls ``models``, never ``trainer``."""
