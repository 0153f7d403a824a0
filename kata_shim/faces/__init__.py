"""The faces of a sandbox: each translates one wire into calls of the sandbox, and its errors back, once."""
