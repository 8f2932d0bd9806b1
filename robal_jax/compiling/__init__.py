"""Estimates of a run before it starts: memory, work and time, by the compiler of devices that may be absent.

- ``programs``: the programs of a run, lowered
- ``hlo``: a compiled program's text, parsed
- ``cost``: operations, bytes, transfers and cycles of a program
- ``estimates``: all of this for the programs of a config
- ``text``: estimates in words
"""
