"""kata-runtime: reads its arguments, calls a sandbox's shim through kata_shim.client, prints what comes."""
