"""ttrpc: the wire, the link layer for byte streams that can be cut, the client and the server."""
