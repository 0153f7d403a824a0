"""What is generated from the .proto files is what is committed, and every method's types are found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kata_shim.protos import agent_pb2, types_pb2
from kata_shim.protos.services import AGENT, SERVICES

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]


def test_generated_files_are_up_to_date() -> None:
    subprocess.run(
        [ROOT / "scripts/generate-protos", "--check"],
        env={**os.environ, "PYTHON": sys.executable},
        check=True,
    )


def test_methods_have_the_generated_types() -> None:
    assert AGENT["UpdateInterface"] == (agent_pb2.UpdateInterfaceRequest, types_pb2.Interface)
    assert {name: len(methods) for name, methods in SERVICES.items()} == {
        "grpc.AgentService": 27,
        "grpc.Health": 2,
        "kata_shim.Guest": 14,
    }
