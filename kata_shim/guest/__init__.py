"""The agent in the guest: answers the shim's calls over ttrpc."""
