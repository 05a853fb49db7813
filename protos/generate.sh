#!/bin/sh
# Regenerates echelon/pb with the oldest grpcio-tools we support: stubs refuse runtimes older than the
# tools that made them. The tools live in a virtual environment of their own, because they pin protobuf.
set -eu
cd "$(dirname "$0")/.."
venv=.venv-proto
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet "grpcio-tools==1.62.3" "setuptools<80" "mypy-protobuf==3.6.0"
"$venv/bin/python" -m grpc_tools.protoc -Iechelon/pb=protos \
    --plugin=protoc-gen-mypy="$venv/bin/protoc-gen-mypy" \
    --plugin=protoc-gen-mypy_grpc="$venv/bin/protoc-gen-mypy_grpc" \
    --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. \
    echelon/pb/sampling.proto echelon/pb/inference.proto echelon/pb/scheduler.proto \
    echelon/pb/worker.proto echelon/pb/process.proto echelon/pb/control.proto echelon/pb/jobs.proto echelon/pb/reading.proto echelon/pb/access.proto
