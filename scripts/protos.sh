#!/usr/bin/env bash
# Generates the stubs under fanlight/ from protos/, in a separate environment: stubs refuse a runtime that is older than
# their generator, so the generator is the oldest version that is supported.
# usage: scripts/protos.sh [OUTPUT_DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-.}
env=.cache/protos
if [ ! -x "$env/bin/protoc-gen-mypy" ]; then
  python3 -m venv "$env"
  "$env/bin/pip" install --quiet --disable-pip-version-check grpcio-tools==1.71.2 mypy-protobuf==3.7.0 'setuptools<81'
fi
mkdir -p "$out"
PATH="$PWD/$env/bin:$PATH" "$env/bin/python" -m grpc_tools.protoc -I protos \
  --python_out="$out" --grpc_python_out="$out" --mypy_out=quiet:"$out" --mypy_grpc_out=quiet:"$out" \
  $(find protos -name '*.proto' | sort)
# The comments of the protos, for the HTTP API's documentation: stubs do not have them.
PATH="$PWD/$env/bin:$PATH" "$env/bin/python" -m grpc_tools.protoc -I protos \
  --include_source_info --descriptor_set_out=/dev/stdout $(find protos -name '*.proto' | sort) |
  "$env/bin/python" scripts/proto_words.py > "$out/fanlight/words.json"
