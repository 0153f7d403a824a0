"""A per-sandbox runtime for QEMU secure containers: the shim, its agent in the guest, and their CLI."""

__version__ = "0.1.0"
