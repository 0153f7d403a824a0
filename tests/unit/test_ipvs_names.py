"""hosts(5) and services(5): who is who, and nothing else whatever stands in them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kata_shim.ipvs.names import FileNames
from kata_shim.ipvs.rules import TCP, UDP

pytestmark = pytest.mark.quick

HOSTS = """\
127.0.0.1 localhost loop  # the first name is the host's own
::1\tlocalhost
10.0.0.1 web WWW
10.0.0.2 web
# 10.0.0.3 none
10.0.0.256 none
10.0.0.4
10.0.0.5 \x1b[2J
"""
SERVICES = """\
http 80/tcp www
domain 53/udp
bad 99999/tcp
worse x/tcp
other 80/dccp
late 80/tcp
"""


def test_hosts_and_services_are_known_by_their_first_lines() -> None:
    names = FileNames(HOSTS, SERVICES)
    assert names.host_name(bytes((127, 0, 0, 1))) == "localhost"
    assert names.host_name(bytes(15) + b"\1") == "localhost"
    assert [names.host(name) for name in ("loop", "web", "Www", "none")] == [
        bytes((127, 0, 0, 1)),
        bytes((10, 0, 0, 1)),
        bytes((10, 0, 0, 1)),
        None,
    ]
    assert names.host_name(bytes((10, 0, 0, 4))) is None
    assert names.host_name(bytes((10, 0, 0, 5))) is None
    assert (names.port("www", TCP), names.port("domain", UDP), names.port("domain", TCP)) == (80, 53, None)
    assert (names.service_name(80, TCP), names.service_name(80, UDP)) == ("http", None)
    assert names.port("bad", TCP) is None


@given(st.text(), st.text())
def test_any_files_are_read(hosts: str, services: str) -> None:
    FileNames(hosts, services)
