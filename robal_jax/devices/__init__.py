"""Devices and processes: how work is spread over them.

- ``parallel``: training chunks, attacks and evaluations compiled for all devices
- ``hosts``: the processes of one job: how they start, agree and stop
- ``output``: streams for messages, whose failures end no job
- ``cpu``: what makes JAX faster on a CPU: flags, the compilation cache, how many pixels per call
"""
