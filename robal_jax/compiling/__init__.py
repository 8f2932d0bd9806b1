"""What a compiler says of a run before it starts: memory, work and time, on devices that need not be there.

- ``programs``: the programs of a run, lowered
- ``hlo``: a compiled program's text, parsed
- ``cost``: operations, bytes, transfers and cycles of a program
- ``estimates``: all of this for the programs of a config
- ``text``: estimates in words
"""
