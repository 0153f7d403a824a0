"""The kata-ipvs tests' hands: rules, and what the guest's own ipvsadm says of its table."""

from __future__ import annotations

from tests.support import Guest, Result

DONE = Result(0, "", "")
TABLE = """
-A -t 10.0.0.1:80 -s rr -p 3000
-a -t 10.0.0.1:80 -r 192.168.1.2:8080 -m -w 5 -x 100
-a -t 10.0.0.1:80 -r 192.168.1.1 -g
-a -t 10.0.0.1:80 -r [fd00:1::1]:80 -i --tun-type gue --tun-port 6080
-A -u [fd00::1]:53 -s sh -b sh-fallback,sh-port -o -p 60 -M 64
-a -u [fd00::1]:53 -r [fd00:1::1]:53 -m
-A --sctp-service 10.0.0.2:0 -s mh -p -M 255.255.255.0 -b mh-port
-A -f 7 -6 -s lc
-a -f 7 -6 -r [fd00:1::2]:0 -m
-A -f 7
-a -f 7 -r 10.0.0.9:0 -m
"""
# What ipvsadm itself does not save as it is.
ODD = """
-A -t 10.0.9.1:80 -s sh -b flag-3,sh-port
-A -t 10.0.9.2:80 -M 255.255.255.0
-a -t 10.0.9.2:80 -r 10.0.9.9 -w 2147483647 -x 2147483647 -y 2147483647
-A -u 10.0.9.3:80 -s wrr -o --pe sip -p 1
"""


def saved(guest: Guest) -> list[str]:
    """The table as the guest's own ipvsadm saves it."""
    return guest.run("ipvsadm", "-Sn").stdout.splitlines()


def many(services: int, servers: int = 3) -> str:
    """Rules of the documented kind."""
    lines = []
    for number in range(services):
        service = f"10.10.{number >> 8}.{number & 255}:100"
        lines.append(f"-A -t {service} -s rr -p 3000\n")
        lines += [f"-a -t {service} -r 172.16.0.1:{80 + server} -m\n" for server in range(servers)]
    return "".join(lines)


def ipvsadm_restore(guest: Guest, rules: str) -> Result:
    """Restore rules in ipvsadm's dialect."""
    words = ("--dialect", "ipvsadm", "--restore", "-")
    return guest.runtime("kata-ipvs", "ipvsadm", *words, guest.id, stdin=rules)


def replace_by(guest: Guest, rules: str, *flags: str) -> Result:
    """Replace the table by rules."""
    return guest.runtime("kata-ipvs", "ipvsadm", "--replace", "-", *flags, guest.id, stdin=rules)
