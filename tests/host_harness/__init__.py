"""A real ComfyUI for tests and the demo: small models on disk, the host in this process, the host as a server.

`tests/conftest.py` registers this folder as the package `host_harness`: tests write
`from host_harness import small_models`.
"""
