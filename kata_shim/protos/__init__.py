"""Protobuf messages of the wires; `*_pb2.py` and `*_pb2.pyi` are made by scripts/generate-protos."""
