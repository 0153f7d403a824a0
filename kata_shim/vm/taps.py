"""The host's end of NICs: the MTU and state of taps, those that were there before an add included."""

from __future__ import annotations

from kata_shim import log
from kata_shim.contract.interface import Interface
from kata_shim.errors import ShimError
from kata_shim.netconf import link
from kata_shim.netconf.netlink import Netlink


class HostTaps:
    """The taps of one sandbox; a vhost-user NIC has none."""

    def __init__(self) -> None:
        self._socket: Netlink | None = None

    async def find(self, interface: Interface) -> link.Link | None:
        """Return the NIC's tap as it is now, for `put_back`; None where there is none."""
        if interface.vhost_user_socket:
            return None
        return await link.find(self._netlink, interface.device)

    async def set_mtu(self, interface: Interface) -> None:
        """Bring the tap to the NIC's MTU, and up; raises ShimError `not-found` when it has gone."""
        if interface.vhost_user_socket:
            return
        found = await self.find(interface)
        if found is None:
            raise ShimError("not-found", f"device: {interface.device} has gone from the host")
        await link.ensure(self._netlink, found, mtu=interface.mtu)

    async def put_back(self, before: link.Link | None) -> None:
        """Bring a tap that was there `before` to the MTU and state it had, unless it has gone since."""
        if before is None:
            return
        try:
            now = await link.find(self._netlink, index=before.index)
            if now is not None:
                await link.ensure(self._netlink, now, mtu=before.mtu, up=before.up)
        except ShimError as error:
            log.warning("a tap could not be set back", device=before.name, error=error.message)

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    @property
    def _netlink(self) -> Netlink:
        # Not before it is needed: a socket is of the namespace it was made in, and a re-attach changes ours.
        if self._socket is None:
            self._socket = Netlink()
        return self._socket
