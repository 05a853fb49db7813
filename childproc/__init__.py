"""The child's end of `protos/process.proto`, the same for gateway, scheduler and workers.

`edge.run` is the whole life of a child process: it reads the spec, serves, and reports how that went.
"""
