"""The `echelon` command."""

import os

# gRPC's core writes to standard error by itself, such as "Got goaway" when a gateway ends during a stream. It reads
# this when grpc is imported, so it is set before any module of the command. Standard error is for the command's own
# words.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
